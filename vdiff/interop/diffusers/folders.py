"""Folders of pipelines and models of the hub: which files are read, and the weights of a network in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from vdiff.errors import VdiffError
from vdiff.interop.diffusers.unet import current_name
from vdiff.interop.foreign import JsonFile
from vdiff.models.checkpoint import read_tensors
from vdiff.models.components import ENCODERS, TOKENIZER_FILES, TOKENIZERS, VAE
from vdiff.models.reading import read_shapes
from vdiff.network import hub_answers
from vdiff.text import cause_of

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_PATTERN = "diffusion_pytorch_model*.safetensors"
"""File names of weights, with variants and parts."""
PARTS_PATTERN = "diffusion_pytorch_model.safetensors.index*.json"
"""File names of the indices that assign tensors to parts."""
NOTE = f"vdiff/{CONFIG}"
TEXTS = [f"{part}/{name}" for part in TOKENIZERS for name in TOKENIZER_FILES]
TEXTS += [f"{part}/{CONFIG}" for part in (VAE, *ENCODERS)]
FILES = [INDEX, SCHEDULER, f"scheduler/{SCHEDULER}", NOTE, *TEXTS, f"{VAE}/{WEIGHTS_PATTERN}"]
FILES += [
    f"{place}{name}" for place in ("", "unet/", "transformer/") for name in (CONFIG, WEIGHTS_PATTERN, PARTS_PATTERN)
]
FILES += [f"{part}/model*.{end}" for part in ENCODERS for end in ("safetensors", "safetensors.index*.json")]
"""All files that are read or downloaded: JSON, safetensors and tokenizers, no pickles."""
VARIANTS = ["*.fp16.safetensors", "*.non_ema.safetensors", "*.fp16-*", "*.non_ema-*", "*.fp16.json"]
"""Weights that are fetched only where there are no others."""
DESCRIPTIONS = [INDEX, f"scheduler/{SCHEDULER}", f"unet/{CONFIG}", *TEXTS]
"""What a single file of weights needs besides."""
NOT_THEIRS = "give a folder that diffusers' save_pretrained wrote, OWNER/NAME of the hub, or a .safetensors file"
DAMAGED = "copy or download it again"


def fetch(name: str, patterns: Sequence[str] = FILES) -> Path:
    """The local folder of a hub's model, `OWNER/NAME`; its files are downloaded if they are missing.

    Args:
        patterns: the files; of weights in several variants only those without one, where there are such.

    Raises:
        VdiffError: the hub cannot be reached or refuses the model.
    """
    is_there, files = hub_answers(), list(patterns)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=files, ignore_patterns=VARIANTS))
        if any(path.name.endswith(".safetensors") for path in folder.rglob("*")) or patterns is not FILES:
            return folder
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the type depends on the versions of huggingface_hub and of its HTTP library
        raise VdiffError(
            f"{name}: no such folder, and the hub does not "
            + (f"provide it ({cause_of(error)})" if is_there else "answer"),
            "check the name and the network (private models need HF_TOKEN), or give a folder",
        ) from None


def find(source: str, patterns: Sequence[str] = FILES) -> tuple[Path, str]:
    """The folder or the safetensors file `source`, and the name that the checkpoint will keep of it.

    Args:
        patterns: see `fetch`.

    Raises:
        VdiffError: there is none, or `fetch` fails.
    """
    root = Path(source)
    if root.is_dir() or (root.is_file() and root.suffix == ".safetensors"):
        return root, root.resolve().name
    if root.exists():
        pickles = root.suffix in (".ckpt", ".pt", ".pth", ".bin")
        raise VdiffError(f"{source} is a {'pickle, and pickles are never read' if pickles else 'file'}", NOT_THEIRS)
    owner, _, name = source.partition("/")
    if not owner or not name or "/" in name or owner.startswith((".", "~")):
        raise VdiffError(f"{source}: no such folder", NOT_THEIRS)
    return fetch(source, patterns), source


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files of the network: one, or its parts; of several variants, the plain one."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    indices = sorted(folder.glob(PARTS_PATTERN))
    found = [path for path in sorted(folder.glob(WEIGHTS_PATTERN)) if "-of-" not in path.name]
    if indices and (len(indices) == 1 or indices[0].name == f"{WEIGHTS}.index.json"):
        index = JsonFile.read(indices[0], DAMAGED)
        parts = index.get("weight_map")
        names = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
        if not names or not all(fnmatch(name, WEIGHTS_PATTERN) and Path(name).name == name for name in names):
            raise index.refusal("weight_map", f"need names of the form {WEIGHTS_PATTERN}")
        found = [folder / name for name in names]
    elif not found:
        raise VdiffError(
            f"{folder / WEIGHTS} is missing",
            "vdiff never reads weights in pickles (.bin): save the pipeline again as safetensors, with diffusers",
        )
    elif len(found) > 1:
        raise VdiffError(f"{folder} has {' and '.join(path.name for path in found)}", f"rename one to {WEIGHTS}")
    return found


def read_weights(
    files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors of safetensors files, after checking that their names and shapes are `shapes`.

    Args:
        ignored: names of others that may be there.

    Raises:
        VdiffError: a file cannot be read, or holds other tensors.
    """
    found = {current_name(name): shape for path in files for name, shape in read_shapes(path).items()}
    if difference := _difference(shapes, {name: shape for name, shape in found.items() if name not in ignored}):
        raise VdiffError(f"{files[0]} does not fit {CONFIG}: {difference}", DAMAGED)
    tensors = {current_name(name): tensor for path in files for name, tensor in read_tensors(path).items()}
    return {name: tensors[name] for name in shapes}


def _difference(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Why `found` does not fit, in a few words; empty if it fits."""
    for count, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            return f"{len(names)} tensors {count} ({min(names)[:80]}, …)"
    for name, shape in expected.items():
        if found[name] != shape:
            return f"{name} is {found[name]}, not {shape}"
    return ""
