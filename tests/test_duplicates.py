"""Nothing in the package is there twice, and nothing is there for nobody."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "vdiff").rglob("*.py"))
}
MOST_EQUAL_LINES = 12
LEAST_NODES = 25
"""Functions that are smaller may be alike by chance."""
CALLED_BY_OTHERS = {
    *("list_commands", "get_command", "resolve_command", "format_commands", "format_options"),  # Click
    *("get_metavar", "get_error_hint", "get_invalid_choice_message", "parse_args", "invoke", "convert"),
    *("onnx_command", "torch_command", "weights_command", "diffusers_command", "lora_command"),
    *("single_file_command", "web_command", "k_diffusion"),
    *("end_headers", "send_head", "list_directory", "log_message", "handle_error"),  # http.server
    "_repr_png_",  # notebooks
}


def classes() -> Iterator[tuple[str, str]]:
    """Name and place of every class."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield node.name, f"{path}:{node.lineno}"


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Place and definition of every function."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{path}:{node.lineno} {node.name}", node


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    """What a function does."""
    return body[1:] if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else body


class Renamed(ast.NodeTransformer):
    """Variables are numbered in the order in which they come, and an error's words are left out."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.names.setdefault(node.id, f"v{len(self.names)}"), node.ctx)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Tuple:
        return ast.Tuple([self.visit(part) for part in node.values], ast.Load())

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(self.visit(kind) if kind else None, None)


def test_no_class_name_is_there_twice():
    places = defaultdict(list)
    for name, place in classes():
        places[name].append(place)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_function_is_there_twice():
    alike = defaultdict(list)
    for place, function in functions():
        body = ast.parse("\n".join(map(ast.unparse, without_docstring(function.body)))) if function.body[1:] else None
        if body is not None and len(list(ast.walk(body))) >= LEAST_NODES:
            alike[ast.dump(Renamed().visit(body))].append(place)
    assert [places for places in alike.values() if len(places) > 1] == []


def blocks(path: str) -> Iterator[tuple[str, int]]:
    """Every run of `MOST_EQUAL_LINES` + 1 lines of code, and the line that it begins at."""
    text = (ROOT / path).read_text(encoding="utf-8").splitlines()
    skipped = {
        number
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = [(n, line.strip()) for n, line in enumerate(text, 1) if line.strip() and n not in skipped]
    for start in range(len(lines) - MOST_EQUAL_LINES):
        run = lines[start : start + MOST_EQUAL_LINES + 1]
        yield "\n".join(line for _, line in run), run[0][0]


def test_no_block_of_lines_is_copied():
    places = defaultdict(list)
    for path in TREES:
        for block, line in blocks(path):
            places[block].append(f"{path}:{line}")
    assert [found for found in places.values() if len(found) > 1] == []


def used_names() -> Counter[str]:
    """How often each name is read: variables, attributes, keywords, names in short texts, and in the report's page."""
    used: Counter[str] = Counter()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used[node.id] += 1
            elif isinstance(node, ast.Attribute):
                used[node.attr] += 1
            elif isinstance(node, ast.keyword) and node.arg:
                used[node.arg] += 1
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
                used.update(re.findall(r"[A-Za-z_]\w*", node.value))
    for path in (ROOT / "vdiff").rglob("*.html"):
        used.update(re.findall(r"[A-Za-z_]\w*", path.read_text(encoding="utf-8")))
    return used


def defined_names() -> Iterator[tuple[str, str]]:
    """Functions, classes, constants of modules and fields of classes, and where they are."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name, f"{path}:{node.lineno}"
            if isinstance(node, ast.ClassDef | ast.Module):
                for child in node.body:
                    targets = child.targets if isinstance(child, ast.Assign) else []
                    targets = [child.target] if isinstance(child, ast.AnnAssign) else targets
                    for name in (each for target in targets for each in ast.walk(target)):
                        if isinstance(name, ast.Name):
                            yield name.id, f"{path}:{child.lineno}"


def test_everything_is_used():
    """By the package itself; what tests alone use is none of its business."""
    used = used_names()
    unused = [
        (name, place)
        for name, place in defined_names()
        if not used[name] and not name.startswith("__") and name not in CALLED_BY_OTHERS
    ]
    assert unused == []


@pytest.mark.parametrize(
    ("one", "other", "are_alike"),
    [
        ("a = f(x)\nreturn a + 1", "b = f(y)\nreturn b + 1", True),
        ("raise E(f'{x}: no')", "raise E('yes')", True),
        ("return f'{a}: no'", "return f'{b}: no'", True),
        ("return f'{a}: no'", "return f'{a}: yes'", False),
        ("return a - b", "return a + b", False),
        ("return a - b", "return b - b", False),
    ],
)
def test_near_copies_are_seen(one, other, are_alike):
    one, other = (ast.dump(Renamed().visit(ast.parse(text))) for text in (one, other))
    assert (one == other) == are_alike
