"""Scale and shift of a layer in eval mode, and what folds them into the layer before or after.

A folded network is compared with the one it was made of, in 80-bit arithmetic.
"""

import doctest

import exact
import numpy as np
import pytest
from exact import COMBINATIONS, error
from numpy.lib.stride_tricks import sliding_window_view

from bn_cy import BatchNorm, fold, fold_next, folding, layer

FEATURES = 5
OTHERS = 3  # inputs of a layer before, outputs of a layer after


def trained(rng, features=FEATURES, **options):
    """Return a float64 layer with random parameters and running statistics."""
    return exact.trained(rng, BatchNorm(features, **{"dtype": np.float64, "eps": 1e-3, **options}))


def exact_eval(layer, x, axis=-1):
    """Return what the layer gives in eval mode."""
    statistics = layer.running_mean, layer.running_var
    return exact.normalize(x, *statistics, layer.gamma, layer.beta, layer.eps, axis)


def apply(x, W, b, axis):
    """Return a linear layer's or a convolution's y, features along the last axis of x and y.

    The convolution has no padding: it is a product at every place that the kernel fits on.
    """
    W = np.asarray(W, np.longdouble)
    if axis == 0:  # (outputs, inputs, *kernel) to (*kernel, inputs, outputs)
        W = np.moveaxis(W, (1, 0), (-2, -1))
    kernel = W.shape[:-2]
    windows = sliding_window_view(np.asarray(x, np.longdouble), kernel, range(1, 1 + len(kernel)))
    windows = np.moveaxis(windows, x.ndim - 1, -1)
    y = np.tensordot(windows, W, axes=len(kernel) + 1)
    return y if b is None else y + b


# Shapes of W by its inputs and outputs, and of x without its features, which come last.
WEIGHTS = {
    "x @ W": (lambda i, o: (i, o), -1, (7,)),
    "PyTorch, linear": (lambda i, o: (o, i), 0, (7,)),
    "Keras, 1d": (lambda i, o: (2, i, o), -1, (4, 6)),
    "PyTorch, 1d": (lambda i, o: (o, i, 2), 0, (4, 6)),
    "Keras, 2d": (lambda i, o: (2, 4, i, o), -1, (4, 6, 6)),
    "PyTorch, 2d": (lambda i, o: (o, i, 2, 4), 0, (4, 6, 6)),
    "PyTorch, 1x1": (lambda i, o: (o, i, 1, 1), 0, (4, 6, 6)),
    "Keras, 3d": (lambda i, o: (2, 1, 2, i, o), -1, (2, 4, 4, 4)),
}


def network(rng, name, inputs, outputs, dtype=np.float64):
    """Return x, W, b and the axis of W's outputs."""
    shape, axis, others = WEIGHTS[name]
    x, W = rng.standard_normal((*others, inputs)), rng.standard_normal(shape(inputs, outputs))
    return x, W.astype(dtype), rng.standard_normal(outputs).astype(dtype), axis


# Scale and shift


@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scale_and_shift_are_the_layer_in_eval_mode(rng, dtype, scale, shift):
    layer = trained(rng, dtype=dtype, scale=scale, shift=shift)
    found = layer.affine()
    x = rng.standard_normal((20, FEATURES))
    assert [(array.dtype, array.shape) for array in found] == [(np.float64, (FEATURES,))] * 2
    assert error(x * found[0] + found[1], exact_eval(layer, x)) <= 5e-15
    gamma = 1 if layer.gamma is None else layer.gamma.astype(np.longdouble)
    invstd = 1 / np.sqrt(layer.running_var.astype(np.longdouble) + np.longdouble(layer.eps))
    np.testing.assert_allclose(found[0], gamma * invstd, rtol=5e-16)


def test_scale_and_shift_do_not_depend_on_the_mode_and_are_no_views(rng):
    layer = trained(rng, scale=False, shift=False)
    kept = layer.affine()
    for mode in (layer.eval, layer.freeze, layer.train):
        mode()
        np.testing.assert_array_equal(layer.affine(), kept)
    layer.affine()[0][:] = layer.affine()[1][:] = 9
    np.testing.assert_array_equal(layer.affine(), kept)


def test_scale_and_shift_of_a_constant_feature(rng):
    layer = trained(rng, eps=0)
    layer.running_var = [0, 1, 0, 4, 9]
    scale, shift = layer.affine()
    assert scale[0] == scale[2] == 0
    x = rng.standard_normal((20, FEATURES))
    assert error(x * scale + shift, layer.eval()(x)) <= 1e-14
    np.testing.assert_array_equal(shift[[0, 2]], layer.beta[[0, 2]])


def test_float32_loses_by_scale_and_shift_what_the_layer_keeps(rng):
    mean, std = np.full(FEATURES, 1e4), np.ones(FEATURES)
    layer = BatchNorm(FEATURES, eps=0).eval()
    layer.running_mean, layer.running_var = mean, std**2
    x = rng.normal(mean, std, (1000, FEATURES)).astype(np.float32)
    expected = exact_eval(layer, x)
    scale, shift = layer.affine()
    assert error(layer(x), expected) <= 2e-7
    assert error(x * scale + shift, expected) <= 1e-11
    layer.running_mean = mean + rng.uniform(0.1, 0.9, FEATURES)
    scale, shift = (array.astype(np.float32) for array in layer.affine())
    assert error(x * scale + shift, exact_eval(layer, x)) > 1e-5


def test_statistics_that_are_nan_or_negative_are_not_hidden():
    layer = BatchNorm(2, dtype=np.float64, on_nonfinite="update")
    layer(np.array([[1e200, 1.0], [-1e200, 2.0]]))
    layer(np.array([[1.0, 1.0], [3.0, 2.0]]))
    scale, shift = layer.affine()
    assert np.isnan([layer.running_var[0], scale[0], shift[0]]).all()
    assert np.isfinite([scale[1], shift[1]]).all()
    layer.running_var[:] = -1
    with pytest.raises(ValueError, match="running_var must not be negative, got -1"):
        layer.affine()


def test_a_relu_is_left_out_of_scale_and_shift(rng):
    layer = trained(rng)
    kept = layer.affine()
    layer.relu = True
    np.testing.assert_array_equal(layer.affine(), kept)


def test_a_layer_without_running_statistics_has_no_scale_and_shift():
    layer = BatchNorm(2, track_running_stats=False)
    refused = pytest.raises(RuntimeError, match="no running statistics")
    for call in (
        lambda: layer.affine(),
        lambda: fold(np.ones((3, 2)), None, layer),
        lambda: fold_next(layer, np.ones((2, 3)), None),
    ):
        with refused:
            call()


# Into the layer before


@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["axis", "default"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_fold(rng, name, given, biased, scale, shift):
    layer = trained(rng, scale=scale, shift=shift)
    x, W, b, axis = network(rng, name, OTHERS, FEATURES)
    b = b if biased else None
    kept = W.copy()
    folded = fold(W, b, layer, **({"axis": axis} if given else {}))
    assert [array.shape for array in folded] == [W.shape, (FEATURES,)]
    assert error(apply(x, *folded, axis), exact_eval(layer, apply(x, W, b, axis))) <= 5e-15
    np.testing.assert_array_equal(W, kept)


def test_fold_keeps_a_bias_near_the_mean(rng):
    layer = trained(rng)
    b = rng.uniform(1e3, 2e3, FEATURES)
    layer.running_mean = b + rng.normal(size=FEATURES)
    W = rng.standard_normal((OTHERS, FEATURES))
    x = rng.standard_normal((20, OTHERS))
    W_folded, b_folded = fold(W, b, layer)
    expected = exact_eval(layer, apply(x, W, b, -1))
    assert error(apply(x, W_folded, b_folded, -1), expected) <= 5e-15


def test_fold_of_transposed_convolutions_and_of_a_square_matrix(rng):
    layer = trained(rng)
    scale, _ = layer.affine()
    weight = rng.standard_normal((FEATURES, FEATURES, 2, 2))
    W, _ = fold(weight, None, layer, axis=1)
    np.testing.assert_array_equal(W, weight * scale[:, None, None])
    square = rng.standard_normal((FEATURES, FEATURES))
    np.testing.assert_array_equal(fold(square, None, layer, axis=-1)[0], square * scale)
    np.testing.assert_array_equal(fold(square, None, layer, axis=0)[0], square * scale[:, None])


# Into the layer after


@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", WEIGHTS)
def test_fold_next(rng, name, biased, scale, shift):
    layer = trained(rng, scale=scale, shift=shift)
    x, W, b, axis = network(rng, name, FEATURES, OTHERS)
    b = b if biased else None
    kept = W.copy()
    folded = fold_next(layer, W, b, axis=axis, unpadded=True)
    assert [array.shape for array in folded] == [W.shape, (OTHERS,)]
    expected = apply(exact_eval(layer, x), W, b, axis)
    # Where a sum nearly vanishes the error is that of its terms.
    terms = apply(abs(exact_eval(layer, x)), abs(W), b, axis)
    assert error(apply(x, *folded, axis), expected, exact.norm(terms)) <= 2e-15
    np.testing.assert_array_equal(W, kept)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "1d" not in name])
def test_fold_next_finds_the_inputs(rng, name):
    layer = trained(rng)
    _, W, b, axis = network(rng, name, FEATURES, OTHERS)
    given = fold_next(layer, W, b, axis=axis, unpadded=True)
    for found, expected in zip(fold_next(layer, W, b, unpadded=True), given, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_fold_next_of_a_convolution_that_is_padded(rng):
    layer = trained(rng)
    x, W, b, _ = network(rng, "Keras, 2d", FEATURES, OTHERS)
    with pytest.raises(ValueError, match=r"W of shape \(2, 4, 5, 3\) .*padding.*unpadded=True"):
        fold_next(layer, W, b)
    # What it would be good for: with padding that the layer makes 0, the fold is right.
    scale, shift = layer.affine()
    border = ((0, 0), (1, 1), (2, 2), (0, 0))
    y = np.pad(exact_eval(layer, x), border)
    expected = apply(y, W, b, -1)
    folded = fold_next(layer, W, b, unpadded=True)
    x_padded = np.broadcast_to(-shift / scale, y.shape).copy()
    x_padded[:, 1:-1, 2:-2] = x
    assert error(apply(x_padded, *folded, -1), expected) <= 1e-14
    assert error(apply(np.pad(x, border), *folded, -1), expected) > 0.01


def test_the_word_on_padding_is_a_flag(rng):
    _, W, b, _ = network(rng, "Keras, 2d", FEATURES, OTHERS)
    with pytest.raises(TypeError, match="unpadded must be True or False, got 'no'"):
        fold_next(trained(rng), W, b, unpadded="no")


def test_fold_next_needs_no_word_where_padding_does_not_matter(rng):
    layer = trained(rng, shift=False)
    _, W, b, _ = network(rng, "Keras, 2d", FEATURES, OTHERS)
    layer.running_mean = np.zeros(FEATURES)
    np.testing.assert_array_equal(fold_next(layer, W, b)[1], b)
    _, W, b, _ = network(rng, "PyTorch, 1x1", FEATURES, OTHERS)
    fold_next(trained(rng), W, b)


# Both


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_results_are_rounded_once_to_the_dtype_of_the_weight(rng, dtype):
    layer = trained(rng)
    _, W, b, _ = network(rng, "x @ W", OTHERS, FEATURES, dtype)
    for narrow, wide in (
        (fold(W, b, layer), fold(W.astype(float), b, layer)),
        (fold_next(layer, W.T, b[:OTHERS]), fold_next(layer, W.T.astype(float), b[:OTHERS])),
    ):
        assert [array.dtype for array in narrow] == [dtype] * 2
        for array, expected in zip(narrow, wide, strict=True):
            np.testing.assert_array_equal(array, expected.astype(dtype))


def test_one_layer_folded_both_ways(rng):
    before, layer, after = rng.standard_normal((6, 4)), trained(rng, 4), rng.standard_normal((4, 2))
    x = rng.standard_normal((9, 6))
    expected = exact_eval(layer, x @ before) @ after
    W, b = fold(before, None, layer)
    assert error((x @ W + b) @ after, expected) <= 1e-13
    W, b = fold_next(layer, after, None)
    assert error(x @ before @ W + b, expected) <= 1e-13


def test_a_layer_with_a_relu_is_refused(rng):
    layer = trained(rng, relu=True)
    with pytest.raises(ValueError, match="relu=True cannot be folded"):
        fold(np.ones((OTHERS, FEATURES)), None, layer)
    with pytest.raises(ValueError, match="relu=True cannot be folded"):
        fold_next(layer, np.ones((FEATURES, OTHERS)), None)


@pytest.mark.parametrize(
    ("W", "b", "options", "message"),
    [
        (np.ones((3, 4)), None, {}, r"5 outputs along axis -1.* axis 0.*got shape \(3, 4\)"),
        (np.ones((5, 5)), None, {}, r"W of shape \(5, 5\) may.*pass axis=-1 or axis=0"),
        (np.ones((5, 3, 5)), None, {}, r"W of shape \(5, 3, 5\) may"),
        (np.ones((5, 3)), None, {"axis": -1}, r"5 outputs along axis -1, got shape \(5, 3\)"),
        (np.ones((3, 5)), None, {"axis": 2}, r"axis must be one of W's, of shape \(3, 5\), got 2"),
        (np.ones((3, 5)), np.ones(3), {}, r"b must have shape \(5,\).* got \(3,\)"),
        (np.ones((3, 5)), np.ones((1, 5)), {}, r"b must have shape \(5,\).* got \(1, 5\)"),
        (np.ones(5), None, {}, r"W must have two dimensions or more, got shape \(5,\)"),
        (np.ones((3, 5), int), None, {}, "W must be of floats, got int64"),
        (np.ones((3, 5), complex), None, {}, "W must be of floats, got complex128"),
        (np.ma.ones((3, 5)), None, {}, "W must have no mask"),
        (np.ones((3, 5)), np.ma.ones(5), {}, "b must have no mask"),
        (np.ones((3, 5)), np.ones(5, complex), {}, "b must be of real numbers, got complex128"),
        (np.ones((3, 5)), ["1"] * 5, {}, "b must be of real numbers, got <U1"),
        (np.ones((3, 5)), None, {"axis": "last"}, "axis must be an integer, got 'last'"),
        (np.ones((3, 5)), None, {"axis": 1.0}, "axis must be an integer, got 1.0"),
    ],
)
def test_what_does_not_fit_the_layer_before_is_refused(rng, W, b, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fold(W, b, trained(rng), **options)


@pytest.mark.parametrize(
    ("W", "b", "options", "message"),
    [
        (np.ones((4, 3)), None, {}, r"5 inputs along axis -2.* axis 1.*got shape \(4, 3\)"),
        (np.ones((5, 5)), None, {}, r"W of shape \(5, 5\) may.*pass axis=-1 or axis=0"),
        (np.ones((3, 5, 2)), None, {}, r"W of shape \(3, 5, 2\) may"),
        (np.ones((3, 5)), None, {"axis": -1}, r"5 inputs along axis 0.*got shape \(3, 5\)"),
        (np.ones((5, 3, 2)), None, {"axis": 1}, "axis must be -1 or 0, got 1"),
        (np.ones((5, 3)), None, {"axis": -3}, "axis must be -1 or 0, got -3"),
        (np.ones((5, 3)), None, {"axis": "last"}, "axis must be an integer, got 'last'"),
        (np.ma.ones((5, 3)), None, {}, "W must have no mask"),
        (np.ones((5, 3)), np.ones(5), {}, r"b must have shape \(3,\).* got \(5,\)"),
    ],
)
def test_what_does_not_fit_the_layer_after_is_refused(rng, W, b, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fold_next(trained(rng), W, b, **options)


def test_an_axis_may_be_counted_from_either_end(rng):
    layer, W = trained(rng), rng.standard_normal((FEATURES, FEATURES))
    for function in (lambda axis: fold(W, None, layer, axis=axis),
                     lambda axis: fold_next(layer, W, None, axis=axis)):  # fmt: skip
        for one, other in ((0, -2), (1, -1)):
            for a, b in zip(function(one), function(other), strict=True):
                np.testing.assert_array_equal(a, b)


def test_arguments_in_the_order_of_the_other_function_are_refused(rng):
    layer = trained(rng)
    with pytest.raises(TypeError, match=r"W must be an array|layer must be a BatchNorm"):
        fold(layer, np.ones((3, 5)), None)
    with pytest.raises(TypeError, match="layer must be a BatchNorm, got ndarray"):
        fold_next(np.ones((5, 3)), np.ones((5, 3)), layer)


@pytest.mark.parametrize("module", [folding, layer])
def test_examples_in_docstrings(module):
    failed, attempted = doctest.testmod(module)
    assert (failed, attempted > 5) == (0, True)
