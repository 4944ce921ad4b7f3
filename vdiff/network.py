"""Check that a server answers, before a library waits minutes for it."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request

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
    seconds, found = seconds or SECONDS, list[bool]()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            found.append(True)
        except (OSError, ValueError):
            found.append(False)
        else:
            found.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return bool(found) and found[0]
