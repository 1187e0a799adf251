"""Batch norm's forward and backward pass as a graph, on the reader's own numbers.

`trace` runs the nine steps of `bn_cy.reference.staged_forward` and `staged_backward` and keeps what
passes along every edge. The `Trace` prints as a table, draws itself, compares the gradient of every
node with finite differences, and writes a page on which every number can be changed::

    __main__.py    python -m bn_cy.graph                          -> trace
    trace.py       the two passes, and what passes where          -> reference, the rooms below
    table.py       a trace as text                                -> steps
    draw.py        a trace as a matplotlib figure
    page.py        a trace as a page, made of assets/             -> steps
    arguments.py   what `trace` is given, checked                 -> reference
    records.py     nodes, edges, meeting points, paths            -> numpy
    steps.py       the nine steps as a table, and differences     -> numpy
    sequential.py  the page's arithmetic, operation by operation  -> numpy
"""

from bn_cy.graph.records import Edge, Meeting, Node, Nodes, Paths
from bn_cy.graph.trace import Trace, trace

__all__ = ["Edge", "Meeting", "Node", "Nodes", "Paths", "Trace", "trace"]
