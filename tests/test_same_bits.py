"""The same bits for any number of threads, memory, layout and output, on every code path.

`bn_cy._digests` and `test_threads.py` hold them over the instruction sets; here one process
compares the bits of everything that a training step and an evaluation leave behind.
"""

import numpy as np
import pytest
from exact import LAYOUTS, parameters

from bn_cy import (
    BatchNorm,
    functional,
    gradient_sums,
    moments,
    normalize,
    set_num_threads,
)
from bn_cy._digests import CASES, digest

DTYPES = [np.float32, np.float64]

LARGE = [((9973, 111), 1), ((1_100_003, 1), 1), ((3, 5, 273, 257), 1), ((523, 41, 7, 7), 1)]
NARROW = [((1003, 100), 1), ((128, 4, 14, 14), 1)]  # threads share rows, and not features
WIDE = [((29, 2503), 1)]  # rows of several blocks
PATHS = [*CASES, *NARROW, *WIDE, *LARGE]
RECYCLED = [((700, 101), 1), ((1, 3, 160, 141), 1)]  # outputs from the pool, not from malloc


@pytest.fixture(autouse=True)
def threads():
    """Leave the number of threads to OpenMP after the test."""
    yield
    set_num_threads(None)


def draw(rng, shape, axis, dtype):
    """Return data on which every order of summation rounds differently, a gradient, parameters."""
    x = (3 + rng.standard_normal(shape)).astype(dtype)
    dout = rng.standard_normal(shape).astype(dtype)
    return x, dout, *parameters(rng, shape[axis], dtype)


FOLLOWED = [(False, False), (True, False), (False, True), (True, True)]  # by relu, residual


def step(x, dout, gamma, beta, axis, out=None):
    """Return the digests of training steps, bare and followed, and of evaluations after them."""
    layer = BatchNorm(len(gamma), axis=axis, dtype=x.dtype, on_nonfinite="update")
    layer.gamma[:], layer.beta[:] = gamma, beta
    digests = []
    for relu, added in FOLLOWED:
        layer.relu = relu
        for mode in (True, False):
            layer.train(mode)
            y = digest(layer.forward(x, out=out, residual=dout if added else None))
            dx = layer.backward(dout, out=out)
            digests += [y, digest(*dx) if added else digest(dx), digest(layer.dgamma, layer.dbeta)]
    return digests, digest(layer.running_mean, layer.running_var)


def beginning_at(array, elements):
    """Return a copy that starts so many elements behind a page's."""
    raw = np.empty(array.nbytes + 8192, np.uint8)
    start = -raw.ctypes.data % 4096 + elements * array.itemsize
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), PATHS)
def test_any_number_of_threads_and_any_repetition(rng, shape, axis, dtype):
    x, *others = draw(rng, shape, axis, dtype)
    found = {}
    counts = range(2, 17) if x.size < 200_000 else (2, 3, 16)
    for threads in (1, *counts, 61, 1):
        set_num_threads(threads)
        found[threads] = step(x, *others, axis)
        assert found[threads] == found[1], threads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [*CASES, *RECYCLED, *LARGE])
def test_any_alignment_and_given_or_fresh_outputs(rng, shape, axis, dtype):
    x, dout, gamma, beta = draw(rng, shape, axis, dtype)
    expected = step(x, dout, gamma, beta, axis)
    shifts = range(1, 16) if x.size < 100_000 else (1, 15)
    for shift in shifts:
        out = beginning_at(x, 16 - shift)
        moved = beginning_at(x, shift), beginning_at(dout, (5 * shift) % 16)
        assert step(*moved, gamma, beta, axis) == expected
        assert step(*moved, gamma, beta, axis, out) == expected


@pytest.fixture
def stream_from(settings):
    """Set from how many bytes outputs are written past the cache; undone after the test."""
    return functional._stream_from


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), PATHS)
def test_outputs_through_and_past_the_cache(rng, stream_from, shape, axis, dtype):
    """Past it go whole lines, and words at the ragged ends."""
    x, dout, gamma, beta = draw(rng, shape, axis, dtype)
    stream_from(1 << 60)
    expected = step(x, dout, gamma, beta, axis)
    stream_from(0)
    for shift in (0, 1, 15) if x.size < 200_000 else (3,):
        for threads in (1, 2, 5):
            set_num_threads(threads)
            assert step(x, dout, gamma, beta, axis, beginning_at(x, shift)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), PATHS)
def test_normalize_in_place(rng, stream_from, shape, axis, dtype):
    x, _, gamma, beta = draw(rng, shape, axis, dtype)
    _, *statistics = moments(x, axis=axis)
    expected = digest(normalize(x, *statistics, gamma, beta, axis=axis))
    for size in (0, 1 << 60):
        stream_from(size)
        for threads in (1, 2, 5):
            set_num_threads(threads)
            out = beginning_at(x, 3)
            normalize(out, *statistics, gamma, beta, axis=axis, out=out)
            assert digest(out) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((33, 14, 5, 9), 1), ((210, 37), 1), ((7, 501), 0)])
def test_inputs_that_are_copied(rng, shape, axis, dtype):
    """A copy is made in C order, and has the bits of what is in C order."""
    x, dout, gamma, beta = draw(rng, shape, axis, dtype)
    expected = step(x, dout, gamma, beta, axis)
    for name in ("strided", "reversed", "sliced_rows", "one_byte_off", "read_only"):
        assert step(LAYOUTS[name](x), LAYOUTS[name](dout), gamma, beta, axis) == expected, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_permuted_axes_of_the_same_memory(rng, dtype):
    x, dout, gamma, beta = draw(rng, (6, 11, 13, 37), -1, dtype)
    bits = set()
    for axes in ((0, 1, 2, 3), (0, 3, 1, 2), (3, 0, 1, 2), (3, 2, 1, 0)):
        layer = BatchNorm(37, axis=axes.index(3), dtype=dtype)
        layer.gamma[:], layer.beta[:] = gamma, beta
        y, dx = layer(x.transpose(axes)), layer.backward(dout.transpose(axes))
        back = np.argsort(axes)
        bits.add(digest(y.transpose(back), dx.transpose(back), layer.dgamma, layer.dbeta))
    assert len(bits) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 64, 7, 7), (150, 90, 15, 16), (256, 512, 2)])
def test_all_features_rescued_by_threads_that_share_rows(rng, shape, dtype):
    """Constants, whose variance is summed again, and gradients whose sums are not finite."""
    x, dout, gamma, beta = draw(rng, shape, 1, dtype)
    x[:, 5:] = 7
    dout[0] = np.inf
    dout[1] = np.nan
    found = set()
    for threads in (1, 2, 3, 4):
        set_num_threads(threads)
        found.add(str(step(x, dout, gamma, beta, 1)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 5])
def test_features_do_not_depend_on_their_neighbours(rng, dtype, threads):
    """A rescue of some features, here of one in three, leaves the bits of the others alone."""
    set_num_threads(threads)
    x, _, _, _ = draw(rng, (3001, 45), 1, dtype)
    _, mean, var = moments(x)
    x[0, ::3] = 1e9
    _, mean_beside, var_beside = moments(x)
    others = np.arange(45) % 3 != 0
    assert digest(mean_beside[others], var_beside[others]) == digest(mean[others], var[others])


def random_case(rng):
    """Return a shape of up to 200,000 values, rows, runs or images, and its axis."""
    while True:
        batch, height, width = np.exp(rng.uniform(0, np.log([5000, 40, 40]))).astype(int)
        features = int(np.exp(rng.uniform(0, np.log(3000))))
        shape, axis = [
            ((batch, features), 1),
            ((features, batch), 0),
            ((batch, features, height, width), 1),
            ((batch, height, width, features), -1),
        ][rng.integers(4)]
        if 2 * features <= np.prod(shape) <= 200_000:
            return tuple(map(int, shape)), axis


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data", ["normal", "far", "zero", "constant", "nan"])
def test_any_shape(rng, stream_from, data, dtype):
    """Shapes that nobody chose; with data that are summed again, a feature or all of them."""
    for _ in range(60):
        shape, axis = random_case(rng)
        x, dout, gamma, beta = draw(rng, shape, axis, dtype)
        features = np.moveaxis(x, axis, -1)
        if data == "far":
            x += dtype(1e7)
        elif data == "zero":
            x[...] = 0
        elif data == "constant":
            features[..., len(gamma) // 4 :] = 7
        elif data == "nan":
            dout.flat[rng.integers(x.size)] = np.nan
        found = set()
        for threads in (1, 2, 3, 8):
            for limit in (0, 1 << 60):
                set_num_threads(threads)
                stream_from(limit)
                found.add(str(step(x, dout, gamma, beta, axis)))
        assert len(found) == 1, (shape, axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4099), (4, 2047), (5, 2383), (7, 2999), (40, 1031)])
def test_nan_is_the_same_nan(rng, shape, dtype):
    """inf - inf has another sign than np.nan, and a sum of both that of either."""
    x, *others = draw(rng, shape, 1, dtype)
    x[rng.random(shape) < 0.08] = np.nan
    x[rng.random(shape) < 0.08] = np.inf
    found = set()
    for threads in (1, 2, 3, 6, 8):
        set_num_threads(threads)
        found.add(str(step(x, *others, 1)))
    assert len(found) == 1


def test_what_lies_behind_the_batch_has_no_say(rng):
    """Rows are compared with some below them, of which a cell of 502 rows has no 504th."""
    memory = (3 + rng.standard_normal((2008, 520))).astype(np.float32)
    x = memory[:2006]
    before = digest(*moments(x)[1:])
    memory[2006:] = x[1506:1508]
    assert digest(*moments(x)[1:]) == before


def test_an_image_of_1024_rows_is_summed_in_one_go():
    """So 1 is lost beside 2^60, though that is taken away again."""
    dout = np.zeros((2, 2, 1024 * 2032), np.float32)
    dout[0, 0, [0, 32 * 2032, 40 * 2032]] = 1, 2.0**60, -(2.0**60)
    sum_dout, _ = gradient_sums(dout, dout, np.zeros(2), np.ones(2))
    assert sum_dout[0] == 0  # 1 with more cells than one


def test_from_when_on_outputs_go_past_the_cache(settings):
    before = functional._stream_from(12345)
    assert before > 12345
    assert functional._stream_from(before) == 12345
