"""Publishing a checkpoint: its weights, public description and model card, in a folder or on a model hub."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdiff.errors import OptionError, VdiffError
from vdiff.files import json_text, read_json, write_json
from vdiff.interop.card import CARD, FILES_OF_CARD, PICTURE, UNKNOWN, is_card, new_card, public
from vdiff.interop.diffusers.text_writing import CONFIGURATION, SINGLE_FILE
from vdiff.interop.usage import weights_usage
from vdiff.models.checkpoint import (
    CONFIG,
    FILES,
    WEIGHTS,
    is_checkpoint,
    load_checkpoint,
    read_config,
    save_checkpoint,
    weights_path,
)
from vdiff.models.components import PARTS
from vdiff.replacing import Kind, new_folder
from vdiff.text import cause_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
PATTERNS = (CARD, PICTURE, CONFIG, WEIGHTS, "*.onnx", "*.pt2", "model_index.json")
PATTERNS_BELOW = (
    *("unet/config.json", "unet/*.safetensors", "unet/adapter_config.json", "scheduler/scheduler_config.json"),
    *(f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "safetensors", "txt")),
    f"vdiff/{CONFIG}",
)
"""Files of an export, at its top and in a pipeline's subfolders; other files are not uploaded."""
DESCRIPTIONS = (CONFIG, f"vdiff/{CONFIG}")
"""Files that may contain paths of this machine, if another tool or an older version exported them."""


# A folder


EXPORT = Kind("export", lambda path: f"{FILES}|{FILES_OF_CARD}" if is_checkpoint(path) and is_card(path / CARD) else "")


def export_weights(checkpoint: Path, folder: Path, *, license_name: str, overwrite: bool) -> None:
    """Write `folder`, itself a checkpoint, with the bits of `checkpoint`'s weights; whole or not at all.

    Raises:
        VdiffError: the checkpoint cannot be used, or the folder exists; only folders from this function are replaced.
    """
    if folder.resolve() == checkpoint.resolve():
        raise VdiffError(f"{folder} is the checkpoint itself", "give another folder")
    with new_folder(folder, EXPORT, overwrite=overwrite, flag="another folder") as temporary:
        _describe(checkpoint, temporary, license_name)
        if weights_path(checkpoint).name == WEIGHTS:
            shutil.copyfile(checkpoint / WEIGHTS, temporary / WEIGHTS)
        else:
            merged, _ = load_checkpoint(checkpoint)
            save_checkpoint(temporary, merged.state_dict(), read_config(temporary))


def _describe(checkpoint: Path, folder: Path, license_name: str) -> None:
    """Write everything except the weights into `folder`: config.json without paths, README.md and its picture."""
    config = read_config(checkpoint)
    usage = {WEIGHTS: weights_usage(checkpoint.resolve().name, config)}
    new_card(checkpoint, usage=usage, license_name=license_name).write(folder)
    write_json(folder / CONFIG, public(replace(config, adapter=None, base=None).to_dict()))


# An upload


@dataclass(frozen=True)
class Upload:
    """The files to upload.

    Attributes:
        files: name in the repository → file, or the content itself.
        left: names of files in the folder that are not uploaded.
    """

    files: Mapping[str, Path | bytes]
    left: list[str]

    def size(self, name: str) -> int:
        """Bytes of one file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def collect(folder: Path, scratch: Path, *, license_name: str | None) -> Upload:
    """The files of a checkpoint or an export; a checkpoint's card and picture are made in `scratch`.

    They never include state, logs, previews, settings (`run.toml`) or hidden files. Paths in descriptions are reduced
    to their last part.

    Raises:
        VdiffError: the folder is neither, or cannot be used.
        OptionError: a licence is given for an export, which has one in its card.
    """
    if is_card(folder / CARD):
        if license_name is not None:
            raise OptionError("--license: an export has its licence in its README.md", "change it there")
        files = _exported(folder)
    elif weights_path(folder).name != WEIGHTS:
        raise VdiffError(
            f"{folder} holds a LoRA alone", "push what `vdiff export weights` writes, which is merged with its base"
        )
    else:
        _describe(folder, scratch, license_name or UNKNOWN)
        files = {path.name: path for path in (scratch / CARD, scratch / PICTURE, scratch / CONFIG) if path.exists()}
        files[WEIGHTS] = folder / WEIGHTS
    kept = {path.relative_to(folder).parts[0] for path in files.values() if path.is_relative_to(folder)} | set(files)
    left = sorted(path.name for path in folder.iterdir() if path.name not in kept)
    return Upload({name: _content(name, path) for name, path in sorted(files.items())}, left)


def _exported(folder: Path) -> dict[str, Path]:
    """The files of an export by their names in the repository; links are not followed."""
    found = [path for pattern in (*PATTERNS, *PATTERNS_BELOW) for path in folder.glob(pattern)]
    found += [path for path in folder.glob("*.safetensors") if SINGLE_FILE.files(path)]
    found += [path for path in folder.glob("*.yaml") if CONFIGURATION.files(path)]
    files = {path.relative_to(folder).as_posix(): path for path in found if path.is_file() and not path.is_symlink()}
    if not any(name.endswith((".safetensors", ".onnx", ".pt2")) for name in files):
        raise VdiffError(f"{folder} holds a model card but no model", "give the folder of a checkpoint or an export")
    return files


def _content(name: str, path: Path) -> Path | bytes:
    """A file for upload: unchanged, or a description without paths."""
    return json_text(public(read_json(path, "export again"))).encode() if name in DESCRIPTIONS else path


def push(
    upload: Upload, repository: str, *, private: bool, endpoint: str | None, token: str | None, overwrite: bool
) -> str:
    """Create the repository and commit all files in one commit; returns its address.

    Args:
        token: None: `HF_TOKEN` from the environment, or the token of `hf auth login`.
        overwrite: also commit to an existing repository.

    Raises:
        VdiffError: there is no token, no network or no permission, or the repository exists.
    """
    import huggingface_hub

    address = endpoint or huggingface_hub.constants.ENDPOINT
    if not (token := token or huggingface_hub.get_token()):
        raise VdiffError(f"no token for {address}", "set HF_TOKEN, give --token_file, or run `hf auth login`")
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="vdiff")
    with _hub_errors(address, repository, hint="nothing was uploaded"):
        created = api.create_repo(repository, private=private, exist_ok=overwrite)
    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in upload.files.items()
    ]
    with _hub_errors(address, repository, hint="run the same command with --overwrite to continue"):
        api.create_commit(repository, operations, commit_message="Upload a model from vdiff")
    return str(created)


@contextmanager
def _hub_errors(address: str, repository: str, *, hint: str) -> Iterator[None]:
    """Turn errors of the library, its HTTP client or the hub into one line."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:
        of_client = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests")
        if not (isinstance(error, HfHubHTTPError | OSError | ValueError | RuntimeError) or of_client):
            raise
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(address, repository, cause, hint) from None
        raise VdiffError(
            f"cannot upload to {address}: {cause_of(cause)}", f"check the network and --endpoint; {hint}"
        ) from None


def _refusal(address: str, repository: str, error: Any, hint: str) -> VdiffError:
    """The error for the hub's answer."""
    code = error.response.status_code
    said = cause_of(error.server_message or f"HTTP {code}")
    known = {
        401: (f"{address} rejects the token ({said})", "set HF_TOKEN to a token with write access"),
        403: (f"the token may not write to {repository} ({said})", "use a token of its owner with write access"),
        409: (f"{repository} exists already", "give another name, or --overwrite to commit to it"),
    }
    return VdiffError(*known.get(code, (f"{address} refuses {repository}: {said}", hint)))
