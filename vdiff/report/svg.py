"""A figure of matplotlib as SVG that belongs to the page: its colours, its font, names of its own, words for all."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from vdiff.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = 6
INK, SOFT, LINE, CARD = "#010203", "#010204", "#010205", "#010206"
COLOURS = {INK: "ink", SOFT: "soft", LINE: "line", CARD: "card"}
"""Colours that a figure is drawn with, and the custom properties of the page that stand for them."""
NAMESPACE = re.compile(r"\{[^}]*\}")
REFERENCE = re.compile(r"url\(#([^)]+)\)")
FONT = re.compile(r"'DejaVu Sans'[^;\"]*")


def series(k: int) -> str:
    """The colour of curve `k`; it stands for `--s0`, `--s1` …"""
    return f"#0102{0x10 + k % SERIES:02x}"


def to_svg(figure: Figure, *, name: str, title: str, description: str, told: Mapping[str, Sequence[str]]) -> str:
    """The figure as an element of an HTML page.

    Args:
        name: unlike that of any other figure of the page.
        title, description: what a reader who does not see it is told.
        told: for each group of markers, by its gid, what is said of them one by one when they are pointed at.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = NAMESPACE.sub("", element.tag)
        for key in list(element.attrib):
            element.set(NAMESPACE.sub("", key), _of_the_page(element.attrib.pop(key), name))
    _tell(root, told)
    _rename(root, name)
    for element in root.findall("metadata"):
        root.remove(element)
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "xmlns": "http://www.w3.org/2000/svg",
    }
    for tag, text in (("desc", description), ("title", title)):
        words = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        words.text = printable(text)
        root.insert(0, words)
    return ElementTree.tostring(root, encoding="unicode")


def _of_the_page(value: str, name: str) -> str:
    """A value with the page's colours and font, and references to this figure's own definitions."""
    for colour, variable in {**COLOURS, **{series(k): f"s{k}" for k in range(SERIES)}}.items():
        value = value.replace(colour, f"var(--{variable})")
    return REFERENCE.sub(rf"url(#{name}-\1)", FONT.sub("var(--sans)", value))


def _tell(root: ElementTree.Element, told: Mapping[str, Sequence[str]]) -> None:
    for group in root.iter("g"):
        for marker, words in zip(list(group.iter("use")), told.get(group.get("id", ""), ()), strict=False):
            ElementTree.SubElement(marker, "title").text = printable(words)


def _rename(root: ElementTree.Element, name: str) -> None:
    """Names that are referred to get the figure's own prefix; the others go."""
    for element in root.iter():
        if (target := element.get("href", "")).startswith("#"):
            element.set("href", f"#{name}-{target[1:]}")
    text = ElementTree.tostring(root, encoding="unicode")
    for element in root.iter():
        if old := element.attrib.pop("id", ""):
            new = f"{name}-{old}"
            if f"url(#{new})" in text or f'"#{new}"' in text:
                element.set("id", new)
