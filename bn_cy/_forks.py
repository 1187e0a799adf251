"""The locks of layers, for which a fork waits.

A child that was forked while another thread trained a layer would have a lock that nobody gives
back, and running statistics of which a part is updated. So a fork takes the locks of all layers
first: its child has each as it was between two batches, with a new lock.
"""

import os
import threading
import weakref
from typing import Any

_forking = threading.RLock()  # one fork at a time
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_taken: list[Any] = []  # the locks that the fork under way has


def give_lock(layer: Any) -> None:
    """Give a layer its lock, `layer._lock`; not while a fork is under way, which would miss it.

    It may be taken again by the thread that has it: a signal handler may fork, or use the layer.
    """
    with _forking:
        layer._lock = threading.RLock()
        _layers[id(layer)] = layer


def _alive() -> list[Any]:
    """Return the layers; unlike an iteration, this is not upset by another thread's new layer."""
    return [layer for reference in _layers.valuerefs() if (layer := reference()) is not None]


def _before_fork() -> None:
    _forking.acquire()
    for layer in _alive():
        layer._lock.acquire()
        _taken.append(layer._lock)


def _after_fork_in_parent() -> None:
    while _taken:
        _taken.pop().release()
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking
    _forking = threading.RLock()
    _taken.clear()
    for layer in _alive():
        layer._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
