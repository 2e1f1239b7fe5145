"""The house keeps its shape: rooms in layers, imports that point downwards, no circle, nothing that has grown too large."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import switchkd

PACKAGE = Path(switchkd.__file__).parent
DOCS = PACKAGE.parent / "docs"
spec = importlib.util.spec_from_file_location("draw_architecture", DOCS / "draw_architecture.py")
drawn = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drawn)
# From the ground up. A room imports from the rooms before it, also inside functions and for typing.
ROOMS = (
    "base", "methods", "data", "runner", "forward", "crossing", "decoding", "models", "teachers", "writing", "evaluation",
    "training", "reports", "runs", "api", "studies", "findings", "cli",
)  # fmt: skip


def modules(package=PACKAGE):
    """The files of a package by module name, ``switchkd.room`` for a room's ``__init__``."""
    parts = {file: file.relative_to(package.parent).with_suffix("").parts for file in sorted(package.rglob("*.py"))}
    return {".".join(own).removesuffix(".__init__"): file for file, own in parts.items()}


def imports(files):
    """Which modules of the package each of them imports."""
    found = {name: drawn.imported(file.read_text(encoding="utf-8")) for name, file in files.items()}
    return {name: (own & set(files)) - {name} for name, own in found.items()}


def wrong_way(graph):
    """Imports from a higher room, or from the package's face, whose job it is to hand names to others."""
    floor = {f"switchkd.{room}": height for height, room in enumerate(ROOMS)}

    def height(name):
        return floor.get(".".join(name.split(".")[:2]), len(ROOMS))

    return [(name, other) for name, own in graph.items() for other in own if height(other) > height(name)]


def circle(graph):
    """Modules that import each other in a loop, if some do."""
    open_, done = [], set()

    def visit(name):
        if name in open_:
            return open_[open_.index(name) :]
        if name in done:
            return []
        open_.append(name)
        found = next((loop for other in sorted(graph[name]) if (loop := visit(other))), [])
        open_.pop()
        done.add(name)
        return found

    return next((loop for name in graph if (loop := visit(name))), [])


def test_imports_point_downwards_and_make_no_circle():
    graph = imports(modules())
    assert wrong_way(graph) == []
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("methods/mixes.py", "from switchkd.training.loss import total"),
        ("methods/mixes.py", "def f():\n    import switchkd.cli.main"),
        (
            "data/texts.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from switchkd.models.pair import Pair",
        ),
        ("base/errors.py", "from switchkd import load_pair"),
        ("base/errors.py", "from switchkd.base.plain import shown"),
    ],
)
def test_an_import_that_points_upwards_or_back_is_seen(place, line):
    files = modules()
    graph = imports(files)
    name = next(name for name, file in files.items() if file == PACKAGE / place)
    graph[name] |= drawn.imported(line) & set(files)
    assert wrong_way(graph) or circle(graph)


def test_rooms_and_files_stay_small():
    assert sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))) == sorted(ROOMS)
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 4
    for room in ROOMS:
        files = [path for path in (PACKAGE / room).glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 10, f"{room} has {len(files)} files"
    long = {name: lines for name, file in modules().items() if (lines := len(file.read_text().splitlines())) > 400}
    assert not long


def test_every_room_and_file_says_what_it_is():
    for name, file in modules().items():
        words = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        assert words and len(words) > 15, f"{name} does not say what it is"
        if file.name == "__init__.py" and name != "switchkd":
            assert "In come" in words and "out " in words, f"{name} does not say what comes in and what goes out"


def test_the_package_shows_its_public_names_alone():
    code = "import switchkd; print(*dir(switchkd))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert shown == sorted(switchkd.__all__)
    assert all(getattr(switchkd, name) is not None for name in switchkd.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_the_page_on_the_house_names_the_rooms_in_their_order():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    places = [text.index(f"**{room}**") for room in reversed(ROOMS)]
    assert places == sorted(places)


def test_the_drawing_is_of_these_imports():
    assert list(drawn.rooms()) == list(reversed(ROOMS))
    assert (DOCS / "architecture.svg").read_text(encoding="utf-8") == drawn.drawing(), "run docs/draw_architecture.py"
