"""Elements of a page from an SVG file of Matplotlib: one panel each, in the page's own colours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from xml.etree import ElementTree

from tir_kernels.analysis.figures.panels import Chart
from tir_kernels.analysis.figures.styles import SHADES

Place = tuple[float, ...]  # left, top, width and height in points
Element = ElementTree.Element

FONT = "DejaVu Sans"  # comes with Matplotlib, so that text is as wide on every machine
PANEL, TITLE = "panel {}", "title"  # identifiers of groups in the file

_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_PROPERTIES = {each.light: f"var(--{each.name}, {each.light})" for each in SHADES}
_COLOUR = re.compile("|".join(_PROPERTIES))
_DECIMALS = re.compile(r"-?\d+\.\d+")
_CURVE = re.compile("[^MLz0-9. -]")


def page_elements(source: bytes, chart: Chart, places: Sequence[Place]) -> list[str]:
    """The panels of a file as SVG elements, with all they refer to and no name that another has.

    Args:
        source: SVG file of the chart.
        chart: The chart.
        places: Place of each panel in the file.
    """
    file = ElementTree.fromstring(source)
    shapes = {each.get("id"): each for defs in file.iter(_tag("defs")) for each in defs}
    groups = {each.get("id"): each for each in file.iter(_tag("g"))}
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _HREF[1:].partition("}")[0])
    elements = []
    for number, (panel, place) in enumerate(zip(chart.panels, places, strict=True)):
        root = ElementTree.Element(_tag("svg"), viewBox=" ".join(f"{each:.2f}" for each in place))
        root.set("role", "img")
        root.set("aria-label", panel.title)
        root.append(ElementTree.Element(_tag("defs")))
        root.append(groups[PANEL.format(number)])
        _complete(root, shapes, f"{chart.name}-{number}")
        elements.append(ElementTree.tostring(root, encoding="unicode"))
    return elements


def _complete(root: Element, shapes: Mapping[str | None, Element], prefix: str) -> None:
    """Define what a panel's group refers to, under names of its own, and tidy the element.

    Args:
        root: Element of the panel, which holds a place for definitions and the group.
        shapes: Identifier -> what the file defines.
        prefix: Of its new identifiers.
    """
    defs, group = root
    for element in list(group.iter()):
        for child in list(element):
            if child.tag == _tag("defs") or child.get("id") == TITLE:
                element.remove(child)
    names: dict[str, str] = {}
    for element, key, name in list(_references(group)):
        if name not in names:
            names[name] = f"{prefix}-{len(names)}"
            shape = deepcopy(shapes[name])
            shape.set("id", names[name])
            defs.append(shape)
        element.set(key, element.attrib[key].replace(f"#{name}", f"#{names[name]}"))
    for element in root.iter():
        _tidy(element, set(names.values()))


def _tag(name: str) -> str:
    return f"{{{_SVG}}}{name}"


def _references(group: Element) -> Iterator[tuple[Element, str, str]]:
    """Element, attribute and identifier of each reference."""
    for element in group.iter():
        for key in (_HREF, "clip-path"):
            if match := re.search(r"#(\w+)", element.get(key, "")):
                yield element, key, match[1]


def _tidy(element: Element, kept: set[str]) -> None:
    """Give an element the page's colours and font, and take what only Matplotlib needs."""
    element.tail = None
    if element.tag != _tag("text"):
        element.text = None
    if element.get("id") not in kept:
        element.attrib.pop("id", None)
    for key in ("style", "fill", "stroke"):
        if key in element.attrib:
            style = _COLOUR.sub(lambda match: _PROPERTIES[match[0]], element.attrib[key])
            element.set(key, style.replace(f"'{FONT}'", f"var(--figure-font, '{FONT}')"))
    for key in ("d", "x", "y", "transform"):
        if key in element.attrib:
            element.set(key, _DECIMALS.sub(_rounded, element.attrib[key]))
    if "d" in element.attrib:
        element.set("d", _shorter(element.attrib["d"]))


def _shorter(path: str) -> str:
    """A path without what is understood: after a point, another one is a line to it."""
    path = " ".join(path.split())
    return path.replace(" L ", " ") if not _CURVE.search(path) else path


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.1f}".removesuffix(".0")
