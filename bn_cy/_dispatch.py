"""Which compiled kernels to use: chosen once, at import.

The same loops are compiled for the x86-64 levels v2, v3 and v4 (SSE4, AVX2, AVX-512) and give
the same bits on each; on other processors there is one plain variant. The environment variable
BN_CY_ISA forces one.
"""

import importlib
import os

from bn_cy._openmp import cpu

NEEDS = {
    "v2": "SSE4.2 and POPCNT",
    "v3": "AVX2, FMA, BMI1 and BMI2",
    "v4": "AVX-512 F, BW, CD, DQ and VL",
}


def supported_variants(built, levels):
    """Return the names of the variants that run on this processor, best first.

    Parameters
    ----------
    built : list of str
        The variants that were built, from the least demanding on.
    levels : list of str
        The x86-64 levels that this processor runs, best first.

    Raises
    ------
    ImportError
        If it runs none of those that were built.
    """
    supported = [name for name in (*levels, "plain") if name in built]
    if not supported:
        raise ImportError(
            f"bn_cy was built for x86-64-{', '.join(built)}, and this processor runs none of "
            f"these: it lacks {NEEDS[built[0]]}, or a part of them"
        )
    return supported


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


LEVELS = cpu.supported_levels()
SUPPORTED = supported_variants(cpu.BUILT, LEVELS)
VARIANT = choose_variant(os.environ.get("BN_CY_ISA", ""), SUPPORTED)

# A variant that is broken is an error and not a reason to take another.
_module = importlib.import_module(f"bn_cy.kernels.{VARIANT}")
KERNELS = _module.KERNELS  # a capsule: the table of C functions
FLAGS = _module.FLAGS
