"""The graph as a matplotlib figure: what passes forward above the wires, what comes back below.

The layout is that of the page. Along the top runs the way of every value by itself; the mean and
the variance are two detours from it, which all examples of the batch take together.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bn_cy.graph.records import Edge
    from bn_cy.graph.trace import Trace

__all__ = ["PLACES", "draw"]

# Column and row of every node.
PLACES = {
    "x": (0, 0), "xmu": (1, 0), "xhat": (2, 0), "gammax": (3, 0), "out": (4, 0),
    "mu": (0, 1), "sq": (1, 1), "ivar": (2, 1), "gamma": (3, 1), "beta": (4, 1),
    "var": (1, 2), "sqrtvar": (2, 2),
}  # fmt: skip
WIDTH = 1.35  # of a column, in heights of a row
FORWARD = "#1f5fa8"
BACKWARD = "#c8501e"
APART = 0.05  # of the two arrows of a wire, from its middle


def draw(trace: "Trace", ax: "Axes | None" = None) -> "Axes":
    """Draw the graph; see `Trace.draw`."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Trace.draw needs {error.name}: pip install matplotlib", name=error.name
        ) from error
    if ax is None:
        ax = plt.subplots(figsize=(13, 5.5), layout="constrained")[1]
    ax.set(xlim=(-0.5, 6.2), ylim=(2.3, -0.4), aspect="equal")
    ax.set_axis_off()
    for edge in trace.edges:
        _draw_edge(ax, edge)
    meetings = {meeting.node for meeting in trace.meetings}
    for node in trace.nodes:
        style = {
            "boxstyle": "round,pad=0.5",
            "facecolor": "white",
            "edgecolor": BACKWARD if node.name in meetings else "0.6",
            "linewidth": 2 if node.name in meetings else 1,
        }
        text = "\n= ".join(node.formula.split(" = "))
        x, y = _place(node.name)
        ax.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style)
    _draw_ends(ax, trace)
    return ax


def _draw_edge(ax: "Axes", edge: "Edge") -> None:
    """Draw an arrow beside the middle of its wire, and what passes with its norm."""
    start, end = _place(edge.source), _place(edge.target)
    along = (end - start) / np.linalg.norm(end - start)
    # Forward lies to the left of the way forward and backward to the left of the way back, but the
    # axis of rows points down: so values are above the wires that run to the right.
    side = np.array([along[1], -along[0]])
    upright, level = abs(along[0]) < 0.5, abs(along[1]) < 0.5
    gap = (0.2 if upright else 0.42) * along
    start, end = start + gap + APART * side, end - gap + APART * side
    colour = FORWARD if edge.direction == "forward" else BACKWARD
    _draw_arrow(ax, start, end, colour)
    x, y = (start + end) / 2 + (0.03 if upright else 0.05) * side
    ax.text(
        x,
        y,
        _label(edge.name, edge.value),
        color=colour,
        fontsize=8,
        ha="center" if level else "left" if side[0] > 0 else "right",
        va="center" if upright else "bottom" if side[1] < 0 else "top",
    )


def _draw_ends(ax: "Axes", trace: "Trace") -> None:
    """Draw the gradient that comes from the loss, and say what the colours mean."""
    x, y = _place("out")
    _draw_arrow(ax, (x + 0.8, y), (x + 0.42, y), BACKWARD)
    label = _label("dout", trace.dout)
    ax.text(x + 0.6, y + 0.04, label, color=BACKWARD, fontsize=8, ha="center", va="top")
    ax.text(3.7, 1.95, "forward: a value, its shape and norm", color=FORWARD)
    ax.text(3.7, 2.15, "backward: a gradient, its shape and norm", color=BACKWARD)


def _place(name: str) -> NDArray[Any]:
    column, row = PLACES[name]
    return np.array([WIDTH * column, row])


def _draw_arrow(ax: "Axes", start: Any, end: Any, colour: str) -> None:
    style = {"arrowstyle": "->", "color": colour, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)


def _label(name: str, value: Any) -> str:
    return f"{name} {list(value.shape)}\n{np.linalg.norm(value):.3g}"
