"""Batch normalization for NumPy, in compiled loops."""

import os
from importlib import import_module
from typing import Any

if os.path.exists(os.path.join(__path__[0], "functional.pyx")):  # a checkout: no wheel has it
    from bn_cy import _checkout

    _checkout.prepare(__path__[0])

from bn_cy import reference
from bn_cy._config import show_config
from bn_cy._micro_batch import MicroBatch
from bn_cy._recalibrate import recalibrate
from bn_cy._threads import get_num_threads, set_num_threads
from bn_cy._version import __version__
from bn_cy.folding import fold, fold_next
from bn_cy.functional import (
    Cache,
    Moments,
    batchnorm_backward,
    batchnorm_forward,
    clear_buffers,
    frozen_forward,
    gradient_sums,
    input_gradient,
    moments,
    normalize,
)
from bn_cy.layer import BatchNorm
from bn_cy.sync import SyncBatchNorm

__all__ = [
    "BatchNorm",
    "Cache",
    "MicroBatch",
    "Moments",
    "SyncBatchNorm",
    "__version__",
    "batchnorm_backward",
    "batchnorm_forward",
    "clear_buffers",
    "fold",
    "fold_next",
    "frozen_forward",
    "get_num_threads",
    "gradient_sums",
    "input_gradient",
    "moments",
    "normalize",
    "recalibrate",
    "reference",
    "set_num_threads",
    "show_config",
]

# What only some need, and what would slow every import.
_ON_DEMAND = ("capi", "convert", "cs231n", "dask", "graph", "torch")


def __getattr__(name: str) -> Any:
    """Import a module of `_ON_DEMAND` when it is first asked for."""
    if name in _ON_DEMAND:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
