"""The notebook, run from top to bottom: its solutions are right. It is committed without outputs.

It is run where nbclient and a kernel are installed: pip install ".[notebook]".
"""

import json
import re

import pytest
from test_examples import EXAMPLES

NOTEBOOK = EXAMPLES / "backprop.ipynb"


def cells_of(notebook, tag=None):
    """The cells of code, all or those with a tag."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in cells if tag is None or tag in cell["metadata"].get("tags", [])]


def printed(cell):
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@pytest.fixture(scope="module")
def executed():
    """Give the notebook as it is after a run."""
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return notebook


def test_no_output_is_committed():
    for cell in cells_of(json.loads(NOTEBOOK.read_text("utf-8"))):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_every_turn_has_a_solution_after_it():
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    tags = [tag for cell in cells_of(notebook) for tag in cell["metadata"].get("tags", [])]
    assert tags == ["your-turn", "solution"] * (len(tags) // 2)
    assert len(tags) >= 14


def test_every_solution_is_right(executed):
    verdicts = re.findall(
        r"^(\w+) +exact: .*?approximate: (\w+)",
        "".join(map(printed, cells_of(executed))),
        re.MULTILINE,
    )
    assert len(verdicts) > 30
    # The one that is wrong on purpose.
    assert [name for name, right in verdicts if right == "no"] == ["eval_dx"]


def test_what_a_student_has_not_done_is_open(executed):
    turns = "".join(map(printed, cells_of(executed, "your-turn")))
    assert turns.count("still open") == len(turns.splitlines()) > 20


def test_ones_find_fewer_mistakes(executed):
    text = "".join(map(printed, cells_of(executed)))
    found = re.findall(r"found: (\w+) +with ones: (\w+)$", text, re.MULTILINE)
    assert {random for random, _ in found} == {"True"}
    assert {ones for _, ones in found} == {"True", "False"}


def test_the_right_gradient_learns_more(executed):
    text = "".join(map(printed, cells_of(executed)))
    losses = {
        name: float(last) for name, last in re.findall(r"(\w+) +loss .*: ([\d.]+)$", text, re.M)
    }
    assert losses["solved"] == losses["bn_cy"] < losses["mine"] / 2
