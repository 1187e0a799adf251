"""The nine steps of batch norm, each by itself: formula, local gradients, and as a function.

The names and the order are those of `bn_cy.reference.staged_forward` and `staged_backward`, whose
notes stand here as a table, in Python's syntax. The passes themselves are run by `reference`; the
functions are for differences, where one node is moved and what depends on it is computed again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["INPUTS", "STEPS", "Step", "Wire", "numeric_gradient"]

Array = NDArray[Any]


class Wire(NamedTuple):
    """An input of a step: forward it carries `source`, backward the gradient of this name."""

    source: str
    gradient: str
    local: str  # the derivative of the step by its source
    rule: str  # how the gradient is computed from the one that arrives at the step


class Step(NamedTuple):
    """A step of the forward pass; `compute` sees features along the last of two axes."""

    name: str
    formula: str
    wires: tuple[Wire, ...]
    compute: Callable[[dict[str, Any]], Array]


INPUTS = ("x", "gamma", "beta")

# The notes of `reference.staged_forward` and `staged_backward`, line by line, in Python's syntax.
STEPS = (
    Step(
        "mu",
        "sum(x)/n",
        (Wire("x", "dx2", "1/n", "dmu/n"),),
        lambda v: np.sum(v["x"], axis=0) / len(v["x"]),
    ),
    Step(
        "xmu",
        "x - mu",
        (Wire("x", "dx1", "1", "dxmu"), Wire("mu", "dmu", "-1", "-sum(dxmu)")),
        lambda v: v["x"] - v["mu"],
    ),
    Step(
        "sq",
        "xmu**2",
        (Wire("xmu", "dxmu2", "2*xmu", "2*xmu * dsq"),),
        lambda v: v["xmu"] ** 2,
    ),
    Step(
        "var",
        "sum(sq)/n",
        (Wire("sq", "dsq", "1/n", "dvar/n"),),
        lambda v: np.sum(v["sq"], axis=0) / len(v["sq"]),
    ),
    Step(
        "sqrtvar",
        "sqrt(var + eps)",
        (Wire("var", "dvar", "1/(2*sqrtvar)", "dsqrtvar/(2*sqrtvar)"),),
        lambda v: np.sqrt(v["var"] + v["eps"]),
    ),
    Step(
        "ivar",
        "1/sqrtvar",
        (Wire("sqrtvar", "dsqrtvar", "-1/sqrtvar**2", "-divar/sqrtvar**2"),),
        lambda v: 1 / v["sqrtvar"],
    ),
    Step(
        "xhat",
        "xmu * ivar",
        (
            Wire("xmu", "dxmu1", "ivar", "dxhat * ivar"),
            Wire("ivar", "divar", "xmu", "sum(dxhat * xmu)"),
        ),
        lambda v: v["xmu"] * v["ivar"],
    ),
    Step(
        "gammax",
        "gamma * xhat",
        (
            Wire("xhat", "dxhat", "gamma", "gamma * dgammax"),
            Wire("gamma", "dgamma", "xhat", "sum(dgammax * xhat)"),
        ),
        lambda v: v["gamma"] * v["xhat"],
    ),
    Step(
        "out",
        "gammax + beta",
        (Wire("gammax", "dgammax", "1", "dout"), Wire("beta", "dbeta", "1", "sum(dout)")),
        lambda v: v["gammax"] + v["beta"],
    ),
)


# The length over which the loss bends when a node is moved. In the others it is linear.
_SCALES: dict[str, Callable[[dict[str, Any]], Array]] = {
    "x": lambda v: v["sqrtvar"],
    "mu": lambda v: v["sqrtvar"],
    "xmu": lambda v: v["sqrtvar"],
    "sq": lambda v: v["sqrtvar"] ** 2,
    "var": lambda v: v["sqrtvar"] ** 2,
    "sqrtvar": lambda v: v["sqrtvar"],
    "ivar": lambda v: v["ivar"],
}


def numeric_gradient(name: str, values: dict[str, Any], dout: Array) -> Array:
    """Differentiate the loss sum(out * dout) by the value of one node, by central differences.

    Parameters
    ----------
    name : str
        The node.
    values : dict
        The value of every node, of shape (n, features) or (features,), and "eps".
    dout : ndarray, shape (n, features)
        The upstream gradient.

    Returns
    -------
    ndarray
        The derivative, of the shape of the node's value.

    Notes
    -----
    The difference of fourth order of `bn_cy.reference.check_gradient`. Its step h is 2^-10, which
    is about u^(1/5), times the length over which the loss bends, to the next power of two, so that
    value + h is as a rule exact; where the loss is linear, any step would do. Features do not mix,
    so an entry of each is moved at once.
    """
    value = values[name]
    rows = np.atleast_2d(value)
    scale = _SCALES[name](values) if name in _SCALES else np.maximum(np.abs(rows).max(axis=0), 1)
    h = np.exp2(np.round(np.log2(scale)) - 10)

    def moved(row: Any, distance: Array) -> Array:
        """Compute out with one entry of each feature moved."""
        nearby = value.copy()
        nearby[row] += distance
        return _downstream(name, nearby, values)

    numeric: Array = np.empty_like(value)
    for row in range(len(value)) if value.ndim == 2 else [...]:
        near = moved(row, h) - moved(row, -h)
        far = moved(row, 2 * h) - moved(row, -2 * h)
        numeric[row] = np.sum((8 * near - far) * dout, axis=0) / (12 * h)
    return numeric


def _downstream(name: str, value: Array, values: dict[str, Any]) -> Array:
    """Compute out again after one node has been given a value: what depends on it, and no more."""
    changed = {name: value}
    for step in STEPS:
        if any(wire.source in changed for wire in step.wires):
            changed[step.name] = step.compute(values | changed)
    out: Array = changed["out"]
    return out
