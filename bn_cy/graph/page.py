"""A `Trace` as a page: one file that needs no network and computes everything itself.

The page is `assets/page.html` with its style and scripts put in, and with the graph of `steps` and
the numbers of the trace as JSON. The scripts, in the order in which they need each other::

    arithmetic.js  the passes, differences, what the exhibits show; the twin of sequential.py
    typeset.js     formulas as MathML, numbers as text
    state.js       what the reader may change, and the address it is written into
    drawing.js     the graph as SVG
    lesson.js      the order of the lesson, and each step with the reader's numbers
    exhibits.js    bars, the Jacobian, the mistakes, the variances
    tables.js      heat maps, and the tables of inputs
    inspector.js   a node in detail, and predictions
    page.js        shows the state, and changes it as the reader does
"""

import json
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bn_cy.graph.steps import STEPS

if TYPE_CHECKING:
    from bn_cy.graph.trace import Trace

__all__ = ["MAX_EXAMPLES", "MAX_FEATURES", "write"]

MAX_EXAMPLES, MAX_FEATURES = 64, 16  # LIMITS in state.js
SCRIPTS = (
    "arithmetic",
    "typeset",
    "state",
    "drawing",
    "lesson",
    "exhibits",
    "tables",
    "inspector",
    "page",
)


def write(trace: "Trace", path: str | PathLike[str]) -> None:
    """Write the page; see `Trace.to_html`."""
    features = trace.dbeta.size
    if trace.count > MAX_EXAMPLES or features > MAX_FEATURES:
        raise ValueError(
            f"the page shows up to {MAX_EXAMPLES} examples of {MAX_FEATURES} features, "
            f"got {trace.count} of {features}"
        )
    page = _asset("page.html")
    # No asset holds another's mark, so the order does not matter.
    page = page.replace("{{css}}", _asset("page.css"))
    page = page.replace("{{js}}", "\n".join(_asset(f"{name}.js") for name in SCRIPTS))
    page = page.replace("{{graph}}", json.dumps(_graph(trace)).replace("<", "\\u003c"))
    Path(path).write_text(page, encoding="utf-8")


def _asset(name: str) -> str:
    return (resources.files("bn_cy.graph") / "assets" / name).read_text(encoding="utf-8")


def _graph(trace: "Trace") -> dict[str, Any]:
    """Say what the scripts need to know: nodes, wires, numbers."""

    def rows(array: NDArray[Any]) -> Any:
        if array.ndim > 1:
            array = np.moveaxis(array, trace.axis, -1).reshape(trace.count, -1)
        return array.tolist()

    arrays = {name: trace.nodes[name].value for name in ("x", "gamma", "beta")}
    arrays["dout"] = trace.dout
    return {
        "nodes": [
            {"name": node.name, "step": node.step, "formula": node.formula} for node in trace.nodes
        ],
        "wires": [{"target": step.name, **wire._asdict()} for step in STEPS for wire in step.wires],
        "numbers": {name: rows(array) for name, array in arrays.items()} | {"eps": trace.eps},
        "float32": trace.dx.dtype == np.float32,
    }
