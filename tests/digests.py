"""Print digests of everything the kernels compute, once for every number of threads.

    python digests.py SEED THREADS [THREADS ...]

The lines are the same for every number of threads and every instruction set. One process computes
with one instruction set, so the test of the same bits runs this file once for each.
"""

import hashlib
import sys

import numpy as np

import bn_cy

CASES = [
    ((5000, 37), 1),
    ((4097, 1), 1),
    ((3, 130), 1),
    ((28, 200), 1),
    ((257, 1029), 1),
    ((2101, 256), 1),
    ((65, 16), 0),
    ((90, 130), 0),
    ((7, 5001), 0),
    ((1, 20011), 0),
    ((5, 37, 7, 7), 1),
    ((2, 40, 5, 7), 1),
    ((12, 30, 5, 5), 1),
    ((4, 130, 3, 3), 1),
    ((3, 5, 57, 56), 1),
    ((1, 2, 100, 101), 1),
    ((33, 3, 14, 14), 1),
    ((41, 3, 26, 27), 1),
    ((2, 9, 9, 40), -1),
]


def digest(*arrays):
    """Return a short hash of the bits of the arrays."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:16]


def digests_of_case(seed, shape, axis, dtype):
    """Return the digests of a training step, an evaluation and the separate pieces."""
    rng = np.random.default_rng(seed)
    # Far enough from zero that no order of summation gives the exact sums by luck.
    x = (3 + rng.standard_normal(shape)).astype(dtype)
    dout = rng.standard_normal(shape).astype(dtype)
    layer = bn_cy.BatchNorm(shape[axis], axis=axis, dtype=dtype)
    layer.gamma[:] = rng.uniform(0.5, 2, shape[axis])
    y, dx = layer(x), layer.backward(dout)
    step = digest(y, dx, layer.dgamma, layer.dbeta, layer.running_mean, layer.running_var)
    layer.eval()
    y, dx = layer(x), layer.backward(dout)
    frozen = digest(y, dx, layer.dgamma, layer.dbeta)
    _, mean, var = bn_cy.moments(x, axis=axis)
    sums = bn_cy.gradient_sums(dout, x, mean, var, axis=axis)
    return step, frozen, digest(mean, var, *sums)


def main(seed, *thread_counts):
    """Print a line of digests for every number of threads, case and dtype."""
    for threads in thread_counts:
        bn_cy.set_num_threads(threads)
        for shape, axis in CASES:
            for dtype in (np.float32, np.float64):
                name = f"{'x'.join(map(str, shape))} axis {axis} {dtype.__name__}"
                print(threads, name, *digests_of_case(seed, shape, axis, dtype), sep="\t")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
