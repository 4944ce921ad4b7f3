"""The rooms of the house: who may import whom, what stays free of torch, and that everything public says what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "vdiff").rglob("*.py"))
}


def table() -> dict[str, list[str]]:
    """The rooms of ARCHITECTURE.md and what each may import, as modules."""
    found: dict[str, list[str]] = {}
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for line in text.split("## Rooms")[1].split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            room = "vdiff." + cells[0].strip("`").removeprefix("vdiff/").removesuffix("/").removesuffix(".py")
            found[room] = [name.strip().replace("/", ".") for name in cells[2].split(",") if name.strip() != "–"]
    return found


TABLE = table()
FILES = [room for room in TABLE if (ROOT / room.replace(".", "/")).with_suffix(".py").is_file()]
BASE = [room for room in FILES if not room.startswith("vdiff.api")]
WITHOUT_TORCH = [name for name in BASE if name != "vdiff.distributed"]
DIFFUSION = [
    f"vdiff.diffusion.{name}"
    for name in (
        "schedules",
        "prediction",
        "weighting",
        "grids",
        "stepping",
        "multistep",
        "samplers",
        "targets",
        "phases",
    )
]
METHODS = [f"vdiff.diffusion.{name}" for name in ("method", "continuous", "scm", "ect", "meanflow")]


def of_room(room: str, names: list[str]) -> list[str]:
    """The modules that the table's last column means; a room may import itself, and the package's version."""
    if names == ["everything"]:
        return ["vdiff.*", "vdiff"]
    listed = [each for name in names for each in (BASE if name == "foot" else [f"vdiff.{name}"])]
    return listed if room in BASE else [room, *listed, "vdiff"]


MODELS = (
    *(
        "codec",
        "condition",
        "unet_config",
        "backbone",
        "adapters",
        "unet",
        "song_config",
        "song_unet",
        "edm2_config",
        "edm2_unet",
        "lucid_config",
        "lucid_unet",
        "image_v1_config",
        "image_v1_unet",
        "diffusers_names",
        "wrapped",
        "components",
        "text",
        "tokenizing",
        "autoencoder",
    ),
    *(
        "kinds",
        "inheriting",
        "reading",
        "program",
        "denoiser",
        "checkpoint",
        "prompting",
        "flops",
        "checks",
        "drawing",
        "speed",
    ),
)
LAYERS = [f"vdiff.models.{name}" for name in MODELS]
MAY_IMPORT = {
    "vdiff": ["vdiff.api", "vdiff.api_training"],
    "vdiff.__main__": ["vdiff.cli"],
    **{room: of_room(room, names) for room, names in TABLE.items()},
    "vdiff.diffusion.schedules": [],
    "vdiff.diffusion.weighting": [],
    "vdiff.diffusion.noise": [],
    "vdiff.diffusion.prediction": DIFFUSION[:1],
    "vdiff.diffusion.grids": DIFFUSION[:1],
    "vdiff.diffusion.stepping": [*DIFFUSION[:2], "vdiff.settings"],
    "vdiff.diffusion.multistep": [*DIFFUSION[:2], "vdiff.diffusion.stepping", "vdiff.settings"],
    "vdiff.diffusion.samplers": [*DIFFUSION[:6], "vdiff.settings"],
    "vdiff.diffusion.targets": DIFFUSION[:7],
    "vdiff.diffusion.phases": [],
    **{
        method: [*DIFFUSION, *METHODS[:2], "vdiff.diffusion.log_weight", "vdiff.errors", "vdiff.settings"]
        for method in METHODS
    },
    "vdiff.diffusion.method": DIFFUSION[:2],
    "vdiff.diffusion.distillation": [*DIFFUSION, *METHODS, "vdiff.errors", "vdiff.settings"],
    **{f"vdiff.models.{name}": [*LAYERS[:k], "vdiff.diffusion", *BASE, "vdiff"] for k, name in enumerate(MODELS)},
    "vdiff.models.unet": LAYERS[:4],
}
"""Module or room (the nearest entry above a module rules it) → what it may import of vdiff: the rooms as the table of
ARCHITECTURE.md has them, and an order within diffusion and models.

"vdiff" is the package alone, for its version and for `vdiff.load`, which imports the rest when it is called.
"""


def imports(path: Path, module: str) -> set[str]:
    """Every module of vdiff that `path` imports anywhere, also inside functions and for type checking."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {name for name in found if name.split(".")[0] == "vdiff"}


def rule(module: str) -> list[str]:
    while module not in MAY_IMPORT:
        module = module.rpartition(".")[0]
        assert module != "vdiff", "a new room needs a line in MAY_IMPORT"
    return MAY_IMPORT[module]


def is_allowed(target: str, allowed: list[str]) -> bool:
    return any(
        target == name or (name != "vdiff" and target.startswith(name.removesuffix("*").rstrip(".") + "."))
        for name in allowed
    )


@pytest.mark.parametrize("module", MODULES)
def test_arrows_run_downwards_only(module):
    allowed = rule(module)
    wrong = sorted(target for target in imports(MODULES[module], module) if not is_allowed(target, allowed))
    assert not wrong, f"{module} must not import {', '.join(wrong)}; it may import {allowed}"


def test_the_table_is_read_as_meant():
    assert {name.split(".")[1] for name in MODULES if "." in name} == {room.split(".")[1] for room in TABLE} | {
        "__main__"
    }
    assert MAY_IMPORT["vdiff.cli"] == ["vdiff.*", "vdiff"]
    assert MAY_IMPORT["vdiff.report"] == [
        "vdiff.report",
        "vdiff.evaluation",
        "vdiff.models",
        "vdiff.data.datasets",
        *BASE,
        "vdiff",
    ]
    assert (MAY_IMPORT["vdiff.files"], MAY_IMPORT["vdiff.errors"]) == (["vdiff.errors"], [])
    assert is_allowed("vdiff.models.unet", MAY_IMPORT["vdiff.training"])
    assert not is_allowed("vdiff.models.checkpoint", MAY_IMPORT["vdiff.models.denoiser"])
    assert not is_allowed("vdiff.cli.main", MAY_IMPORT["vdiff.models.checkpoint"])
    assert is_allowed("vdiff.anything.at_all", MAY_IMPORT["vdiff.cli"])
    neighbours = ("vdiff.training", "vdiff.interop", "vdiff.evaluation")
    for one in neighbours:
        assert not any(is_allowed(f"{other}.x", MAY_IMPORT[one]) for other in neighbours if other != one)


def test_imports_are_found_wherever_they_are(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        "import vdiff.errors\nfrom vdiff import files\nfrom vdiff import __version__\n"
        "def f():\n    from vdiff.models.unet import UNet\n    from . import schedules\n    from ..models import unet\n"
    )
    found = imports(path, "vdiff.diffusion.m")
    assert found == {"vdiff.errors", "vdiff.files", "vdiff", "vdiff.models.unet", "vdiff.diffusion.schedules"}


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def torch_at_import(path: Path) -> bool:
    """Whether importing the module runs an import of torch: outside functions and TYPE_CHECKING."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node):
            continue
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torch" for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            return True
        waiting += ast.iter_child_nodes(node)
    return False


CONFIGS = ("unet_config", "song_config", "edm2_config", "lucid_config", "image_v1_config")
DESCRIPTIONS = [f"vdiff.models.{name}" for name in ("checkpoint", "kinds", "reading", "codec", "condition", *CONFIGS)]
"""What reads a checkpoint's description."""
LIGHT = [
    *WITHOUT_TORCH,
    *DESCRIPTIONS,
    *(name for name in MODULES if name.startswith(("vdiff.diffusion", "vdiff.cli"))),
]


@pytest.mark.parametrize("module", LIGHT)
def test_torch_is_not_imported_at_module_level(module):
    assert not torch_at_import(MODULES[module])


def test_help_and_registries_come_without_torch():
    modules = ["vdiff", "vdiff.cli.main", *WITHOUT_TORCH, *DIFFUSION]
    code = (
        f"import sys, {', '.join(modules)}\n"
        "from vdiff.diffusion.samplers import SAMPLERS\n"
        "heavy = {'torch', 'numpy', 'torchvision', 'accelerate', 'PIL', 'safetensors', 'lmdb'} & set(sys.modules)\n"
        "print(sorted(heavy), list(SAMPLERS))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip()
        == "[] ['ddim', 'ddpm', 'consistency', 'clipped', 'dpmpp_2m', 'dpmpp_3m', 'unipc', 'ipndm', 'heun']"
    )


def undocumented(path: Path) -> list[str]:
    """Public functions, classes and methods without a docstring; `forward` and dunders are known by their class."""
    found = []

    def look(node: ast.Module | ast.ClassDef, prefix: str) -> None:
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if child.name.startswith("_") or child.name == "forward":
                continue
            if not ast.get_docstring(child):
                found.append(prefix + child.name)
            if isinstance(child, ast.ClassDef):
                look(child, f"{prefix}{child.name}.")

    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not ast.get_docstring(tree):
        found.append("the module")
    look(tree, "")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_says_what_it_is(module):
    assert undocumented(MODULES[module]) == []
