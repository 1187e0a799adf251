"""The two passes of a `Trace` as lines of text, for a terminal."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bn_cy.graph.steps import STEPS

if TYPE_CHECKING:
    from bn_cy.graph.trace import Trace

__all__ = ["table"]

Array = NDArray[Any]

SHOWN = 3  # features in a line


def table(trace: "Trace") -> str:
    """Return the steps of both passes, each with its formula, shape and first numbers."""
    shape, axis = trace.dx.shape, trace.axis
    first = ", ".join(":" if k == axis else "0" for k in range(len(shape)))

    def line(number: int | str, formula: str, array: Array, note: str = "") -> str:
        per_value = array.ndim > 1
        row = np.moveaxis(array, axis, -1)[(0,) * (array.ndim - 1)] if per_value else array
        numbers = " ".join(f"{value:10.4g}" for value in row[:SHOWN])
        more = " ..." if len(row) > SHOWN else ""
        line = f"{number or '':>2}  {formula:<30}{array.shape!s:<{width}}{numbers}{more}{note}"
        return line.rstrip()

    width = max(len(str(shape)), 4) + 2
    forward = [line(node.step, node.formula, node.value) for node in trace.nodes]
    backward = [line("", "dout", trace.dout)]
    meetings = {meeting.node: meeting for meeting in trace.meetings}

    def meet(name: str) -> str:
        meeting = meetings[name]
        return line("+", f"{meeting.name} = {' + '.join(meeting.parts)}", meeting.total)

    for number, step in reversed(list(enumerate(STEPS, 1))):
        if step.name in meetings:
            backward.append(meet(step.name))
        for k, wire in enumerate(step.wires):
            gradient = trace.nodes[step.name].leaving[wire.gradient]
            backward.append(line("" if k else number, f"{wire.gradient} = {wire.rule}", gradient))
    backward.append(meet("x"))

    return "\n".join(
        [
            f"batch norm of x, {shape} with features along axis {axis}: "
            f"n = {trace.count}, eps = {trace.eps:g}, {trace.dx.dtype}",
            f"The numbers are those of the example x[{first}]. Where there is a +, gradients meet.",
            "",
            "forward",
            *forward,
            "",
            "backward",
            *backward,
        ]
    )
