"""Calls on all paths, for valgrind's memcheck, which tells where code reads what nobody wrote.

    PYTHONMALLOC=malloc BN_CY_ISA=v3 valgrind --error-exitcode=9 --leak-check=no \\
        --suppressions=tests/tools/memcheck.supp python tests/tools/memcheck.py

Memcheck speaks up where a branch depends on such a value. The kernels branch on sums of all they
are given, so every result is given to them once more. Errors within Python, NumPy and the loader
are their own. Valgrind has no AVX-512, hence v3.
"""

import numpy as np

import bn_cy
from bn_cy import _digests


def read(array):
    """Have the kernels read all values."""
    bn_cy.moments(np.stack([array, array]).reshape(2, -1, 1), axis=2)


def step(layer, x, dout, residual):
    """Read what a forward and a backward write, and what they leave in the layer."""
    results = _digests.step(layer, x, dout, residual)
    for array in (*results, layer.running_mean, layer.running_var):
        read(array)


def check(shape, axis, dtype, numbers):
    x, dout, residual = (numbers.bell(shape).astype(dtype) for _ in range(3))
    np.moveaxis(x, axis, 0)[::3] = 7  # constant features are summed again
    for relu in (False, True):
        layer = bn_cy.BatchNorm(shape[axis], axis=axis, dtype=dtype, relu=relu)
        for added in (None, residual):
            step(layer.train(), x, dout, added)
            step(layer.eval(), x, dout, added)
    _, mean, var = bn_cy.moments(x, axis=axis)
    for array in (mean, var, *bn_cy.gradient_sums(dout, x, mean, var, axis=axis)):
        read(array)


def main():
    numbers = _digests.Integers(0)
    bn_cy.set_num_threads(2)
    for streamed in (1 << 40, 0):  # bytes from which results are written past the cache
        bn_cy.functional._stream_from(streamed)
        for shape, axis in _digests.CASES:
            for dtype in (np.float32, np.float64):
                check(shape, axis, dtype, numbers)
    print(f"{len(_digests.CASES)} shapes, through the cache and past it")


if __name__ == "__main__":
    main()
