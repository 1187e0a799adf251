"""Batch norm's forward and backward pass as a graph, on the reader's own numbers.

`trace` runs the nine steps of `bn_cy.reference.staged_forward` and `staged_backward` and keeps what
passes along every edge. The `Trace` prints as a table, draws itself, and compares the gradient of
every node with finite differences::

    trace.py       the two passes, and what passes where          -> reference, steps
    table.py       a trace as text                                -> steps
    draw.py        a trace as a matplotlib figure
    steps.py       the nine steps as a table, and differences     -> numpy
    sequential.py  the page's arithmetic, operation by operation  -> numpy
"""

from bn_cy.graph.trace import Edge, Meeting, Node, Nodes, Paths, Trace, trace

__all__ = ["Edge", "Meeting", "Node", "Nodes", "Paths", "Trace", "trace"]
