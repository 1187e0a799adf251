"""Every way in which an array is walked, with every kind of data that takes another turn there.

A path is a shape, a number of threads, and whether outputs go past the cache; `plan.pxi` and
`schedule.pxi` draw them. Data take another turn where a shift is far from the mean, where sums
overflow or squares lose digits, and where a ReLU opens or closes. The reference is in 80 bits.
"""

import ctypes
import mmap
import sys

import numpy as np
import pytest
from exact import TOLERANCE, parameters
from test_accuracy import BOUNDS, Truth, step_errors

from bn_cy import (
    batchnorm_backward,
    batchnorm_forward,
    frozen_forward,
    functional,
    moments,
    set_num_threads,
)

PRECISE = TOLERANCE[np.dtype(np.float64)]
BOUNDS64 = {"y": PRECISE, "dx": PRECISE, "dbeta": PRECISE, "dgamma": PRECISE}
BOUNDS64 |= {"var": 1e-12, "mean": 2e-8}  # at an offset of 1e8, which is the last digit's

PATHS = [  # shape, axis, threads
    ((3000, 7), 1, 1),  # rows merged far
    ((64, 200), 1, 1),  # in pairs
    ((16, 1100), 1, 1),  # wide rows, two blocks
    ((2000, 300), 1, 3),  # rows that threads share
    ((2000, 21), 1, 2),  # merged ones
    ((28, 50), 1, 1),  # few values: moments in double
    ((40, 23, 7, 7), 1, 1),  # columns of images
    ((200, 3, 3, 5), 1, 1),  # merged ones
    ((128, 4, 14, 14), 1, 2),  # that threads share
    ((2, 3, 300), 1, 1),  # runs
    ((10, 3, 27, 19), 1, 1),  # of many images, read side by side
    ((24, 300), 0, 1),  # a single one of each feature
    ((2, 3, 9000), 1, 1),  # long ones, cut
    ((2, 3, 20000), 1, 2),  # that threads share
]
RUNS = 8320  # eight rows of 65 lines: a run of so many and a few values has these for a tail

pytestmark = pytest.mark.usefixtures("settings")
over_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
over_paths = pytest.mark.parametrize(("shape", "axis", "threads"), PATHS)


def check_step(rng, x, dout, axis, threads, eps=0):
    """Hold a training step against 80 bits, outputs written through the cache and past it."""
    bounds = BOUNDS if x.dtype == np.float32 else BOUNDS64
    gamma, beta = parameters(rng, x.shape[axis], x.dtype)
    assert np.isfinite(x).all()
    assert np.isfinite(dout).all()
    set_num_threads(threads)
    for size in (1 << 60, 0):
        functional._stream_from(size)
        errors = step_errors(x, dout, gamma, beta, eps, axis)
        broken = {name: e for name, e in errors.items() if not e <= bounds[name]}
        assert not broken, f"of {errors}"


def in_layout(rows, shape, axis):
    """Return rows of features as an array of a shape."""
    moved = np.moveaxis(np.empty(shape, np.bool_), axis, -1).shape
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), -1, axis))


def rows_for(shape, axis):
    """Return the shape of an array as rows of features."""
    return np.prod(shape, dtype=int) // shape[axis], shape[axis]


# Moments


def far_off(rng, x):
    x[:, ::3] += 1e8 if x.dtype == np.float64 else 1e4


def first_an_outlier(rng, x):
    x[0, 1::3] = 1e5


def large(rng, x):
    """Sums of squares overflow in float32, and few squares do."""
    x *= 1e19 if x.dtype == np.float32 else 1e100


def larger(rng, x):
    """All squares overflow in float32, and sums of x do; in float64 sums of squares come near."""
    x *= 5e37 if x.dtype == np.float32 else 1e151


def small(rng, x):
    """Squares have few digits left in float32."""
    x *= 1e-21 if x.dtype == np.float32 else 1e-150


@over_dtypes
@over_paths
@pytest.mark.parametrize("kind", [far_off, first_an_outlier, large, larger, small])
def test_moments_that_are_hard(rng, kind, shape, axis, threads, dtype):
    rows = np.clip(rng.standard_normal(rows_for(shape, axis)), -3, 3).astype(dtype)
    kind(rng, rows)
    dout = rng.standard_normal(rows.shape).astype(dtype) * np.sqrt(rows.std(dtype=np.longdouble))
    x, dout = (in_layout(a, shape, axis) for a in (rows, dout.astype(dtype)))
    check_step(rng, x, dout, axis, threads)


@pytest.mark.parametrize("count", [8, 9, 31])
def test_moments_of_few_values_are_summed_in_double(rng, count):
    x = rng.standard_normal((count, 50)).astype(np.float32)
    _, mean, var = moments(x)
    truth = Truth(x)
    assert truth.mean_errors(mean).max() <= 1e-13
    assert truth.var_errors(var).max() <= 1e-13


# Gradient sums


def outliers_and_gradient(rng, count, features, overflows):
    """Return half a batch in which every feature has a value far above the others and one far
    below, and a gradient whose sums leave float32: one of them, and the other does not."""
    x = rng.standard_normal((count, features))
    x[0], x[count // 3] = 1e3, -1e3
    far = np.abs(x) > 100
    if overflows == "dgamma":  # the product of a far value alone
        return x, np.where(far, 1.6e38 * np.sign(x), 1e34 * rng.standard_normal(x.shape))
    return x, np.where(far, 0, 2e38 * rng.uniform(0.9, 1.1, x.shape))


@pytest.mark.parametrize(
    ("shape", "axis", "threads", "overflows"),
    [
        (*path, overflows)
        for path in PATHS
        for overflows in ("dbeta", "dgamma")
        # Of fewer values none is so many deviations from the mean.
        if overflows == "dbeta" or rows_for(*path[:2])[0] >= 100
    ],
)
def test_gradient_sums_that_overflow_on_the_way(rng, shape, axis, threads, overflows):
    """The second half of the batch nearly takes back what the first gives."""
    count, features = rows_for(shape, axis)
    x, dout = outliers_and_gradient(rng, count // 2, features, overflows)
    x, dout = (np.concatenate([half, half]) for half in (x, dout))
    dout[count // 2 :] *= -1 + 1e-3 * rng.standard_normal((count // 2, features))
    x, dout = (in_layout(a.astype(np.float32), shape, axis) for a in (x, dout))
    check_step(rng, x, dout, axis, threads)


@over_paths
def test_gradient_sums_near_the_largest_double(rng, shape, axis, threads):
    x, dout = (in_layout(rng.standard_normal(rows_for(shape, axis)), shape, axis) for _ in "ab")
    check_step(rng, x, 1e303 * dout, axis, threads)


@over_dtypes
@pytest.mark.parametrize("tail", [1, 2, 7, 8, 15, 16, 17, 127])
def test_the_tail_of_a_long_run(rng, tail, dtype):
    """A single value weighs more than all roundings."""
    shape = (3, 2, RUNS + tail)
    x = (3 + rng.standard_normal(shape)).astype(dtype)
    x[..., RUNS:] += 50
    check_step(rng, x, (1 + x * rng.standard_normal(shape)).astype(dtype), 1, 1)


def at_the_end_of_memory(array):
    """Return a copy behind which nothing can be read: who does so is ended by the system."""
    room = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    copy = np.frombuffer(memory, array.dtype, array.size, room - array.nbytes).reshape(array.shape)
    copy[...] = array
    behind = ctypes.c_void_p(copy.ctypes.data + copy.nbytes)
    assert ctypes.CDLL(None).mprotect(behind, mmap.PAGESIZE, 0) == 0
    return copy


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
@over_dtypes
@pytest.mark.parametrize(("outer", "axis"), [((), 1), ((5,), 0), ((1, 5), 1), ((2, 5), 1)])
@pytest.mark.parametrize("values", [28, 30, 60, 100, 150, 168, 224, 256, 360, 500, 720, 784, 1024])
def test_nothing_is_read_behind_a_batch(rng, values, outer, axis, dtype):
    """Where values repeat, some are compared that are as far apart as half of the batch."""
    for count in range(values, values + 4):
        shape = (*outer, count) if outer else (count, 130)
        x, dout = (at_the_end_of_memory(a) for a in rng.integers(3, size=(2, *shape)).astype(dtype))
        check_step(rng, x, dout, axis, 1, eps=1e-5)


@over_dtypes
@over_paths
@pytest.mark.parametrize("where", ["x", "dout"])
def test_a_value_that_is_not_finite_stays_in_its_feature(rng, where, shape, axis, threads, dtype):
    given = {
        name: rng.standard_normal(rows_for(shape, axis)).astype(dtype) for name in ("x", "dout")
    }
    set_num_threads(threads)

    def step():
        x, dout = (in_layout(rows, shape, axis) for rows in given.values())
        y, cache = batchnorm_forward(x, np.ones(shape[axis]), np.zeros(shape[axis]), axis=axis)
        dx, dgamma, dbeta = batchnorm_backward(dout, cache)
        by_feature = [np.moveaxis(a, axis, 0) for a in (y, dx)]
        return [*by_feature, cache.mean, cache.var, dgamma, dbeta]

    before = step()
    feature, bad = rng.integers(shape[axis]), rng.choice([np.nan, np.inf, -np.inf])
    given[where][rng.integers(len(given[where])), feature] = bad
    after = step()
    others = np.arange(shape[axis]) != feature
    for one, other in zip(before, after, strict=True):
        assert one[others].tobytes() == other[others].tobytes()
    spoiled = after[2:5] if where == "x" else after[4:]
    assert not np.isfinite([after[1][feature].min(), *(a[feature] for a in spoiled)]).any()


@over_dtypes
def test_a_gradient_sum_that_is_nan_is_one_nan(rng, dtype):
    """Whatever bits the NaN had: which of two a sum keeps depends on the order of an addition."""
    x, dout = rng.standard_normal((2, 40, 3)).astype(dtype)
    dout[7, 1] = np.copysign(np.nan, -1)
    _, cache = batchnorm_forward(x, np.ones(3), np.zeros(3))
    for gradient in batchnorm_backward(dout, cache)[1:]:
        assert gradient[1].tobytes() == dtype(np.nan).tobytes()


# A ReLU and a residual: the bits of the same apart, which the tests above hold to their digits


def hard_batch(rng, shape, axis, dtype):
    """Return a batch of ordinary, far, constant and outlying features, a gradient that overflows
    in float32 for some, a residual, and parameters of both signs."""
    rows = rows_for(shape, axis)
    x, dout, residual = (rng.standard_normal(rows).astype(dtype) for _ in range(3))
    x[:, 1::4] += 1e4
    x[:, 2::8] = 0.1
    x[0, 3::4] = 1e6
    dout[:, ::3] = 1e38 * np.clip(dout[:, ::3], -3, 3)
    gamma, beta = parameters(rng, rows[1], dtype)
    gamma[::2] *= -1
    return [in_layout(a, shape, axis) for a in (x, dout, residual)], gamma, beta


@over_dtypes
@over_paths
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("relu", "added"), [(True, False), (False, True), (True, True)])
def test_a_relu_and_a_residual_on_hard_data(rng, shape, axis, threads, dtype, frozen, relu, added):
    (x, dout, residual), gamma, beta = hard_batch(rng, shape, axis, dtype)
    statistics = moments(x, axis=axis)[1:]
    set_num_threads(threads)

    def forward(**followed):
        if frozen:
            return frozen_forward(x, *statistics, gamma, beta, axis=axis, **followed)
        return batchnorm_forward(x, gamma, beta, axis=axis, **followed)

    y, cache = forward()
    z = y + residual if added else y
    opened = np.where(z > 0, dout, 0).astype(dtype) if relu else dout
    expected = [np.maximum(z, 0) if relu else z, *batchnorm_backward(opened, cache)]
    y, cache = forward(relu=relu, residual=residual if added else None)
    found = [y, *batchnorm_backward(dout, cache)]
    if added:
        expected.append(opened)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
