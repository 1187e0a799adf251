"""Digests of everything the kernels compute; `digests.txt` beside this file holds those of seed 0.

    python -m bn_cy._digests SEED THREADS [THREADS ...]
    python -m bn_cy._digests 0 1 > digests.txt

The lines are the same for every number of threads, instruction set, compiler and processor: each of
them is a witness for the others. Inputs are made of integers, so that they do not depend on the
version of NumPy. One process computes with one instruction set, so the test of the same bits runs
this module once for each.
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bn_cy

Array = NDArray[Any]
Shape = tuple[int, ...]
DType = type[np.float32] | type[np.float64]

CASES: list[tuple[Shape, int]] = [  # and the feature axis
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
    ((200, 3, 3, 5), 1),
    ((16, 1100), 1),
    ((2, 3, 9001), 1),
]

WALKS = 400  # small shapes, of which a line holds all sums
WALKED = 1 << 19  # values of one, at the most


class Integers:
    """Random numbers that are the same everywhere: splitmix64, a counter that is hashed."""

    def __init__(self, seed: int):
        self.count = seed << 40

    def bits(self, size: int) -> Array:
        """Return uniform integers of 64 bits."""
        z = np.arange(self.count, self.count + size, dtype=np.uint64)
        self.count += size
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def bell(self, shape: int | Shape) -> Array:
        """Return sums of four uniform numbers of 22 bits, scaled to a variance of about 1."""
        size = int(np.prod(shape))
        uniform = (self.bits(4 * size) >> np.uint64(42)).astype(np.float64) / 2**22
        bell: Array = (np.sum(uniform.reshape(4, size), axis=0) - 2).reshape(shape) * 1.75
        return bell


def committed() -> list[str]:
    """Return the lines that every build has with seed 0."""
    return Path(__file__).with_name("digests.txt").read_text().splitlines()


def digest(*arrays: Array) -> str:
    """Return a short hash of the bits of the arrays."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:16]


def step(
    layer: bn_cy.BatchNorm, x: Array, dout: Array, residual: Array | None = None
) -> tuple[Any, ...]:
    """Return the arrays that a forward and a backward leave."""
    y, gradients = layer(x, residual=residual), layer.backward(dout)
    return y, *(gradients if residual is not None else [gradients]), layer.dgamma, layer.dbeta


def digests_of_case(seed: int, shape: Shape, axis: int, dtype: DType) -> tuple[str, ...]:
    """Return the digests of all that is computed of a case.

    These are a training step, an evaluation, the separate pieces, a training step on features that
    are constant or hold an outlier, and so are summed again, and both steps with a ReLU, with a
    residual, and with both.
    """
    numbers = Integers(seed)
    # Far enough from zero that no order of summation gives the exact sums by luck.
    x: Array = (3 + numbers.bell(shape)).astype(dtype)
    dout: Array = numbers.bell(shape).astype(dtype)
    layer: Any = bn_cy.BatchNorm(shape[axis], axis=axis, dtype=dtype)
    layer.gamma[:] = 1 + numbers.bell(shape[axis]) / 4
    trained = digest(*step(layer, x, dout), layer.running_mean, layer.running_var)
    frozen = digest(*step(layer.eval(), x, dout))
    _, mean, var = bn_cy.moments(x, axis=axis)
    pieces = digest(mean, var, *bn_cy.gradient_sums(dout, x, mean, var, axis=axis))
    followed: list[Array] = []
    residual = numbers.bell(shape).astype(dtype)
    for relu, added in ((True, None), (False, residual), (True, residual)):
        layer.relu = relu
        for mode in (True, False):
            followed += step(layer.train(mode), x, dout, added)
    layer.relu = False
    features = np.moveaxis(x, axis, 0)
    features[::3] = 7
    features[1::3].reshape(-1)[:1] = 1e9
    rescued = digest(*step(layer.train(), x, dout))
    return trained, frozen, pieces, rescued, digest(*followed)


def walked_shapes(numbers: Integers) -> list[Shape]:
    """Return shapes about powers of two, where the order of the sums often changes."""
    shapes: list[Shape] = [(WALKED // 16, 16, 1)]  # whose merged rows would have 4 KB
    while len(shapes) < WALKS:
        powers = 1 << (numbers.bits(3) >> np.uint64(60))
        steps = np.array([-1, 0, 0, 1])[numbers.bits(3) % np.uint64(4)]
        shape = tuple(int(size) for size in np.maximum(powers.astype(int) + steps, 1))
        if shape[0] * shape[2] > 1 and np.prod(shape) <= WALKED:
            shapes.append(shape)
    return shapes


def digest_of_walks(seed: int, dtype: DType) -> str:
    """Return the digest of the sums of many shapes, some of whose features hold an outlier."""
    numbers = Integers(seed)
    x, dout = (3 + numbers.bell((2, WALKED))).astype(dtype)
    x[::4001] *= 100
    sums: list[Array] = []
    for shape in walked_shapes(numbers):
        values, upstream = (a[: np.prod(shape)].reshape(shape) for a in (x, dout))
        _, mean, var = bn_cy.moments(values)
        sums += [mean, var, *bn_cy.gradient_sums(upstream, values, mean, var)]
    return digest(*sums)


def lines_of(seed: int, threads: int) -> Iterator[str]:
    """Yield a line of digests for every case and dtype, computed by so many threads."""
    bn_cy.set_num_threads(threads)
    for dtype in (np.float32, np.float64):
        yield f"walks {dtype.__name__}\t{digest_of_walks(seed, dtype)}"
    for shape, axis in CASES:
        for dtype in (np.float32, np.float64):
            name = f"{'x'.join(map(str, shape))} axis {axis} {dtype.__name__}"
            yield "\t".join([name, *digests_of_case(seed, shape, axis, dtype)])


def main(seed: int, *thread_counts: int) -> None:
    """Print the lines; those of another number of threads only where they differ."""
    expected = list(lines_of(seed, thread_counts[0]))
    print(*expected, sep="\n")
    for threads in thread_counts[1:]:
        for line, first in zip(lines_of(seed, threads), expected, strict=True):
            if line != first:
                print(f"{threads} threads: {line}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
