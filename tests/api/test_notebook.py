"""The notebook of examples/ runs from its first cell to its last, and shows who wrote which token."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "distil.ipynb"


def texts(cell, kind):
    """What a cell shows of one kind."""
    return "".join("".join(output.get("data", {}).get(kind, "")) for output in cell.outputs)


def check(notebook):
    shown = {cell.source.partition("\n")[0]: cell for cell in notebook.cells if cell.cell_type == "code"}
    steps = "".join(output.get("text", "") for output in shown["from switchkd import distil"].outputs)
    assert [line.partition(":")[0] for line in steps.splitlines() if line.startswith("step")] == [
        f"step {n}" for n in range(1, 5)
    ]
    html = texts(shown["run.rollouts(3)"], "text/html")
    assert html.count("<pre") == 6 and "Marked" in html and "divergence" in html
    assert "'report.html'" in texts(shown["run.report().name"], "text/plain")
    assert not any(output.output_type == "error" for cell in shown.values() for output in cell.outputs)


@pytest.mark.demo_pair
def test_the_notebook_runs_and_shows_its_output(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check(notebook)  # as it is kept
    assert not re.search(r"/(home|tmp|root|Users|site-packages)/", NOTEBOOK.read_text()), (
        "no place of a machine stands in it"
    )
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[], execution_count=None)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check(notebook)
