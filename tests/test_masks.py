"""Masks and lengths: what does not count is as if it were not there."""

import numpy as np
import pytest

import bn_cy
from bn_cy import BatchNorm, batchnorm_backward, batchnorm_forward, moments

LAYOUTS = [((7, 5), 1), ((5, 7), 0), ((4, 3, 6), 1), ((4, 6, 3), -1), ((2, 3, 4, 5), 1)]


def positions(shape, axis):
    return tuple(np.delete(shape, axis))


def rows(array, axis, mask):
    """What counts, as a batch of its own."""
    return np.moveaxis(array, axis, -1)[mask]


@pytest.fixture(params=LAYOUTS, ids=str)
def batch(request, rng):
    """Give a batch with NaN where the mask is false, its axis, and the mask."""
    shape, axis = request.param
    mask = rng.random(positions(shape, axis)) < 0.6
    mask.flat[:2], mask.flat[-1] = True, False
    x = rng.standard_normal(shape).astype(np.float32)
    np.moveaxis(x, axis, -1)[~mask] = np.nan
    return x, axis, mask


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_the_bits_of_the_batch_without_the_rest(rng, batch, relu, add):
    x, axis, mask = batch
    gamma, beta = rng.standard_normal((2, x.shape[axis])).astype(np.float32)
    residual, dout = rng.standard_normal((2, *x.shape)).astype(np.float32)
    for array in (residual, dout):
        np.moveaxis(array, axis, -1)[~mask] = np.nan
    given = residual if add else None
    y, cache = batchnorm_forward(x, gamma, beta, axis=axis, relu=relu, residual=given, mask=mask)
    dx, dgamma, dbeta, *dresidual = batchnorm_backward(dout, cache)

    expected_y, small = batchnorm_forward(
        rows(x, axis, mask),
        gamma,
        beta,
        relu=relu,
        residual=rows(residual, axis, mask) if add else None,
    )
    expected = batchnorm_backward(rows(dout, axis, mask), small)
    for found, wanted in [
        (y, expected_y),
        (dx, expected[0]),
        *zip(dresidual, expected[3:], strict=True),
    ]:
        assert np.array_equal(rows(found, axis, mask), wanted)
        assert np.all(rows(found, axis, ~mask) == 0)
    assert len(dresidual) == add
    assert np.array_equal(dgamma, expected[1]) and np.array_equal(dbeta, expected[2])


def test_moments(batch):
    x, axis, mask = batch
    found, expected = moments(x, axis=axis, mask=mask), moments(rows(x, axis, mask))
    assert found.count == expected.count == mask.sum()
    assert np.array_equal(found.mean, expected.mean) and np.array_equal(found.var, expected.var)


@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
def test_the_layer(rng, batch, mode):
    x, axis, mask = batch
    layer, other = BatchNorm(x.shape[axis], axis=axis), BatchNorm(x.shape[axis])
    for each in (layer, other):
        getattr(each, mode)()
    y, expected = layer(x, mask=mask), other(rows(x, axis, mask))
    dout = rng.standard_normal(x.shape)
    dx, wanted = layer.backward(dout), other.backward(rows(dout, axis, mask))
    for found, exact in [(y, expected), (dx, wanted)]:
        assert np.array_equal(rows(found, axis, mask), exact)
        assert np.all(rows(found, axis, ~mask) == 0)
    for name, array in other.state_dict().items():
        assert np.array_equal(layer.state_dict()[name], array), name
    for name, gradient in other.grads.items():
        assert np.array_equal(layer.grads[name], gradient), name


@pytest.mark.parametrize("options", [{}, {"unbiased": False}, {"momentum": None}])
def test_running_statistics_are_those_of_the_rows_bit_for_bit(rng, options):
    x, mask = rng.standard_normal((9, 4, 5)).astype(np.float32), rng.random((9, 5)) < 0.7
    layer, plain = BatchNorm(4, **options), BatchNorm(4, **options)
    for _ in range(3):
        layer(x, mask=mask)
        rows = np.moveaxis(x, 1, -1)[mask]
        plain(rows[..., np.newaxis])
        assert layer.running_mean.tobytes() == plain.running_mean.tobytes()
        assert layer.running_var.tobytes() == plain.running_var.tobytes()
        assert layer.num_batches_tracked == plain.num_batches_tracked
    before = layer.state_dict()
    layer(x, mask=mask, update=False)
    layer(x, mask=np.zeros((), bool))
    for name, value in before.items():
        np.testing.assert_array_equal(layer.state_dict()[name], value)


def test_a_batch_that_cannot_be_scattered_is_not_counted(rng, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("bn_cy._masks.Kept.scatter", fail)
    layer = BatchNorm(4)
    with pytest.raises(MemoryError):
        layer(rng.standard_normal((9, 4)).astype(np.float32), mask=np.arange(9) % 3 > 0)
    assert layer.num_batches_tracked == 0
    assert layer.running_mean.tolist() == [0] * 4
    assert layer.cache is None


@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 6), 1), ((4, 6, 3), -1), ((4, 6, 2, 3), 3)])
def test_lengths_are_a_mask(rng, shape, axis):
    x = rng.standard_normal(shape)
    lengths = np.array([6, 0, 3, 1])
    mask = np.zeros(positions(shape, axis), bool)
    for example, length in enumerate(lengths):
        mask[example, :length] = True
    y, _ = batchnorm_forward(x, axis=axis, lengths=lengths)
    expected, _ = batchnorm_forward(x, axis=axis, mask=mask)
    assert np.array_equal(y, expected)
    assert moments(x, axis=axis, lengths=lengths).count == mask.sum()
    layer = BatchNorm(shape[axis], axis=axis, dtype=np.float64)
    assert np.array_equal(layer(x, lengths=list(lengths)), expected)


def test_a_mask_may_broadcast(rng):
    x = rng.standard_normal((4, 3, 6))
    steps = np.array([True, True, False, True, False, True])
    y, _ = batchnorm_forward(x, mask=steps)
    mask = np.tile(steps, (4, 1))
    assert np.array_equal(rows(y, 1, mask), batchnorm_forward(rows(x, 1, mask))[0])
    assert np.all(y[..., ~steps] == 0)


def test_all_counts_is_no_mask(rng):
    x = rng.standard_normal((4, 3, 6))
    rest, _ = batchnorm_forward(np.moveaxis(x, 1, -1).reshape(-1, 3))
    y, _ = batchnorm_forward(x, mask=np.array(True))
    assert np.array_equal(np.moveaxis(y, 1, -1).reshape(-1, 3), rest)


def test_nothing_counts_is_an_empty_batch(rng):
    x = rng.standard_normal((4, 3)).astype(np.float32)
    layer = BatchNorm(3)
    before = layer.state_dict()
    assert np.all(layer(x, mask=np.zeros(4, bool)) == 0)
    assert np.all(layer.backward(x) == 0)
    assert not layer.dgamma.any() and not layer.dbeta.any()
    for name, array in layer.state_dict().items():
        assert np.array_equal(array, before[name]), name
    assert moments(x, mask=np.zeros(4, bool)).count == 0


def test_one_position_has_no_variance(rng):
    x, mask = rng.standard_normal((4, 3)), np.arange(4) == 2
    for function in (batchnorm_forward, BatchNorm(3, dtype=np.float64)):
        with pytest.raises(ValueError, match=r"two values per feature .*lengths leave one of 4"):
            function(x, mask=mask)
    assert np.any(BatchNorm(3).eval()(x, mask=mask)[2])


def test_given_outputs(rng, batch):
    x, axis, mask = batch
    y, cache = batchnorm_forward(x, axis=axis, mask=mask)
    out = np.full_like(x, 7)
    assert batchnorm_forward(x, axis=axis, mask=mask, out=out)[0] is out
    assert np.array_equal(out, y)
    dout = rng.standard_normal(x.shape).astype(np.float32)
    dx, *_ = batchnorm_backward(dout, cache)
    assert batchnorm_backward(dout, cache, out=dout)[0] is dout
    assert np.array_equal(dout, dx)
    out[...] = 7
    assert BatchNorm(x.shape[axis], axis=axis)(x, mask=mask, out=out) is out
    assert np.array_equal(out, y)


def test_the_mask_and_the_batch_may_change_before_the_backward(rng):
    x, mask = rng.standard_normal((6, 3)), np.arange(6) < 4
    dout = rng.standard_normal(x.shape)
    expected = batchnorm_backward(dout, batchnorm_forward(x, mask=mask)[1])[0]
    _, cache = batchnorm_forward(x, mask=mask)
    x[...], mask[...] = 0, True
    assert np.array_equal(batchnorm_backward(dout, cache)[0], expected)


def test_the_output_may_be_the_batch(rng, batch):
    x, axis, mask = batch
    layer, other = (BatchNorm(x.shape[axis], axis=axis) for _ in range(2))
    expected, dout = other(x, mask=mask), rng.standard_normal(x.shape)
    assert layer(x, mask=mask, out=x) is x
    assert np.array_equal(x, expected)
    assert np.array_equal(layer.backward(dout, out=x), other.backward(dout))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_another_byte_order(rng, batch, dtype):
    x, axis, mask = batch
    x, residual, dout = x.astype(dtype), *rng.standard_normal((2, *x.shape)).astype(dtype)
    given = {"axis": axis, "mask": mask}
    y, cache = batchnorm_forward(x, residual=residual, **given)
    gradients = batchnorm_backward(dout, cache)
    swapped = [array.astype(x.dtype.newbyteorder()) for array in (x, residual, dout)]
    found, cache = batchnorm_forward(swapped[0], residual=swapped[1], **given)
    dx, _, _, dresidual = batchnorm_backward(swapped[2], cache)
    for mine, expected in [(found, y), (dx, gradients[0]), (dresidual, gradients[3])]:
        assert mine.dtype == dtype and mine.dtype.isnative
        assert np.array_equal(mine, expected)
    out = np.empty_like(x)
    layer = BatchNorm(x.shape[axis], axis=axis)
    assert layer(swapped[0], mask=mask, out=out) is out
    assert np.array_equal(out, layer(x, mask=mask))


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 7), (0, 5, 7, 2)])
def test_an_empty_list_fits_an_empty_batch(shape):
    x, layer = np.empty(shape), BatchNorm(5, dtype=np.float64)
    for given in [{"mask": []}] + [{"lengths": []}] * (len(shape) > 2):
        for y in (batchnorm_forward(x, **given)[0], layer(x, **given), layer.backward(x)):
            assert y.shape == shape
        assert moments(x, **given).count == 0


@pytest.mark.parametrize("shape", [(5, 0), (5, 0, 3), (0, 0)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_no_features(shape, axis):
    x = np.empty(shape, np.float32)
    mask = np.ones(positions(shape, axis), bool)
    y, cache = batchnorm_forward(x, axis=axis, mask=mask)
    assert y.shape == batchnorm_backward(x, cache)[0].shape == shape


X = np.zeros((4, 3, 6))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"mask": np.ones((4, 3), bool)},
            ValueError,
            r"mask must have the shape \(4, 6\).*\(4, 3\)",
        ),
        ({"mask": np.ones((4, 6))}, TypeError, "mask must be of booleans.*float64"),
        ({"mask": np.ma.masked_array(np.ones((4, 6), bool))}, TypeError, "mask must have no mask"),
        ({"lengths": [1, 2]}, ValueError, r"lengths must have shape \(4,\).*\(2,\)"),
        ({"lengths": [1, 2, 3, 7]}, ValueError, "lengths must be from 0 to 6.*7 at example 3"),
        ({"lengths": [1, -2, 3, 6]}, ValueError, "lengths must be from 0 to 6.*-2 at example 1"),
        ({"lengths": [1.0, 2, 3, 4]}, TypeError, "lengths must be of integers.*float64"),
        ({"lengths": [1] * 4, "mask": np.ones((4, 6), bool)}, ValueError, "give one of them"),
        ({"mask": np.True_, "out": np.zeros((4, 3))}, ValueError, r"out must have the shape"),
        ({"mask": np.True_, "out": np.zeros(X.shape, "f")}, ValueError, "out must.*float32"),
        (
            {"mask": np.True_, "residual": np.zeros((4, 3))},
            ValueError,
            "residual must have the shape",
        ),
        (
            {"mask": np.True_, "residual": np.zeros(X.shape, "f")},
            ValueError,
            r"residual must have the shape \(4, 3, 6\) and dtype float64 of x, got .* float32",
        ),
        ({"lengths": []}, ValueError, r"lengths must have shape \(4,\).*\(0,\)"),
    ],
)
def test_what_does_not_fit_is_named(given, error, message):
    layer = BatchNorm(3)
    before = layer.state_dict()
    for call in (batchnorm_forward, layer):
        with pytest.raises(error, match=message):
            call(X, **given)
    assert layer.cache is None
    assert all(np.array_equal(before[name], array) for name, array in layer.state_dict().items())
    if not {"out", "residual"} & set(given):
        with pytest.raises(error, match=message):
            moments(X, **given)


def test_a_read_only_output_is_refused():
    out = np.zeros(X.shape)
    out.flags.writeable = False
    for call in (batchnorm_forward, BatchNorm(3)):
        with pytest.raises(ValueError, match="out must be writable"):
            call(X, mask=np.True_, out=out)


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_an_output_over_a_parameter_is_refused(name):
    out = np.ones(X.shape, X.dtype)
    parameter = out[0, :, 0]
    with pytest.raises(ValueError, match="out may not share memory with gamma or beta"):
        batchnorm_forward(X, **{name: parameter}, mask=np.True_, out=out)
    assert (out == 1).all()


def test_lengths_need_sequences():
    with pytest.raises(ValueError, match=r"lengths are of sequences.*three dimensions"):
        batchnorm_forward(np.zeros((4, 3)), lengths=[1, 2, 3, 4])


def test_the_gradient_must_be_of_the_whole_batch():
    _, cache = batchnorm_forward(np.random.default_rng(0).random((4, 3)), mask=np.arange(4) < 3)
    with pytest.raises(ValueError, match=r"dout must have the shape \(4, 3\)"):
        batchnorm_backward(np.zeros((3, 3)), cache)


def test_a_masked_array_is_told_of_masks():
    for call in (batchnorm_forward, moments, BatchNorm(3)):
        with pytest.raises(TypeError, match="mask="):
            call(np.ma.masked_array(np.zeros((4, 3))))
    assert bn_cy.BatchNorm(3).cache is None
