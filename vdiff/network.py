"""Check that a server answers, before a library waits minutes for it."""

from __future__ import annotations

import http.client
import os
import threading
import urllib.error
import urllib.request

from vdiff.text import cause_of

SECONDS = 10.0
HUB = "https://huggingface.co"


def hub_answers() -> bool:
    """Whether the hub of Hugging Face (or HF_ENDPOINT) answers within 10 s; if not, its libraries read their cache."""
    if os.environ.get("HF_HUB_OFFLINE") or answers(os.environ.get("HF_ENDPOINT") or HUB):
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"  # they read it when they are imported
    return False


def answers(url: str, seconds: float = 0.0) -> bool:
    """Whether a server answers at all within `seconds` (0: `SECONDS`), the time for DNS included."""
    return not failure(url, seconds)


def failure(url: str, seconds: float = 0.0) -> str:
    """Why a server does not answer within `seconds` (0: `SECONDS`); empty if it does, even with an error."""
    seconds, found = seconds or SECONDS, list[str]()

    def ask() -> None:
        try:
            # not `urlopen`, which remembers the proxies of its first call
            opener = urllib.request.build_opener()
            opener.open(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except (urllib.error.HTTPError, http.client.HTTPException):  # a server that refuses HEAD may end the connection
            found.append("")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if not isinstance(reason, TimeoutError):
                found.append(cause_of(reason))
        else:
            found.append("")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return found[0] if found else f"no answer in {seconds:g} s"
