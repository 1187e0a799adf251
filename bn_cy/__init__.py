"""Batch normalization for NumPy, in compiled loops."""

from bn_cy import reference
from bn_cy._config import show_config
from bn_cy._threads import get_num_threads, set_num_threads
from bn_cy._version import __version__
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

__all__ = [
    "BatchNorm",
    "Cache",
    "Moments",
    "__version__",
    "batchnorm_backward",
    "batchnorm_forward",
    "clear_buffers",
    "frozen_forward",
    "get_num_threads",
    "gradient_sums",
    "input_gradient",
    "moments",
    "normalize",
    "reference",
    "set_num_threads",
    "show_config",
]
