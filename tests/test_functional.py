"""The functions against 80-bit arithmetic: values, layouts, given outputs, refused arguments."""

import tracemalloc
import weakref
from contextlib import contextmanager

import exact
import numpy as np
import pytest
from exact import COMBINATIONS, LAYOUTS, TOLERANCE, arrays_within, error

import bn_cy
from bn_cy import (
    BatchNorm,
    batchnorm_backward,
    batchnorm_forward,
    frozen_forward,
    functional,
    gradient_sums,
    input_gradient,
    moments,
    normalize,
)

FEATURES = [1, 2, 7, 16, 37, 64, 130]
ROWS = [2, 3, 8, 15, 33, 257, 5000]

ROW_CASES = [((rows, features), 1) for features in FEATURES for rows in ROWS]
ROW_CASES += [((2101, 256), 1)]  # three rows are read as one
COLUMN_CASES = [((f, n), 0) for f in (1, 3, 37, 130) for n in (2, 15, 64, 5000)]
IMAGE_CASES = [
    ((outer, features, side, side), 1)
    for outer in (1, 2, 5)
    for features in (1, 7, 16, 37, 130)
    for side in (1, 3, 7, 14)
    if outer * side > 1
]
BIG_IMAGE_CASES = [
    ((1, 16, 56, 56), 1),
    ((3, 7, 56, 56), 1),
    ((17, 5, 28, 28), 1),
    ((2, 2, 100, 101), 1),
    ((4, 1, 33, 33), 1),
    ((130, 3, 1, 31), 1),
]
AXIS_CASES = [
    (shape, axis)
    for shape in [(4, 9), (4, 5, 6), (3, 4, 5, 6), (2, 3, 4, 5, 3)]
    for axis in range(-len(shape), len(shape))
]
NHWC_CASES = [((4, 7, 7, 37), -1), ((2, 14, 14, 64), 3), ((2, 56, 56, 3), -1)]
CASES = ROW_CASES + COLUMN_CASES + IMAGE_CASES + BIG_IMAGE_CASES + AXIS_CASES + NHWC_CASES

LAYOUT_CASES = [
    ((33, 16), 1),
    ((16, 33), 0),
    ((5, 7, 3, 3), 1),
    ((4, 6, 5, 20), -1),
    ((3, 64, 9), 1),
]

DTYPES = [np.float32, np.float64]


def case_id(case):
    shape, axis = case
    return f"{'x'.join(map(str, shape))}-axis{axis}"


def draw(rng, shape, axis, dtype, scale=True, shift=True):
    """Return random x, dout, gamma and beta."""
    x = exact.ordinary(rng, shape, axis, dtype)
    dout = rng.standard_normal(shape).astype(dtype)
    return x, dout, *exact.parameters(rng, shape[axis], dtype, scale, shift)


def check_forward(y, x, gamma, beta, eps, axis):
    """Assert that y is what 80-bit arithmetic makes of x."""
    assert isinstance(y, np.ndarray)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert error(y, exact.forward(x, gamma, beta, eps, axis)) <= TOLERANCE[x.dtype]


def check_backward(gradients, dout, x, gamma, beta, eps, axis):
    """Assert that the gradients are what 80-bit arithmetic makes of dout and x."""
    dx, dgamma, dbeta = gradients
    exact_dx, exact_dgamma, exact_dbeta = exact.backward(dout, x, gamma, eps, axis)
    tolerance = TOLERANCE[x.dtype]
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    _, mean, var = exact.statistics(x, axis)
    dx_scale = exact.norm(exact.frozen_gradient(dout, x, var, gamma, eps, axis))
    assert error(dx, exact_dx, dx_scale) <= tolerance
    dbeta_scale, dgamma_scale = exact.sum_scales(dout, x, mean, var, eps, axis)
    for actual, parameter, expected, scale in (
        (dgamma, gamma, exact_dgamma, dgamma_scale),
        (dbeta, beta, exact_dbeta, dbeta_scale),
    ):
        if parameter is None:
            assert actual is None
        else:
            assert actual.shape == (x.shape[axis],)
            assert error(actual, expected, scale) <= tolerance


def check_both(x, dout, gamma, beta, axis, eps=1e-5):
    """Run forward and backward on the arrays as they are and check both."""
    y, cache = batchnorm_forward(x, gamma, beta, eps, axis=axis)
    check_forward(y, x, gamma, beta, eps, axis)
    check_backward(batchnorm_backward(dout, cache), dout, x, gamma, beta, eps, axis)


@contextmanager
def refused(exception, *words):
    """Expect an exception whose message holds every one of the words."""
    with pytest.raises(exception) as caught:
        yield caught
    for word in words:
        assert word in str(caught.value)


# Values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_agrees_with_extended_precision(rng, case, dtype):
    shape, axis = case
    x, dout, gamma, beta = draw(rng, shape, axis, dtype)
    check_both(x, dout, gamma, beta, axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=case_id)
def test_every_layout(rng, case, layout, dtype):
    shape, axis = case
    x, dout, gamma, beta = draw(rng, shape, axis, dtype)
    check_both(LAYOUTS[layout](x), LAYOUTS[layout](dout), gamma, beta, axis)


@pytest.mark.parametrize("dout_layout", ["c", "fortran", "channels_last", "strided"])
@pytest.mark.parametrize("x_layout", ["c", "fortran", "channels_last", "strided"])
def test_layouts_of_x_and_dout_may_differ(rng, x_layout, dout_layout):
    x, dout, gamma, beta = draw(rng, (6, 7, 5, 4), 1, np.float32)
    check_both(LAYOUTS[x_layout](x), LAYOUTS[dout_layout](dout), gamma, beta, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=case_id)
@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
def test_absent_parameters(rng, case, scale, shift, dtype):
    shape, axis = case
    x, dout, gamma, beta = draw(rng, shape, axis, dtype, scale, shift)
    check_both(x, dout, gamma, beta, axis)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eps(rng, eps, dtype):
    x, dout, gamma, beta = draw(rng, (40, 11), 1, dtype)
    check_both(x, dout, gamma, beta, 1, eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_by_finite_differences(rng, dtype):
    x, dout, gamma, beta = draw(rng, (5, 3, 2), 1, np.float64)

    def loss(x, gamma, beta):
        return float(np.sum(batchnorm_forward(x, gamma, beta)[0] * dout))

    _, cache = batchnorm_forward(x.astype(dtype), gamma.astype(dtype), beta.astype(dtype))
    dx, dgamma, dbeta = batchnorm_backward(dout.astype(dtype), cache)
    tolerance = 1e-9 if dtype == np.float64 else 1e-6
    for gradient, numeric in (
        (dx, exact.finite_differences(lambda v: loss(v, gamma, beta), x.copy())),
        (dgamma, exact.finite_differences(lambda v: loss(x, v, beta), gamma.copy())),
        (dbeta, exact.finite_differences(lambda v: loss(x, gamma, v), beta.copy())),
    ):
        assert error(gradient, numeric, exact.norm(dout)) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0, 7.5e10])
@pytest.mark.parametrize("shape", [(100, 3), (7, 3, 7, 7), (2, 3, 40, 40)])
def test_constant_feature_gives_exactly_beta(rng, shape, constant, dtype):
    x, dout, gamma, beta = draw(rng, shape, 1, dtype)
    x[:, 1] = constant
    y, cache = batchnorm_forward(x, gamma, beta)
    dx, dgamma, _ = batchnorm_backward(dout, cache)
    assert np.all(y[:, 1] == beta[1])
    assert dgamma[1] == 0
    assert np.all(np.isfinite(dx))


def test_broadcast_input(rng):
    row = rng.standard_normal((1, 5)).astype(np.float32)
    x = np.broadcast_to(row, (6, 5))
    y, _ = batchnorm_forward(x)
    assert np.all(y == 0)


def test_parameters_of_another_precision(rng):
    x, dout, gamma, beta = draw(rng, (50, 6), 1, np.float32)
    gamma, beta = gamma.astype(np.float64), beta.astype(np.float64)
    check_both(x, dout, gamma, beta, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_bytes(rng, dtype):
    x, dout, gamma, beta = draw(rng, (50, 6), 1, dtype)
    swapped = [array.astype(array.dtype.newbyteorder()) for array in (x, gamma, beta, dout)]
    y, cache = batchnorm_forward(*swapped[:3])
    check_forward(y, x, gamma, beta, 1e-5, 1)
    check_backward(batchnorm_backward(swapped[3], cache), dout, x, gamma, beta, 1e-5, 1)


@pytest.mark.parametrize("features", [1, 2, 6])
def test_strided_parameters(rng, features):
    x, dout, _, _ = draw(rng, (50, features), 1, np.float64)
    values = rng.uniform(0.5, 2, (features, 2))
    check_both(x, dout, values[:, 0], values[::-1, 1], 1)


# The same bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=case_id)
def test_same_bits_for_any_alignment_and_any_output(rng, case, dtype):
    shape, axis = case
    x, dout, gamma, beta = draw(rng, shape, axis, dtype)
    y, cache = batchnorm_forward(x, gamma, beta, axis=axis)
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    for layout in ("c", "one_element_off", "one_byte_off", "read_only"):
        given = LAYOUTS["one_element_off"](np.zeros_like(x))
        again, cache = batchnorm_forward(LAYOUTS[layout](x), gamma, beta, axis=axis, out=given)
        np.testing.assert_array_equal(again, y)
        gradients = batchnorm_backward(LAYOUTS[layout](dout), cache, out=given)
        for actual, expected in zip(gradients, (dx, dgamma, dbeta), strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_permuted_views_of_the_same_memory_give_the_same_bits(rng):
    x, dout, gamma, beta = draw(rng, (4, 6, 5, 37), -1, np.float32)
    y, cache = batchnorm_forward(x, gamma, beta, axis=-1)
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    nchw, nchw_dout = np.moveaxis(x, -1, 1), np.moveaxis(dout, -1, 1)
    y_view, cache = batchnorm_forward(nchw, gamma, beta, axis=1)
    dx_view, dgamma_view, dbeta_view = batchnorm_backward(nchw_dout, cache)
    np.testing.assert_array_equal(np.moveaxis(y_view, 1, -1), y)
    np.testing.assert_array_equal(np.moveaxis(dx_view, 1, -1), dx)
    np.testing.assert_array_equal(dgamma_view, dgamma)
    np.testing.assert_array_equal(dbeta_view, dbeta)


# Given outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "read_only"])
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=case_id)
def test_given_output_of_any_layout(rng, case, layout, dtype):
    shape, axis = case
    x, dout, gamma, beta = draw(rng, shape, axis, dtype)
    out = LAYOUTS[layout](np.zeros(shape, dtype))
    y, cache = batchnorm_forward(x, gamma, beta, axis=axis, out=out)
    assert y is out
    check_forward(out, x, gamma, beta, 1e-5, axis)
    gradients = batchnorm_backward(dout, cache, out=out)
    assert gradients[0] is out
    check_backward(gradients, dout, x, gamma, beta, 1e-5, axis)


def test_output_writes_nothing_outside_itself(rng):
    x, dout, gamma, beta = draw(rng, (9, 7, 5), 1, np.float32)
    frame = np.full((11, 9, 14), 42, np.float32)
    inside = frame[1:-1, 1:-1, 2:-2:2]
    _, cache = batchnorm_forward(x, gamma, beta, out=inside)
    batchnorm_backward(dout, cache, out=inside)
    inside[...] = 42
    assert np.all(frame == 42)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "read_only"])
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=case_id)
def test_backward_in_place(rng, case, layout):
    shape, axis = case
    x, dout, gamma, beta = draw(rng, shape, axis, np.float32)
    _, cache = batchnorm_forward(x, gamma, beta, axis=axis)
    out = LAYOUTS[layout](dout.copy())
    gradients = batchnorm_backward(out, cache, out=out)
    assert gradients[0] is out
    check_backward(gradients, dout, x, gamma, beta, 1e-5, axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "read_only"])
@pytest.mark.parametrize("case", LAYOUT_CASES + BIG_IMAGE_CASES, ids=case_id)
def test_normalize_in_place(rng, case, layout, dtype):
    shape, axis = case
    x, _, gamma, beta = draw(rng, shape, axis, dtype)
    statistics = rng.standard_normal(shape[axis]), rng.uniform(0.1, 3, shape[axis])
    out = LAYOUTS[layout](x.copy())
    y = normalize(out, *statistics, gamma, beta, axis=axis)
    assert normalize(out, *statistics, gamma, beta, axis=axis, out=out) is out
    np.testing.assert_array_equal(out, y)


def test_normalize_into_memory_that_overlaps_x(rng):
    memory = exact.ordinary(rng, (21, 5))
    kept = memory.copy()
    above, below = memory[:-1], memory[1:]
    spread = memory[:10], memory[:20:2]  # which begin alike
    turned = memory[:10], memory[15:5:-1]  # which begin apart
    for x, out in ((above, below), (below, above), (above, above[::-1]), spread, turned):
        with refused(ValueError, "out may be x itself"):
            normalize(x, np.zeros(5), np.ones(5), out=out)
    np.testing.assert_array_equal(memory, kept)


def test_frozen_forward_is_normalize_with_a_backward(rng):
    x, dout, gamma, beta = draw(rng, (20, 5), 1, np.float64)
    mean, var = rng.standard_normal(5), rng.uniform(0.5, 2, 5)
    y, cache = functional.frozen_forward(x, mean, var, gamma, beta, 1e-3)
    np.testing.assert_array_equal(y, normalize(x, mean, var, gamma, beta, 1e-3))
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    invstd = 1 / np.sqrt(var + 1e-3)
    np.testing.assert_allclose(dx, gamma * invstd * dout, rtol=1e-15)
    np.testing.assert_allclose(dgamma, np.sum(dout * (x - mean) * invstd, axis=0), rtol=1e-12)
    np.testing.assert_allclose(dbeta, np.sum(dout, axis=0), rtol=1e-12)


def test_everything_copied_at_once(rng):
    """The most arrays that a call holds: foreign byte order, strides and parameters, given out."""
    x, dout, gamma, beta = draw(rng, (20, 6), 1, np.float32)
    y, cache = batchnorm_forward(x, gamma, beta)
    dx, *_ = batchnorm_backward(dout, cache)
    foreign = [a.astype(">f4")[::-1][::-1] for a in (x, dout)]
    out = np.empty((20, 12), np.float32)[:, ::2]
    copied, cache = batchnorm_forward(foreign[0], gamma.astype(np.float64), beta.tolist(), out=out)
    np.testing.assert_array_equal(copied, y)
    batchnorm_backward(foreign[1].T.copy().T, cache, out=out)
    np.testing.assert_array_equal(out, dx)


def test_frozen_forward_with_a_backward_keeps_x(rng):
    x = exact.ordinary(rng, (20, 5))
    with refused(ValueError, "out", "x", "backward"):
        functional.frozen_forward(x, np.zeros(5), np.ones(5), out=x)


def test_backward_into_memory_that_overlaps_dout(rng):
    x, dout, gamma, beta = draw(rng, (64, 8), 1, np.float32)
    memory = np.zeros((65, 8), np.float32)
    memory[1:] = dout
    _, cache = batchnorm_forward(x, gamma, beta)
    try:
        gradients = batchnorm_backward(memory[1:], cache, out=memory[:-1])
    except ValueError as refusal:
        assert "out" in str(refusal)
        np.testing.assert_array_equal(memory[1:], dout)
    else:
        check_backward(gradients, dout, x, gamma, beta, 1e-5, 1)


def test_an_output_between_the_values_of_an_input(rng):
    """No value is of both, though one array lies within the extent of the other."""
    x, dout, gamma, beta = draw(rng, (64, 8), 1, np.float32)
    memory = np.zeros((64, 16), np.float32)
    memory[:, ::2], out = x, memory[:, 1::2]
    y, cache = batchnorm_forward(memory[:, ::2], gamma, beta, out=out)
    check_forward(y, x, gamma, beta, 1e-5, 1)
    memory[:, ::2] = dout
    gradients = batchnorm_backward(memory[:, ::2], cache, out=out)
    assert gradients[0] is out
    check_backward(gradients, dout, x, gamma, beta, 1e-5, 1)
    np.testing.assert_array_equal(memory[:, ::2], dout)


@pytest.mark.parametrize("part", [np.s_[:], np.s_[::-1], np.s_[:, ::-1]])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "read_only"])
def test_forward_output_may_not_share_memory_with_x(rng, layout, part):
    x = LAYOUTS[layout](exact.ordinary(rng, (20, 5)))
    kept = x.copy()
    with refused(ValueError, "out", "x"):
        batchnorm_forward(x, out=x[part])
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("layout", ["c", "strided"])
def test_backward_output_may_be_an_x_that_was_copied(rng, layout):
    x, dout, gamma, beta = draw(rng, (20, 5), 1, np.float32)
    given = LAYOUTS[layout](x)
    _, cache = batchnorm_forward(given, gamma, beta)
    if layout == "c":
        with refused(ValueError, "out may not share memory with x"):
            batchnorm_backward(dout, cache, out=given)
    else:
        gradients = batchnorm_backward(dout, cache, out=given)
        check_backward(gradients, dout, x, gamma, beta, 1e-5, 1)


def test_forward_output_beside_x_in_one_array(rng):
    both = np.zeros((2, 20, 5), np.float32)
    both[0] = x = exact.ordinary(rng, (20, 5))
    y, _ = batchnorm_forward(both[0], out=both[1])
    check_forward(y, x, None, None, 1e-5, 1)
    np.testing.assert_array_equal(both[0], x)


def outputs(rng):
    """Return a call into a given output for each function that takes one."""
    x, dout, gamma, beta = draw(rng, (20, 5), 1, np.float32)
    mean, var = moments(x)[1:]
    sums = gradient_sums(dout, x, mean, var)
    _, cache = batchnorm_forward(x, gamma, beta)
    return {
        "batchnorm_forward": lambda out: batchnorm_forward(x, gamma, beta, out=out)[0],
        "batchnorm_backward": lambda out: batchnorm_backward(dout, cache, out=out)[0],
        "normalize": lambda out: normalize(x, mean, var, gamma, beta, out=out),
        "input_gradient": lambda out: input_gradient(
            dout, x, mean, var, gamma, 1e-5, *sums, 20, out=out
        ),
    }


OUTPUT_FUNCTIONS = ["batchnorm_forward", "batchnorm_backward", "normalize", "input_gradient"]


@pytest.mark.parametrize("name", OUTPUT_FUNCTIONS)
def test_given_output_is_what_comes_back(rng, name):
    call = outputs(rng)[name]
    out = np.zeros((20, 5), np.float32)
    assert call(out) is out
    np.testing.assert_array_equal(out, call(None))


@pytest.mark.parametrize("name", OUTPUT_FUNCTIONS)
def test_unfit_outputs_are_refused(rng, name):
    call = outputs(rng)[name]
    read_only = LAYOUTS["read_only"](np.zeros((20, 5), np.float32))
    with refused(ValueError, "out", "writ"):
        call(read_only)
    assert np.all(read_only == 0)
    with refused(ValueError, "out", "(20, 5)", "(5, 20)"):
        call(np.zeros((5, 20), np.float32))
    with refused((TypeError, ValueError), "out", "float32", "float64"):
        call(np.zeros((20, 5), np.float64))
    with refused(TypeError, "out"):
        call([[0.0] * 5] * 20)


# Recycled outputs


@pytest.mark.parametrize("shape", [(4, 5), (64, 64), (2048, 512)])
@pytest.mark.parametrize(
    "hold", [lambda y: y, lambda y: y[::2, 1:], memoryview, lambda y: y.T.ravel("K")]
)
def test_a_held_output_is_never_written_again(rng, shape, hold):
    x = exact.ordinary(rng, shape)
    held = hold(batchnorm_forward(x)[0])
    kept = np.array(held)
    for _ in range(4):
        y, cache = batchnorm_forward(-2 * x)
        batchnorm_backward(y, cache)
        del y, cache
    np.testing.assert_array_equal(np.asarray(held), kept)


# Refused arguments


@pytest.mark.parametrize(
    "dtype",
    [
        "int32",
        "uint8",
        "bool",
        "complex64",
        "object",
        "float16",
        "longdouble",
        "datetime64[s]",
        "timedelta64[s]",
    ],
)
def test_other_dtypes_are_refused_by_name(dtype):
    x = np.ones((4, 3), dtype)
    name = np.dtype(dtype).name
    good = np.ones((4, 3), np.float32)
    statistics = np.zeros(3), np.ones(3)
    with refused(TypeError, "x", name):
        batchnorm_forward(x)
    with refused(TypeError, "x", name):
        moments(x)
    with refused(TypeError, "x", name):
        normalize(x, *statistics)
    with refused(TypeError, "x", name):
        gradient_sums(good, x, *statistics)
    if x.dtype.kind != "f":  # those are rounded
        with refused(TypeError, "dout", name):
            gradient_sums(x, good, *statistics)
    with refused((TypeError, ValueError), "out", name):
        normalize(good, *statistics, out=x)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_fewer_than_two_dimensions_are_refused(shape):
    with refused(ValueError, "x", str(shape)):
        batchnorm_forward(np.ones(shape, np.float32))
    with refused(ValueError, "x", str(shape)):
        moments(np.ones(shape, np.float32))


@pytest.mark.parametrize("axis", [2, -3, 10, 10**30, -(10**30)])
def test_axis_out_of_range(axis):
    with refused(ValueError, "axis", str(axis)):
        batchnorm_forward(np.ones((4, 3), np.float32), axis=axis)
    with refused(ValueError, "axis", str(axis)):
        moments(np.ones((4, 3), np.float32), axis=axis)


@pytest.mark.parametrize("axis", [1.0, "1", None])
def test_axis_must_be_an_integer(axis):
    with refused(TypeError, "axis"):
        batchnorm_forward(np.ones((4, 3), np.float32), axis=axis)


@pytest.mark.parametrize("relu", ["no", None, 2, 1.0, np.ones((4, 3)), [True]])
def test_what_only_counts_as_true_is_no_relu(rng, relu):
    x, row = rng.standard_normal((4, 3)), np.ones(3)
    for call in (
        lambda **options: batchnorm_forward(x, **options),
        lambda **options: batchnorm_forward(x, mask=np.ones(4, bool), **options),
        lambda **options: frozen_forward(x, row, row, **options),
        lambda **options: normalize(x, row, row, **options),
        lambda **options: gradient_sums(x, x, row, row, **options),
        lambda **options: input_gradient(x, x, row, row, row, 1e-5, row, row, 4, **options),
    ):
        with refused(TypeError, "relu must be True or False, got"):
            call(relu=relu)
        with_relu, without = (call(relu=flag)[0].tobytes() for flag in (True, False))
        assert with_relu != without
        for flag in (np.True_, 1, np.array(True)):
            assert call(relu=flag)[0].tobytes() == with_relu


@pytest.mark.parametrize("shape", [(8,), (6,), (7, 1), (5, 7), (1, 1, 7), (1, 8), ()])
@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_parameters_of_a_wrong_shape(rng, name, shape):
    x = exact.ordinary(rng, (5, 7))
    parameter = {name: np.ones(shape, np.float32)}
    with refused(ValueError, name, "(7,)", str(shape)):
        batchnorm_forward(x, **parameter)
    with refused(ValueError, name, "(7,)", str(shape)):
        normalize(x, np.zeros(7), np.ones(7), **parameter)


@pytest.mark.parametrize("dtype", ["complex128", "datetime64[D]", "object"])
@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_parameters_that_are_not_real_are_refused(rng, name, dtype):
    with refused(TypeError, name, dtype):
        batchnorm_forward(exact.ordinary(rng, (5, 7)), **{name: np.ones(7).astype(dtype)})


@pytest.mark.parametrize("name", ["mean", "var"])
def test_statistics_of_a_wrong_shape(rng, name):
    x = exact.ordinary(rng, (5, 7))
    statistics = {"mean": np.zeros(7), "var": np.ones(7), name: np.ones(8)}
    with refused(ValueError, name, "(7,)", "(8,)"):
        normalize(x, **statistics)
    with refused(ValueError, name, "(7,)", "(8,)"):
        gradient_sums(x, x, **statistics)


@pytest.mark.parametrize("wrong", [0, 30])
def test_negative_variance(rng, wrong):
    x = exact.ordinary(rng, (5, 37))
    mean, var = np.zeros(37), np.ones(37)
    var[[wrong, 33]] = -1e-300, -2
    for call in (
        lambda var: normalize(x, mean, var),
        lambda var: gradient_sums(x, x, mean, var)[1],
        lambda var: input_gradient(x, x, mean, var, None, 1e-5, mean, mean, 5),
    ):
        with refused(ValueError, "var", "negative", "-1e-300", f"at feature {wrong}"):
            call(var)
        nan = np.isnan(call(np.where(var < 0, np.nan, 1)))
        np.testing.assert_array_equal(nan, np.broadcast_to(var < 0, nan.shape))
        assert not np.any(np.isnan(call(np.full(37, -0.0))))


@pytest.mark.parametrize("name", ["sum_dout", "sum_dout_xhat"])
def test_sums_of_a_wrong_shape(rng, name):
    x = exact.ordinary(rng, (5, 7))
    sums = {"sum_dout": np.zeros(7), "sum_dout_xhat": np.ones(7), name: np.ones(8)}
    with refused(ValueError, name, "(7,)", "(8,)"):
        input_gradient(x, x, np.zeros(7), np.ones(7), None, 1e-5, count=5, **sums)


@pytest.mark.parametrize("eps", [-1e-5, float("nan")])
def test_negative_or_nan_eps(rng, eps):
    x = exact.ordinary(rng, (5, 7))
    statistics = np.zeros(7), np.ones(7)
    with refused(ValueError, "eps", str(eps)):
        batchnorm_forward(x, eps=eps)
    with refused(ValueError, "eps", str(eps)):
        normalize(x, *statistics, eps=eps)
    with refused(ValueError, "eps", str(eps)):
        gradient_sums(x, x, *statistics, eps=eps)


@pytest.mark.parametrize("value", [None, "1", 1j, np.ones(2), [1.0]], ids=repr)
def test_what_is_no_number(rng, value):
    x = exact.ordinary(rng, (5, 7))
    statistics, sums = (np.zeros(7), np.ones(7)), (np.zeros(7), np.zeros(7))
    with refused(TypeError, "eps", repr(value)):
        batchnorm_forward(x, eps=value)
    with refused(TypeError, "eps", repr(value)):
        input_gradient(x, x, *statistics, None, value, *sums, 5)
    with refused(TypeError, "count", repr(value)):
        input_gradient(x, x, *statistics, None, 1e-5, *sums, value)


@pytest.mark.parametrize("count", [0, -1, float("nan"), -(10**400)])
def test_count_must_be_positive(rng, count):
    x = exact.ordinary(rng, (5, 7))
    with refused(ValueError, "count", str(count)):
        input_gradient(x, x, np.zeros(7), np.ones(7), None, 1e-5, x[0], x[0], count)


@pytest.mark.parametrize("count", [1, 0.5])
def test_any_positive_count(rng, count):
    x, dout = rng.standard_normal((2, 5, 7))
    sums = rng.standard_normal((2, 7))
    dx = input_gradient(dout, x, np.zeros(7), np.ones(7), None, 0, *sums, count)
    np.testing.assert_allclose(dx, dout - sums[0] / count - x * sums[1] / count, atol=1e-12)


def test_numbers_beyond_a_double(rng):
    x = exact.ordinary(rng, (5, 7))
    form = x, x, np.zeros(7), np.ones(7), None, 1e-5, x[0], x[0]
    np.testing.assert_array_equal(input_gradient(*form, 10**400), input_gradient(*form, np.inf))
    with refused(ValueError, "eps"):
        batchnorm_forward(x, eps=10**400)


@pytest.mark.parametrize("shape", [(1, 7), (1, 7, 1, 1)])
def test_one_value_per_feature(rng, shape):
    x = rng.standard_normal(shape)
    with refused(ValueError, "x", str(shape)):
        batchnorm_forward(x)


def test_dout_must_be_like_x(rng):
    x, dout, _, _ = draw(rng, (5, 7), 1, np.float32)
    _, cache = batchnorm_forward(x)
    statistics = moments(x)[1:]
    for dx_of in (
        lambda dout: batchnorm_backward(dout, cache),
        lambda dout: gradient_sums(dout, x, *statistics),
        lambda dout: input_gradient(dout, x, *statistics, None, 1e-5, np.zeros(7), np.zeros(7), 5),
    ):
        with refused(ValueError, "dout", "(5, 7)", "(7, 5)"):
            dx_of(dout.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [np.float16, np.float32, np.float64, np.longdouble, ">f4"])
def test_dout_is_rounded_to_the_dtype_of_x(rng, dtype, given):
    x, dout, gamma, beta = draw(rng, (5, 7), 1, dtype)
    _, cache = batchnorm_forward(x, gamma, beta)
    statistics = moments(x)[1:]
    dout = (dout + 1e-3).astype(given)
    rounded = dout.astype(dtype)
    found, expected = batchnorm_backward(dout, cache), batchnorm_backward(rounded, cache)
    assert all(
        a.dtype == dtype and np.array_equal(a, b) for a, b in zip(found, expected, strict=True)
    )
    sums = gradient_sums(dout, x, *statistics)
    assert np.array_equal(sums, gradient_sums(rounded, x, *statistics))
    dx = input_gradient(dout, x, *statistics, gamma, 1e-5, *sums, 5)
    assert np.array_equal(dx, input_gradient(rounded, x, *statistics, gamma, 1e-5, *sums, 5))
    layer = bn_cy.BatchNorm(7, dtype=dtype)
    layer(x)
    assert layer.backward(dout).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis", "kept"),
    [
        ((6, 4), 1, (1, 4)),
        ((4, 6), 0, (4, 1)),
        ((2, 4, 3, 5), 1, (1, 4, 1, 1)),
        ((2, 4, 3, 5), 1, (4, 1, 1)),
        ((2, 3, 5, 4), -1, (1, 1, 1, 4)),
        ((2, 3, 5, 4), -1, (1, 4)),
        ((6, 1), 1, (1, 1)),
    ],
)
def test_parameters_as_sums_with_keepdims_have_them(rng, shape, axis, kept, dtype):
    """As most courses and write-ups keep them; gradients come in that shape."""
    features = shape[axis]
    x, dout = rng.standard_normal((2, *shape)).astype(dtype)
    flat = dict(zip(("gamma", "beta"), rng.standard_normal((2, features)), strict=True))
    parameters = {name: value.reshape(kept) for name, value in flat.items()}
    y, cache = batchnorm_forward(x, **parameters, axis=axis)
    expected, flat_cache = batchnorm_forward(x, **flat, axis=axis)
    assert np.array_equal(y, expected)
    dx, *gradients = batchnorm_backward(dout, cache)
    expected, *flat_gradients = batchnorm_backward(dout, flat_cache)
    assert np.array_equal(dx, expected)
    for gradient, wanted in zip(gradients, flat_gradients, strict=True):
        assert gradient.shape == kept
        assert np.array_equal(gradient.ravel(), wanted)
    _, mean, var = moments(x, axis=axis)
    statistics = {"mean": mean.reshape(kept), "var": var.reshape(kept)}
    assert np.array_equal(
        normalize(x, **statistics, **parameters, axis=axis),
        normalize(x, mean, var, **flat, axis=axis),
    )
    _, cache = bn_cy.frozen_forward(x, **statistics, gamma=parameters["gamma"], axis=axis)
    assert batchnorm_backward(dout, cache)[1].shape == kept
    sums = [value.reshape(kept) for value in gradient_sums(dout, x, mean, var, axis=axis)]
    input_gradient(
        dout,
        x,
        **statistics,
        gamma=parameters["gamma"],
        eps=1e-5,
        sum_dout=sums[0],
        sum_dout_xhat=sums[1],
        count=x.size // features,
        axis=axis,
    )


def test_one_parameter_may_have_another_shape_than_the_other(rng):
    x = rng.standard_normal((6, 4))
    _, cache = batchnorm_forward(x, np.ones(4), [[0.0] * 4])
    _, dgamma, dbeta = batchnorm_backward(x, cache)
    assert dgamma.shape == (4,) and dbeta.shape == (1, 4)


class Exported:
    """An array of another library, which can be had by one protocol alone."""

    def __init__(self, array, protocol):
        self.array = array
        for name in protocol:
            setattr(
                type(self),
                name,
                lambda own, *a, _name=name, **k: getattr(own.array, _name)(*a, **k),
            )


def exported(array, *protocol):
    return type("Tensor", (Exported,), {})(array, protocol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("protocol", [("__dlpack__", "__dlpack_device__"), ("__array__",)])
def test_tensors_of_other_libraries_are_taken_as_they_are(rng, protocol, dtype):
    x, dout, gamma, beta = draw(rng, (5, 7), 1, dtype)
    out = np.empty_like(x)
    tensors = [exported(array, *protocol) for array in (x, dout, out)]
    if "__dlpack__" in protocol and not np.from_dlpack(out).flags.writeable:  # NumPy before 2.1
        with refused(ValueError, "out", "read-only"):
            batchnorm_forward(tensors[0], out=tensors[2])
        tensors[2] = out
    y, cache = batchnorm_forward(tensors[0], gamma, beta, out=tensors[2])
    assert y is tensors[2]
    assert np.array_equal(out, batchnorm_forward(x, gamma, beta)[0])
    dx, *_ = batchnorm_backward(tensors[1], cache, out=tensors[2])
    assert dx is tensors[2]
    assert np.array_equal(out, batchnorm_backward(dout, cache)[0])
    layer = bn_cy.BatchNorm(7, dtype=dtype)
    assert layer(tensors[0], out=tensors[2]) is tensors[2]
    assert layer.backward(tensors[1], out=tensors[2]) is tensors[2]
    x[...] = 1  # the cache refers to the memory itself
    with pytest.raises(RuntimeError, match="x was changed"):
        batchnorm_backward(dout, cache)


def test_an_output_whose_memory_is_out_of_reach_is_refused(rng):
    class Copies:
        def __array__(self, dtype=None, copy=None):
            return np.zeros((5, 7))

    x = rng.standard_normal((5, 7))
    for out in (Copies(), [[0.0] * 7] * 5):
        with refused(TypeError, "out", type(out).__name__):
            batchnorm_forward(x, out=out)


def test_what_another_library_says_is_passed_on(rng):
    class OnAGraphicsCard:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("copy it to host memory first")

    with refused(TypeError, "x", "OnAGraphicsCard", "copy it to host memory first"):
        batchnorm_forward(OnAGraphicsCard())


def test_a_refused_call_leaves_the_output_alone(rng):
    x = exact.ordinary(rng, (5, 7))
    out = np.full((5, 7), 42, np.float32)
    with pytest.raises(ValueError, match="gamma"):
        batchnorm_forward(x, np.ones(8), out=out)
    with pytest.raises(ValueError, match="eps"):
        batchnorm_forward(x, eps=-1.0, out=out)
    _, cache = batchnorm_forward(x)
    with pytest.raises(ValueError, match="dout"):
        batchnorm_backward(x.T, cache, out=out)
    assert np.all(out == 42)


# Empty batches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 7, 7), (4, 5, 0), (4, 5, 0, 3)])
def test_empty_batch(shape, dtype):
    x = np.empty(shape, dtype)
    y, cache = batchnorm_forward(x, np.ones(5, dtype), np.zeros(5, dtype))
    dx, dgamma, dbeta = batchnorm_backward(x, cache)
    for array in (y, dx):
        assert (array.shape, array.dtype) == (shape, dtype)
    np.testing.assert_array_equal(dgamma, np.zeros(5))
    np.testing.assert_array_equal(dbeta, np.zeros(5))


def test_an_empty_batch_has_no_statistics(rng):
    """Zeros, in memory that was that of another batch's."""
    for _ in range(10):
        batchnorm_forward(exact.ordinary(rng, (20, 50)))
        _, cache = batchnorm_forward(np.empty((0, 50), np.float32))
        assert not cache.mean.any()
        assert not cache.var.any()


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_no_features(rows):
    x = np.empty((rows, 0), np.float32)
    y, cache = batchnorm_forward(x, np.ones(0), np.zeros(0))
    dx, dgamma, dbeta = batchnorm_backward(x, cache)
    assert y.shape == dx.shape == (rows, 0)
    assert dgamma.shape == dbeta.shape == (0,)


def test_pieces_of_an_empty_batch():
    x = np.empty((0, 5), np.float32)
    count, mean, var = moments(x)
    assert (count, mean.shape, var.shape) == (0, (5,), (5,))
    assert normalize(x, np.zeros(5), np.ones(5)).shape == (0, 5)
    sums = gradient_sums(x, x, np.zeros(5), np.ones(5))
    np.testing.assert_array_equal(sums, np.zeros((2, 5)))
    assert input_gradient(x, x, mean, var, None, 1e-5, *sums, count).shape == (0, 5)


# The cache


def test_cache_holds_x_itself_and_little_else(rng):
    x = rng.standard_normal((32768, 64), np.float32)
    _, cache = batchnorm_forward(x, np.ones(64), np.zeros(64))
    arrays = list(arrays_within(cache))
    assert any(np.shares_memory(array, x) for array in arrays)
    others = sum(array.nbytes for array in arrays if not np.shares_memory(array, x))
    assert others <= 64 * 8 * 16


def test_cache_keeps_neither_y_nor_x_alive_after_itself(rng):
    x = rng.standard_normal((64, 8), np.float32)
    y, cache = batchnorm_forward(x)
    x_alive, y_alive = weakref.ref(x), weakref.ref(y)
    del y
    assert y_alive() is None
    del x
    assert x_alive() is not None
    del cache
    assert x_alive() is None


def test_no_temporary_of_the_size_of_x(rng):
    x = rng.standard_normal((32768, 64), np.float32)
    out = np.empty_like(x)
    batchnorm_backward(x, batchnorm_forward(x, out=out)[1], out=out)
    tracemalloc.start()
    try:
        _, cache = batchnorm_forward(x, out=out)
        batchnorm_backward(out, cache, out=out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 8


def test_parameters_may_change_between_forward_and_backward(rng):
    x, dout, gamma, beta = draw(rng, (33, 7), 1, np.float32)
    kept = gamma.copy()
    _, cache = batchnorm_forward(x, gamma, beta)
    gamma[:] = 100
    beta[:] = 100
    check_backward(batchnorm_backward(dout, cache), dout, x, kept, beta, 1e-5, 1)


def test_backward_twice_and_of_two_interleaved_batches(rng):
    first = draw(rng, (33, 7), 1, np.float32)
    second = draw(rng, (20, 7), 1, np.float32)
    caches = [batchnorm_forward(x, gamma, beta)[1] for x, _, gamma, beta in (first, second)]
    for (x, dout, gamma, beta), cache in (
        (first, caches[0]),
        (second, caches[1]),
        (first, caches[0]),
    ):
        check_backward(batchnorm_backward(dout, cache), dout, x, gamma, beta, 1e-5, 1)


def test_inputs_are_left_alone(rng):
    arrays = draw(rng, (33, 7), 1, np.float32)
    kept = [array.copy() for array in arrays]
    x, dout, gamma, beta = arrays
    batchnorm_backward(dout, batchnorm_forward(x, gamma, beta)[1])
    for array, before in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(array, before)


# The pieces

PIECE_CASES = [*LAYOUT_CASES, ((257, 130), 1), ((3, 7, 56, 56), 1), ((2, 1), 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PIECE_CASES, ids=case_id)
def test_moments(rng, case, dtype):
    shape, axis = case
    x = exact.ordinary(rng, shape, axis, dtype)
    result = moments(x, axis=axis)
    assert isinstance(result, tuple)
    assert result._fields == ("count", "mean", "var")
    count, mean, var = exact.statistics(x, axis)
    assert result.count == count
    assert (result.mean.dtype, result.var.dtype) == (np.float64, np.float64)
    mean_tolerance, var_tolerance = (2e-7, 3e-7) if dtype == np.float32 else (1e-14, 1e-14)
    assert np.all(np.abs(result.mean - mean) <= mean_tolerance * np.sqrt(var))
    assert np.all(np.abs(result.var - var) <= var_tolerance * var)


def test_moments_of_one_value(rng):
    x = rng.standard_normal((1, 5))
    count, mean, var = moments(x)
    assert count == 1
    np.testing.assert_array_equal(mean, x[0])
    np.testing.assert_array_equal(var, np.zeros(5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [1, 10, 256])
def test_moments_of_parts_merge_to_those_of_the_whole(rng, split, dtype):
    x = exact.ordinary(rng, (257, 37), dtype=dtype)
    na, mean_a, var_a = moments(x[:split])
    nb, mean_b, var_b = moments(x[split:])
    n, d = na + nb, mean_b - mean_a
    mean = mean_a + d * nb / n
    var = (var_a * na + var_b * nb + d * d * na * nb / n) / n
    count, exact_mean, exact_var = exact.statistics(x)
    assert n == count
    assert error(mean, exact_mean) <= TOLERANCE[x.dtype]
    assert error(var, exact_var) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
@pytest.mark.parametrize("case", PIECE_CASES, ids=case_id)
def test_normalize_with_given_statistics(rng, case, scale, shift, dtype):
    shape, axis = case
    x, _, gamma, beta = draw(rng, shape, axis, dtype, scale, shift)
    mean, var = rng.standard_normal(shape[axis]), rng.uniform(0.1, 3, shape[axis])
    y = normalize(x, mean, var, gamma, beta, 1e-3, axis=axis)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    expected = exact.normalize(x, mean, var, gamma, beta, 1e-3, axis)
    # Before beta is added: the sum may come close to zero.
    scale = exact.norm(exact.normalize(x, mean, var, gamma, None, 1e-3, axis))
    assert error(y, expected, scale) <= TOLERANCE[x.dtype]


def test_normalize_far_from_zero(rng):
    x = (1e6 + rng.standard_normal((1000, 5))).astype(np.float32)
    _, mean, var = exact.statistics(x)
    y = normalize(x, mean.astype(np.float64), var.astype(np.float64))
    assert error(y, exact.forward(x)) <= 5e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PIECE_CASES, ids=case_id)
def test_gradient_sums(rng, case, dtype):
    shape, axis = case
    x, dout, _, _ = draw(rng, shape, axis, dtype)
    _, mean, var = moments(x, axis=axis)
    sums = gradient_sums(dout, x, mean, var, 1e-3, axis=axis)
    expected = exact.gradient_sums(dout, x, mean, var, 1e-3, axis)
    scales = exact.sum_scales(dout, x, mean, var, 1e-3, axis)
    for actual, wanted, scale in zip(sums, expected, scales, strict=True):
        assert error(actual, wanted, scale) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("layout", ["c", "fortran", "channels_last", "strided"])
@pytest.mark.parametrize("case", PIECE_CASES, ids=case_id)
def test_pieces_compose_to_forward_and_backward(rng, case, layout, scale, dtype):
    shape, axis = case
    x, dout, gamma, beta = draw(rng, shape, axis, dtype, scale)
    x, dout = LAYOUTS[layout](x), LAYOUTS[layout](dout)
    count, mean, var = moments(x, axis=axis)
    check_forward(normalize(x, mean, var, gamma, beta, axis=axis), x, gamma, beta, 1e-5, axis)
    sum_dout, sum_dout_xhat = gradient_sums(dout, x, mean, var, axis=axis)
    dx = input_gradient(dout, x, mean, var, gamma, 1e-5, sum_dout, sum_dout_xhat, count, axis=axis)
    dgamma = sum_dout_xhat if scale else None
    check_backward((dx, dgamma, sum_dout), dout, x, gamma, beta, 1e-5, axis)


@pytest.mark.parametrize("gamma_dtype", DTYPES)
def test_pieces_have_the_bits_of_the_backward(rng, gamma_dtype):
    x, dout, gamma, _ = draw(rng, (257, 37), 1, np.float32)
    gamma = rng.uniform(0.5, 2, 37).astype(gamma_dtype)
    dx, dgamma, _ = batchnorm_backward(dout, batchnorm_forward(x, gamma)[1])
    count, mean, var = moments(x)
    sums = gradient_sums(dout, x, mean, var)
    pieces = input_gradient(dout, x, mean, var, gamma, 1e-5, *sums, count)
    np.testing.assert_array_equal(pieces, dx)
    np.testing.assert_array_equal(sums[1].astype(np.float32), dgamma)


def test_gradient_of_a_batch_in_two_parts(rng):
    x, dout, gamma, beta = draw(rng, (100, 16), 1, np.float64)
    mean, var = moments(x)[1:]
    parts = [(dout[:30], x[:30]), (dout[30:], x[30:])]
    sums = np.sum([gradient_sums(*part, mean, var) for part in parts], axis=0)
    dx = [input_gradient(*part, mean, var, gamma, 1e-5, *sums, 100) for part in parts]
    gradients = np.concatenate(dx), sums[1], sums[0]
    check_backward(gradients, dout, x, gamma, beta, 1e-5, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_gradient_of_frozen_statistics(rng, dtype):
    x, dout, gamma, _ = draw(rng, (33, 7), 1, dtype)
    mean, var, zero = np.zeros(7), rng.uniform(0.5, 2, 7), np.zeros(7)
    dx = input_gradient(dout, x, mean, var, gamma, 1e-5, zero, zero, 33)
    assert error(dx, exact.frozen_gradient(dout, x, var, gamma)) <= TOLERANCE[x.dtype]


# What np.asarray takes


class Wrapped:
    """An object that is an array to np.asarray alone."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        assert not copy
        return self.array


@pytest.mark.parametrize("wrap", [Wrapped, memoryview], ids=["__array__", "buffer"])
def test_objects_that_are_arrays(rng, wrap):
    x, dout, gamma, beta = draw(rng, (33, 7), 1, np.float32)
    y, cache = batchnorm_forward(wrap(x), wrap(gamma), wrap(beta))
    check_forward(y, x, gamma, beta, 1e-5, 1)
    assert any(np.shares_memory(array, x) for array in arrays_within(cache))
    gradients = batchnorm_backward(wrap(dout), cache)
    check_backward(gradients, dout, x, gamma, beta, 1e-5, 1)


def test_read_only_memory_map(rng, tmp_path):
    x, dout, gamma, beta = draw(rng, (33, 7), 1, np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "dout.npy", dout)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    mapped_dout = np.load(tmp_path / "dout.npy", mmap_mode="r")
    y, cache = batchnorm_forward(mapped, gamma, beta)
    assert type(y) is np.ndarray
    check_forward(y, x, gamma, beta, 1e-5, 1)
    check_backward(batchnorm_backward(mapped_dout, cache), dout, x, gamma, beta, 1e-5, 1)


def test_public_names_have_docstrings():
    for name in bn_cy.__all__:
        assert name == "__version__" or getattr(bn_cy, name).__doc__


@pytest.mark.parametrize("name", ["x", "dout", "gamma", "mean"])
def test_masked_arrays_are_refused(rng, name):
    """np.asarray drops a mask without a word."""
    x, dout, gamma, _ = draw(rng, (12, 5), 1, np.float32)
    _, cache = batchnorm_forward(x)
    given = {"x": x, "dout": dout, "gamma": gamma, "mean": np.zeros(5)}
    masked = np.ma.masked_greater(given[name], 0.5)
    calls = {
        "x": lambda: batchnorm_forward(masked),
        "dout": lambda: batchnorm_backward(masked, cache),
        "gamma": lambda: batchnorm_forward(x, masked),
        "mean": lambda: normalize(x, masked, np.ones(5)),
    }
    with refused(TypeError, name, "MaskedArray", f"{name}.filled") as error:
        calls[name]()
    assert ("mask=" in str(error.value)) == (name == "x")  # no other has such an argument


def test_sparse_matrices_and_other_things_are_refused_by_name():
    sparse = pytest.importorskip("scipy.sparse").csr_matrix(np.eye(5, dtype=np.float32))
    with refused(TypeError, "x", "csr_matrix", "x.toarray()"):
        batchnorm_forward(sparse)
    with refused(TypeError, "x", "dict"):
        batchnorm_forward({})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_out_may_not_share_memory_with_a_parameter(rng, name, dtype):
    """It would be written over while it is still read."""
    x = rng.standard_normal((8, 6)).astype(dtype)
    out = np.ones((8, 6), dtype)
    given = {name: out[3]}
    with refused(ValueError, "out", "gamma or beta"):
        batchnorm_forward(x, **given, out=out)
    with refused(ValueError, "out", "gamma or beta"):
        normalize(x, np.zeros(6), np.ones(6), **given, out=out)
    assert np.all(out == 1)
    apart = np.ones((8, 12), dtype)[:, ::2]  # around the parameter, but not in it
    given = {name: apart.base[0, 1::2]}
    np.testing.assert_array_equal(
        batchnorm_forward(x, **given, out=apart)[0],
        batchnorm_forward(x, **{name: np.ones(6, dtype)})[0],
    )


# Sizes


def test_the_statistics_of_too_many_features_are_refused():
    """An empty array may have so many that their bytes are no number of the machine."""
    x = np.empty((0, 2**60), np.float32)
    with pytest.raises(MemoryError, match="no memory for the statistics of 1152921504606846976"):
        batchnorm_forward(x)
    statistics = np.broadcast_to(np.float32(1), x.shape[1:])
    with pytest.raises(MemoryError, match="no memory for the statistics of 1152921504606846976"):
        normalize(x, statistics, statistics)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_column_without_an_eps(rng, dtype):
    """y is beta, and the gradients that divide by its deviation are 0."""
    x = rng.standard_normal((20, 3)).astype(dtype)
    x[:, 1] = 0.1
    gamma, beta = np.full(3, 2, dtype), np.arange(3, dtype=dtype)
    y, cache = batchnorm_forward(x, gamma, beta, eps=0)
    dx, dgamma, dbeta = batchnorm_backward(np.ones_like(x), cache)
    assert (y[:, 1] == 1).all()
    assert not dx[:, 1].any()
    assert (dgamma[1], dbeta[1]) == (0, 20)
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()
    assert (normalize(x, np.zeros(3), np.zeros(3), gamma, beta, eps=0) == beta).all()


# x that is not what it was


def every_value_of(x):
    x *= 2


def clipped(x):
    np.maximum(x, np.median(x), out=x)


def the_last_bits(x):
    np.nextafter(x, 0, out=x)


def the_next_batch(x):
    x[...] = np.roll(x, 1, axis=0)


def the_first_example(x):
    x[0] += 1


def the_last_value(x):
    x.flat[-1] = 0


def every_sign(x):
    x *= -1


CHANGES = [
    every_sign,
    every_value_of,
    clipped,
    the_last_bits,
    the_next_batch,
    the_first_example,
    the_last_value,
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 3), (300, 70), (7, 5, 6, 4)])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("frozen", [False, True])
def test_an_x_that_changed_is_noticed(rng, change, shape, dtype, frozen):
    x = rng.standard_normal(shape).astype(dtype)
    before, dout = x.copy(), rng.standard_normal(shape).astype(dtype)
    _, cache = (
        bn_cy.frozen_forward(x, np.zeros(shape[1]), np.ones(shape[1]))
        if frozen
        else batchnorm_forward(x)
    )
    dx, _, _ = batchnorm_backward(dout, cache)
    change(x)
    out = np.full_like(x, 7)
    with pytest.raises(RuntimeError, match=r"^x was changed after the forward"):
        batchnorm_backward(dout, cache, out=out)
    assert np.all(out == 7)
    x[...] = before  # the cache is as it was
    assert np.array_equal(batchnorm_backward(dout, cache)[0], dx)


@pytest.mark.parametrize("size", [1, 2, 63, 64])
def test_any_value_of_a_small_x_that_changed_is_noticed(rng, size):
    x = rng.standard_normal((size, 1)).astype(np.float32)
    for value in range(size):
        _, cache = bn_cy.frozen_forward(x, [0.0], [1.0])
        x[value] += 1
        with pytest.raises(RuntimeError, match=r"^x was changed"):
            batchnorm_backward(x, cache)


def test_an_x_that_was_copied_may_change(rng):
    x = rng.standard_normal((20, 6)).astype(np.float32)[:, ::2]
    _, cache = batchnorm_forward(x)
    x *= 2
    batchnorm_backward(x, cache)


@pytest.mark.parametrize("function", [batchnorm_forward, BatchNorm(3), BatchNorm(3).eval()])
@pytest.mark.parametrize("strides", [(0, 4), (4, 4), (8, 4), (12, 0), (-8, 4)])
def test_an_output_whose_elements_are_the_same_memory_is_refused(rng, function, strides):
    x = rng.standard_normal((6, 3)).astype(np.float32)
    memory = np.zeros(40, np.float32)
    out = np.lib.stride_tricks.as_strided(memory[20:], x.shape, strides)
    for options in ({}, {"mask": np.arange(6) > 1}):
        if function is batchnorm_forward or not options:
            with pytest.raises(ValueError, match="out must have memory of its own for every"):
                function(x, out=out, **options)
    assert not memory.any()


@pytest.mark.parametrize("strides", [(0, 4), (4, 4), (8, 4), (-8, 4)])
def test_an_output_of_two_rows_in_the_same_memory_is_refused(rng, strides):
    x, memory = rng.standard_normal((2, 3)).astype(np.float32), np.zeros(20, np.float32)
    out = np.lib.stride_tricks.as_strided(memory[10:], x.shape, strides)
    with pytest.raises(ValueError, match="out must have memory of its own for every"):
        batchnorm_forward(x, out=out)
    assert not memory.any()


@pytest.mark.parametrize("strides", [(12, 4), (-12, 4), (24, 8), (4, 24), (32, 4)])
def test_an_output_of_any_strides(rng, strides):
    x = rng.standard_normal((6, 3)).astype(np.float32)
    out = np.lib.stride_tricks.as_strided(np.zeros(80, np.float32)[20:], x.shape, strides)
    np.testing.assert_array_equal(batchnorm_forward(x, out=out)[0], batchnorm_forward(x)[0])
