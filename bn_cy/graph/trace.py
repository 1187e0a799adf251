"""`trace`: a forward and a backward pass of batch norm, kept as a graph.

The numbers and the names are those of `bn_cy.reference.staged_forward` and `staged_backward`.
"""

import operator
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bn_cy import reference
from bn_cy.graph.arguments import (
    check_variance,
    checked,
    checked_axis,
    checked_batch,
    checked_eps,
)
from bn_cy.graph.records import Edge, Meeting, Node, Nodes, Paths
from bn_cy.graph.steps import INPUTS, STEPS, Wire, numeric_gradient

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Trace", "trace"]

Array = NDArray[Any]


class Trace:
    """A forward and a backward pass, node by node; `trace` makes one.

    Attributes
    ----------
    nodes : Nodes
        The inputs x, gamma and beta, and the nine steps. ``nodes["xhat"]`` finds one.
    edges : tuple of Edge
        What passes between them: the values in the order of the forward pass, then the gradients
        in the order of the backward pass.
    meetings : tuple of Meeting
        The two places where gradients meet and add, in the order of the backward pass.
    out, dx, dgamma, dbeta : ndarray
        The results of the two passes.
    dout : ndarray
        The upstream gradient.
    eps : float
        What is added to the variance.
    axis : int
        The feature axis.
    count : int
        Values per feature, the n of the formulas.
    """

    def __init__(
        self, x: Array, gamma: Array, beta: Array, dout: Array, eps: float, axis: int
    ) -> None:
        """Run the passes of `bn_cy.reference` on arrays that `trace` has checked."""
        self.out, cache = reference.staged_forward(x, gamma, beta, eps, axis=axis)
        self.dx, self.dgamma, self.dbeta = reference.staged_backward(dout, cache)
        self.dout = dout
        self.eps = eps
        self.axis = axis
        self.count = x.size // x.shape[axis]
        self.nodes = _nodes(cache)
        self.edges = _edges(self.nodes)
        self.meetings = tuple(
            Meeting(node.name, f"d{node.name}", node.arriving, node.gradient)
            for node in reversed(self.nodes)
            if len(node.arriving) == 2
        )

    def check(self) -> dict[str, float]:
        """Compare the gradient of every node with differences of what lies downstream of it.

        Returns
        -------
        dict
            For every node's name the largest ``|numeric - gradient|`` of its entries: an absolute
            error, in the units of the gradient.

        Notes
        -----
        A node's entry is moved while everything that does not depend on the node keeps its value,
        and the loss is l = sum(out * dout). The derivative is the difference of fourth order of
        `bn_cy.reference.check_gradient`::

            (8 (l(h) - l(-h)) - (l(2h) - l(-2h))) / (12 h)

        taken in float64 even where the trace is of float32, whose rounding then shows. The step h
        is 2^-10, which is about u^(1/5), times the length over which l bends: sqrtvar for x, mu,
        xmu and sqrtvar, its square for sq and var, ivar for ivar. In the others l is linear, and
        any step does. Features do not mix, so all of them are moved at once, each by its own step.

        Examples
        --------
        >>> rng = np.random.default_rng(1)
        >>> x, dout = rng.normal(size=(2, 5, 3))
        >>> errors = trace(x, np.ones(3), np.zeros(3), dout).check()
        >>> max(errors.values()) < 1e-9
        True
        """
        values: dict[str, Any] = {node.name: self._rows(node.value) for node in self.nodes}
        values["eps"] = self.eps
        dout = self._rows(self.dout)
        numeric = {name: numeric_gradient(name, values, dout) for name in values if name != "eps"}
        return {
            node.name: float(np.max(np.abs(numeric[node.name] - self._rows(node.gradient))))
            for node in self.nodes
        }

    def paths(self, i: int | Sequence[int], f: int) -> Paths:
        """Split the gradient of one entry of x into its three ways to the loss.

        Parameters
        ----------
        i : int or sequence of int
            The example: the index along the axis that is not the feature axis, or one index for
            each of these axes.
        f : int
            The feature.

        Returns
        -------
        Paths
            (direct, mean, variance), which add up to dx[i, f], and to dx[f, i] where axis is 0.

        Examples
        --------
        >>> x = np.array([[1.0], [3.0], [5.0], [7.0]])
        >>> dout = np.array([[0.0], [9.0], [0.0], [0.0]])
        >>> t = trace(x, np.array([2.0]), np.array([1.0]), dout, eps=4.0)
        >>> [round(part, 3) for part in t.paths(1, 0)], t.dx[1, 0].round(3).item()
        ([6.0, -1.5, -0.167], 4.333)
        """
        place = [*np.atleast_1d(i)]
        if len(place) != self.dx.ndim - 1:
            raise ValueError(
                f"i must have {self.dx.ndim - 1} indices, one for each axis of x but the feature "
                f"axis, got {i!r}"
            )
        place.insert(range(self.dx.ndim)[self.axis], f)
        index = tuple(operator.index(k) for k in place)
        parts = self.nodes["xmu"].arriving
        mean = self.nodes["x"].arriving["dx2"]
        return Paths(*(float(part[index]) for part in (parts["dxmu1"], mean, parts["dxmu2"])))

    def draw(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the graph with matplotlib: values forward, gradients backward.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default on a figure of its own.

        Returns
        -------
        matplotlib.axes.Axes
            The axes drawn on.

        Raises
        ------
        ModuleNotFoundError
            matplotlib is missing.
        """
        from bn_cy.graph.draw import draw

        return draw(self, ax)

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the graph as a page, one file that needs no network, in which numbers can be moved.

        Parameters
        ----------
        path : str or path-like
            The file; one that exists is replaced.

        Raises
        ------
        ValueError
            There are more numbers than a page can show: 64 examples and 16 features.

        Notes
        -----
        The page has the examples as rows and the features as columns, whatever the axis. It
        computes everything itself, in float64, or in float32 if the trace did.
        """
        from bn_cy.graph.page import write

        write(self, path)

    def __repr__(self) -> str:
        """Show both passes as a table, line by line."""
        from bn_cy.graph.table import table

        return table(self)

    def _rows(self, array: Array) -> Array:
        """Lay the feature axis last and all others into one, in float64; a vector stays one."""
        if array.ndim > 1:
            array = np.moveaxis(array, self.axis, -1).reshape(-1, array.shape[self.axis])
        return array.astype(np.float64)


def trace(
    x: ArrayLike,
    gamma: ArrayLike,
    beta: ArrayLike,
    dout: ArrayLike,
    eps: float = 1e-5,
    *,
    axis: int = 1,
) -> Trace:
    """Run batch norm forward and backward and keep the whole graph.

    Parameters
    ----------
    x : array_like of float32 or float64
        The batch, two dimensions or more.
    gamma, beta : array_like, shape (features,)
        Scale and shift.
    dout : array_like
        The upstream gradient, dl/dout, of x's shape. Take it at random: for ones, dx is 0 and a
        wrong formula passes.
    eps : float, optional
        Added to the variance.
    axis : int, optional
        The feature axis.

    Returns
    -------
    Trace
        The graph. It is computed in x's dtype, to which the other arrays are cast.

    Raises
    ------
    TypeError
        An argument is no array of real numbers, or x is not of float32 or float64.
    ValueError
        A shape does not fit, a number is not finite, x has no values, a feature's variance
        overflows, or it and eps are both 0, where 1/sqrt(var + eps) has no value.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [5.0], [7.0]])
    >>> dout = np.array([[0.0], [9.0], [0.0], [0.0]])
    >>> t = trace(x, np.array([2.0]), np.array([1.0]), dout, eps=4.0)
    >>> t.nodes["sqrtvar"].value.tolist(), t.nodes["sqrtvar"].local_gradient
    ([3.0], {'var': '1/(2*sqrtvar)'})
    >>> xmu = t.meetings[0]
    >>> xmu.name, list(xmu.parts), xmu.total[1].round(3).tolist()
    ('dxmu', ['dxmu1', 'dxmu2'], [5.833])
    >>> print(t)
    batch norm of x, (4, 1) with features along axis 1: n = 4, eps = 4, float64
    The numbers are those of the example x[0, :]. Where there is a +, gradients meet.
    <BLANKLINE>
    forward
        x                             (4, 1)           1
        gamma                         (1,)             2
        beta                          (1,)             1
     1  mu = sum(x)/n                 (1,)             4
     2  xmu = x - mu                  (4, 1)          -3
     3  sq = xmu**2                   (4, 1)           9
     4  var = sum(sq)/n               (1,)             5
     5  sqrtvar = sqrt(var + eps)     (1,)             3
     6  ivar = 1/sqrtvar              (1,)        0.3333
     7  xhat = xmu * ivar             (4, 1)          -1
     8  gammax = gamma * xhat         (4, 1)          -2
     9  out = gammax + beta           (4, 1)          -1
    <BLANKLINE>
    backward
        dout                          (4, 1)           0
     9  dgammax = dout                (4, 1)           0
        dbeta = sum(dout)             (1,)             9
     8  dxhat = gamma * dgammax       (4, 1)           0
        dgamma = sum(dgammax * xhat)  (1,)            -3
     7  dxmu1 = dxhat * ivar          (4, 1)           0
        divar = sum(dxhat * xmu)      (1,)           -18
     6  dsqrtvar = -divar/sqrtvar**2  (1,)             2
     5  dvar = dsqrtvar/(2*sqrtvar)   (1,)        0.3333
     4  dsq = dvar/n                  (4, 1)     0.08333
     3  dxmu2 = 2*xmu * dsq           (4, 1)        -0.5
     +  dxmu = dxmu1 + dxmu2          (4, 1)        -0.5
     2  dx1 = dxmu                    (4, 1)        -0.5
        dmu = -sum(dxmu)              (1,)            -6
     1  dx2 = dmu/n                   (4, 1)        -1.5
     +  dx = dx1 + dx2                (4, 1)          -2
    """
    x = checked_batch(x)
    axis = checked_axis(axis, x)
    eps = checked_eps(eps)
    features = (x.shape[axis],)
    gamma = checked("gamma", gamma, x.dtype, features, "one value per feature")
    beta = checked("beta", beta, x.dtype, features, "one value per feature")
    dout = checked("dout", dout, x.dtype, x.shape, "that of x")
    check_variance(x, eps, axis)
    return Trace(x, gamma, beta, dout, eps, axis)


def _nodes(cache: dict[str, Any]) -> Nodes:
    """Gather what the two passes left in the cache, node by node."""
    arriving: dict[str, dict[str, Array]] = {name: {} for name in INPUTS}
    arriving |= {step.name: {} for step in STEPS}
    arriving["out"]["dout"] = cache["dout"]
    for step in reversed(STEPS):
        for wire in step.wires:
            arriving[wire.source][wire.gradient] = cache[wire.gradient]

    def node(name: str, number: int, formula: str, wires: tuple[Wire, ...]) -> Node:
        return Node(
            name,
            number,
            formula,
            local_gradient={wire.source: wire.local for wire in wires},
            value=cache[name],
            gradient=cache[f"d{name}"],
            arriving=arriving[name],
            leaving={wire.gradient: cache[wire.gradient] for wire in wires},
        )

    inputs = [node(name, 0, name, ()) for name in INPUTS]
    steps = [
        node(step.name, number, f"{step.name} = {step.formula}", step.wires)
        for number, step in enumerate(STEPS, 1)
    ]
    return Nodes(inputs + steps)


def _edges(nodes: Nodes) -> tuple[Edge, ...]:
    """Every wire twice: with the value that it carries forward, and the gradient it brings back."""
    forward = [
        Edge(wire.source, step.name, "forward", wire.source, nodes[wire.source].value)
        for step in STEPS
        for wire in step.wires
    ]
    backward = [
        Edge(step.name, wire.source, "backward", wire.gradient,
             nodes[wire.source].arriving[wire.gradient])
        for step in reversed(STEPS)
        for wire in step.wires
    ]  # fmt: skip
    return (*forward, *backward)
