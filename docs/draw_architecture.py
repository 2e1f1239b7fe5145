"""Draws docs/architecture.svg from the package's own imports: `.venv/bin/python docs/draw_architecture.py`.

A line for each room, from the top floor down, with what its `__init__` says of it. A dot says that the
room of this line imports from the room of that column.
"""

import ast
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "switchkd"
LINE, LEFT, WORDS, CELL, TOP = 30, 100, 660, 26, 84


def rooms() -> dict[str, set[str]]:
    """What each room imports from, the rooms in an order in which imports point downwards, the top floor first."""
    names = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    graph = {name: set().union(*map(_imports, (PACKAGE / name).glob("*.py"))) & set(names) - {name} for name in names}
    order: dict[str, set[str]] = {}
    while len(order) < len(graph):
        # Of those that nobody above needs any more, the one that stands on most.
        free = [
            name for name in graph if name not in order and not any(name in graph[n] for n in graph if n not in order)
        ]
        top = max(free, key=lambda name: (len(_below(name, graph)), name))
        order[top] = graph[top]
    return order


def _below(name: str, graph: dict[str, set[str]]) -> set[str]:
    found = set(graph[name])
    for other in graph[name]:
        found |= _below(other, graph)
    return found


def imported(source: str) -> set[str]:
    """The dotted names that a file imports, or imports from, wherever in it an import stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "an import is relative, which nobody can follow"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def _imports(file: Path) -> set[str]:
    """The rooms that a file imports from."""
    names = imported(file.read_text(encoding="utf-8"))
    return {name.split(".")[1] for name in names if name.startswith("switchkd.")}


def drawing() -> str:
    """The picture, as SVG."""
    order = list(found := rooms())
    width, height = LEFT + WORDS + CELL * len(order) + 20, TOP + LINE * len(order) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for column, name in enumerate(order):
        x = LEFT + WORDS + CELL * column + CELL // 2
        parts.append(f'<text transform="translate({x + 4},{TOP - 12}) rotate(-60)" fill="#333">{name}</text>')
    for row, name in enumerate(order):
        y = TOP + LINE * row
        words = (
            ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))) or ""
        ).split("\n")[0]
        shade = "#f3f5f8" if row % 2 else "#fff"
        parts += [
            f'<rect x="10" y="{y}" width="{width - 20}" height="{LINE}" fill="{shade}"/>',
            f'<text x="18" y="{y + 20}" font-weight="bold" fill="#0072b2">{name}</text>',
            f'<text x="{LEFT}" y="{y + 20}" font-size="11.5" fill="#333">{escape(words)}</text>',
        ]
        for column, other in enumerate(order):
            x = LEFT + WORDS + CELL * column + CELL // 2
            if other == name:
                parts.append(f'<rect x="{x - 6}" y="{y + 9}" width="12" height="12" fill="#d5dbe3"/>')
            elif other in found[name]:
                parts.append(f'<circle cx="{x}" cy="{y + 15}" r="4.5" fill="#d55e00"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (PACKAGE.parent / "docs" / "architecture.svg").write_text(drawing(), encoding="utf-8")
