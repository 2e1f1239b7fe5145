"""A figure as SVG inside an HTML page: in the page's colours, as wide as there is room, and nothing that reaches outside it."""

from __future__ import annotations

import hashlib
import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def themed_svg(figure: Figure, summary: str) -> str:
    """The figure as SVG for an HTML page, light or dark, as wide as there is room, with ``summary`` as its title.

    Black becomes the colour of the page's text, white is left out. Ids carry a checksum, so that figures of one page do not meet.
    """
    import matplotlib

    drawn = io.StringIO()
    settings = {"svg.hashsalt": "switchkd", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(settings):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    prefix = f"f{hashlib.sha256((text + summary).encode()).hexdigest()[:10]}-"
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # the style sheet would reach the whole page
                parent.remove(child)
    for element in root.iter():
        _theme(element, prefix, used)
    title = ElementTree.Element("title")
    title.text = summary
    root.insert(0, title)
    box = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": root.attrib["viewBox"], "width": "100%"}
    root.attrib = {**box, "role": "img", "aria-label": summary, "fill": "currentColor", "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")


def _theme(element: ElementTree.Element, prefix: str, used: set[str]) -> None:
    """Take namespaces, white space, ids that nobody names, needless digits and fixed black and white from an element."""
    element.tag, element.tail = element.tag.split("}")[-1], None
    element.text = element.text if (element.text or "").strip() else None
    themed = {}
    for name, value in ((name.split("}")[-1], value) for name, value in element.attrib.items()):
        if name == "id":
            if value not in used:
                continue
            value = prefix + value
        elif name == "d":
            value = re.sub(r"(\.\d\d)\d+", r"\1", value).replace(" \n", " ")
        elif name in ("href", "clip-path"):
            value = value.replace("#", f"#{prefix}")
        elif name == "style":
            value = value.replace("#000000", "currentColor").replace("#ffffff", "none")
        themed[name] = value
    element.attrib = themed
