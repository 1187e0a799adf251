"""What a trace is made of: nodes, edges, meeting points, and the three parts of a gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

from numpy.typing import NDArray

__all__ = ["Edge", "Meeting", "Node", "Nodes", "Paths"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Node:
    """A node of the graph: an input, or a step and its result.

    Attributes
    ----------
    name : str
        The name in the cache of `bn_cy.reference.staged_forward`.
    step : int
        1 to 9, and 0 for the inputs x, gamma and beta.
    formula : str
        How the value is computed, as in "mu = sum(x)/n"; the name alone for an input.
    local_gradient : dict
        For every input of the step its derivative, as in {"xmu": "ivar", "ivar": "xmu"}.
    value : ndarray
        The result, of x's shape or of shape (features,).
    gradient : ndarray
        The gradient of the loss with respect to the value, of its shape. This is what arrives.
    arriving : dict
        The parts that arrive, by their names; where there are two, `gradient` is their sum.
    leaving : dict
        The gradients that the node passes on to its inputs, by their names.
    """

    name: str
    step: int
    formula: str
    local_gradient: dict[str, str]
    value: Array
    gradient: Array
    arriving: dict[str, Array]
    leaving: dict[str, Array]


@dataclass(frozen=True, eq=False)
class Edge:
    """What passes from one node to another.

    Attributes
    ----------
    source, target : str
        The nodes that it leaves and reaches.
    direction : str
        "forward" for a value, "backward" for a gradient.
    name : str
        Of what passes: the source's name, or a gradient's as in "dxmu1".
    value : ndarray
        What passes. A gradient has the shape of the target's value.
    """

    source: str
    target: str
    direction: str
    name: str
    value: Array


@dataclass(frozen=True, eq=False)
class Meeting:
    """A place where two gradients meet and add, since the forward pass used a value twice.

    Attributes
    ----------
    node : str
        The node whose value was used twice.
    name : str
        Of the sum, as in "dxmu".
    parts : dict
        The two gradients that arrive, by their names.
    total : ndarray
        Their sum.
    """

    node: str
    name: str
    parts: dict[str, Array]
    total: Array


class Paths(NamedTuple):
    """The gradient of one entry of x as its three parts; their sum is the entry of dx.

    Attributes
    ----------
    direct : float
        Through the entry's own xhat: dxmu1.
    mean : float
        Through the mean: dx2.
    variance : float
        Through the variance: dxmu2.
    """

    direct: float
    mean: float
    variance: float


class Nodes(Sequence[Node]):
    """The nodes in the order of the forward pass; an index finds one, and so does a name."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        """Hold the nodes in this order."""
        self._nodes = tuple(nodes)

    def __len__(self) -> int:
        """Count the nodes."""
        return len(self._nodes)

    @overload
    def __getitem__(self, key: str | int) -> Node: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Node, ...]: ...
    def __getitem__(self, key: str | int | slice) -> Node | tuple[Node, ...]:
        """Find a node by its name or its place."""
        if not isinstance(key, str):
            return self._nodes[key]
        names = [node.name for node in self._nodes]
        if key not in names:
            raise KeyError(f"no node {key!r}: the nodes are {', '.join(names)}")
        return self._nodes[names.index(key)]

    def __repr__(self) -> str:
        """Show the names."""
        return f"Nodes({', '.join(node.name for node in self._nodes)})"
