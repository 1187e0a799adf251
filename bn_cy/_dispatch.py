"""Which compiled kernels to use: chosen once, at import.

The same loops are compiled for the x86-64 levels v2, v3 and v4 (SSE4, AVX2, AVX-512) and give
the same bits on each; on other processors there is one plain variant. The environment variable
BN_CY_ISA forces one.
"""

import importlib
import os

from bn_cy._openmp import cpu


def choose_variant(forced, supported):
    """Return the name of the variant to load.

    Parameters
    ----------
    forced : str
        What BN_CY_ISA holds; empty: no wish.
    supported : list of str
        What this processor runs, best first.

    Raises
    ------
    ImportError
        If the word is unknown, or names what this processor does not run.
    """
    if forced and forced not in supported:
        raise ImportError(
            f"BN_CY_ISA must name a variant that runs here ({', '.join(supported)}), got {forced!r}"
        )
    return forced or supported[0]


SUPPORTED = [level for level in cpu.supported_levels() if level in cpu.BUILT] or ["plain"]
VARIANT = choose_variant(os.environ.get("BN_CY_ISA", ""), SUPPORTED)

# A variant that is broken is an error and not a reason to take another.
_module = importlib.import_module(f"bn_cy._kernels_{VARIANT}")
KERNELS = _module.KERNELS  # a capsule: the table of C functions
FLAGS = _module.FLAGS
