"""`recalibrate` against the statistics of the whole data set in 80-bit arithmetic."""

import doctest

import exact
import numpy as np
import pytest
from exact import error
from test_layer import assert_same_state, snapshot, trained

from bn_cy import BatchNorm, MicroBatch, _recalibrate, recalibrate

SIZES = [16, 16, 0, 1, 16, 3]


def batches(rng, axis=1, dtype=np.float32, offset=0.0):
    """Return batches of five features, their sizes along the first or, where the features are
    there, along the second axis; and all of them in one."""
    split = 1 if axis == 0 else 0
    shape = [sum(SIZES), sum(SIZES), 3]
    shape[axis] = 5
    x = (offset + rng.standard_normal(shape)).astype(dtype)
    return np.split(x, np.cumsum(SIZES)[:-1], axis=split), x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -2])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_statistics_are_those_of_the_data_set(rng, dtype, unbiased, axis, offset):
    parts, x = batches(rng, axis, dtype, offset)
    layer = trained(rng, unbiased=unbiased)
    layer.axis = axis
    assert recalibrate(layer, parts) is None
    n, mean, var = exact.statistics(x, axis)
    if unbiased:
        var = var * n / (n - 1)
    assert np.max(np.abs(layer.running_mean - mean) / np.sqrt(var)) <= 2e-7
    assert np.max(np.abs(layer.running_var / var - 1)) <= 3e-7
    assert layer.num_batches_tracked == 5  # one of the six is empty


def test_neither_order_nor_sizes_matter(rng):
    x = rng.standard_normal((1000, 5))
    found = []
    for sizes in ([1000], [999, 1], [1] * 1000, [0, 500, 500]):
        layer = BatchNorm(5)
        recalibrate(layer, np.split(rng.permuted(x, axis=0), np.cumsum(sizes)[:-1]))
        found.append((layer.running_mean.copy(), layer.running_var.copy()))
    for mean, var in found[1:]:
        np.testing.assert_allclose(mean, found[0][0], rtol=0, atol=1e-14)
        np.testing.assert_allclose(var, found[0][1], rtol=1e-14)


def test_any_iterable_is_read_once(rng):
    parts, _ = batches(rng)
    layers = [BatchNorm(5) for _ in range(4)]
    for layer, form in zip(layers, (list, tuple, iter, lambda p: (x for x in p)), strict=True):
        recalibrate(layer, form(parts))
    for layer in layers[1:]:
        assert_same_state(layer.state_dict(), layers[0].state_dict())


def test_only_running_statistics_and_count_change(rng):
    parts, x = batches(rng)
    layer = trained(rng).eval()
    layer.forward(x)
    layer.freeze()
    before, cache = snapshot(layer), layer.cache
    recalibrate(layer, parts)
    after = snapshot(layer)
    changed = {key for key in before if not np.array_equal(after[key], before[key])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert layer.frozen
    assert layer.cache is cache


def test_eval_is_then_training_on_the_whole_data_set(rng):
    parts, x = batches(rng)
    layer = BatchNorm(5, unbiased=False)
    recalibrate(layer, parts)
    assert error(layer.eval()(x), exact.forward(x)) <= 2e-7


def test_the_example_in_the_docstring():
    failed, attempted = doctest.testmod(_recalibrate)
    assert attempted > 3
    assert not failed


# What is not finite


def spoilt(rng, bad=np.nan):
    parts, _ = batches(rng)
    parts[1][2, 3] = bad
    return parts


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_batch_is_named_and_the_layer_unchanged(rng, bad):
    layer = trained(rng)
    before = snapshot(layer)
    with pytest.raises(FloatingPointError, match=r"batch 1 has NaN .* at 1 of the features: 3$"):
        recalibrate(layer, spoilt(rng, bad))
    assert_same_state(snapshot(layer), before)


def test_a_bad_batch_is_left_out(rng):
    parts = spoilt(rng)
    layer, other = BatchNorm(5, on_nonfinite="skip"), BatchNorm(5)
    recalibrate(layer, parts)
    recalibrate(other, [part for i, part in enumerate(parts) if i != 1])
    assert_same_state(layer.state_dict(), other.state_dict())


def test_a_bad_batch_is_counted(rng):
    layer = BatchNorm(5, on_nonfinite="update")
    recalibrate(layer, spoilt(rng))
    assert np.isnan(layer.running_var).tolist() == [False, False, False, True, False]
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("size", [1e200, 1.3e154])
def test_a_whole_that_overflows_is_named(rng, size):
    """Of the smaller ones the variance is a number, and 4/3 of it is not."""
    layer = trained(rng, dtype=np.float64)
    before = snapshot(layer)
    far = [np.full((2, 5), value) for value in (size, -size)]
    with pytest.raises(FloatingPointError, match=r"the whole of the batches has .* at 5 of the"):
        recalibrate(layer, far)
    assert_same_state(snapshot(layer), before)


# Bad input


def failing(parts):
    yield from parts
    raise ZeroDivisionError("of the data set")


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (failing, ZeroDivisionError, "of the data set"),
        (lambda p: [p[0], np.zeros((4, 6))], ValueError, "batch 1: x must have 5 features"),
        (lambda p: [*p, np.zeros((4, 5), int)], TypeError, "x must be of float32 or float64"),
        (lambda p: [*p, None], TypeError, "x must be an array"),
        (lambda p: p[0], TypeError, r"batches must be several arrays, .* pass it in a list"),
        (lambda p: [p[0], [1.0, 2.0]], ValueError, "batch 1: x must have two dimensions or more"),
        (lambda p: [[[1.0], [2.0, 3.0]]], ValueError, "batch 0: x must be an array, got list"),
        (lambda p: [], ValueError, "batches must hold two values per feature or more, got 0"),
        (lambda p: [np.zeros((1, 5))], ValueError, "two values per feature or more, got 1"),
        (lambda p: None, TypeError, "batches must be several arrays, such as a list, got NoneType"),
    ],
)
def test_bad_input_leaves_the_layer_unchanged(rng, spoil, kind, message):
    layer = trained(rng)
    before = snapshot(layer)
    parts = [rng.standard_normal((size, 5)) for size in SIZES]
    with pytest.raises(kind, match=message):
        recalibrate(layer, spoil(parts))
    assert_same_state(snapshot(layer), before)


def test_a_read_only_statistic_leaves_all_as_they_were(rng):
    layer = trained(rng)
    before = snapshot(layer)
    layer.running_var.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        recalibrate(layer, [rng.standard_normal((4, 5))])
    assert_same_state(snapshot(layer), before)


def test_what_is_no_layer_is_refused(rng):
    for layer in (MicroBatch(BatchNorm(5)), BatchNorm, None):
        with pytest.raises(
            TypeError, match=f"layer must be a BatchNorm, got {type(layer).__name__}"
        ):
            recalibrate(layer, batches(rng)[0])


@pytest.mark.parametrize("axis", [1, -1])
def test_what_counts_of_padded_batches(rng, axis):
    shape = (4, 5, 6) if axis == 1 else (4, 6, 5)
    x, mask = rng.standard_normal((2, *shape)), rng.random((2, 4, 6)) < 0.5
    layer, whole = (BatchNorm(5, axis=axis, momentum=1.0) for _ in range(2))
    recalibrate(layer, [np.moveaxis(x[k], axis, -1)[mask[k]] for k in range(2)])
    whole(np.concatenate(x), mask=np.concatenate(mask))
    np.testing.assert_allclose(layer.running_mean, whole.running_mean, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(layer.running_var, whole.running_var, rtol=1e-13)


def test_a_layer_without_running_statistics_is_refused(rng):
    with pytest.raises(RuntimeError, match="no running statistics"):
        recalibrate(BatchNorm(5, track_running_stats=False), batches(rng)[0])
