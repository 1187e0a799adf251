"""Loads the OpenMP runtime with threads that go to sleep soon.

By default libgomp's idle threads spin for milliseconds after a parallel region, on the processors
that the next layer's BLAS is about to use: three layers of 1024 units then take twice as long. How
long they spin is read from the environment once, when the runtime is loaded.
"""

import importlib
import os
from types import ModuleType

SPINS = "1000"  # some ten microseconds: two regions of one call still find the threads awake


def load() -> ModuleType:
    """Return the module `_cpu`, with which the runtime comes; leave the environment as it was."""
    chosen = any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
    if not chosen:
        os.environ["GOMP_SPINCOUNT"] = SPINS
    try:
        return importlib.import_module("bn_cy._cpu")
    finally:
        if not chosen:
            del os.environ["GOMP_SPINCOUNT"]


cpu = load()
