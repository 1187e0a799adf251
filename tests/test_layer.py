"""The layer against an 80-bit model: options, modes, running statistics, state."""

import copy
import itertools
import pickle

import exact
import numpy as np
import pytest
from exact import COMBINATIONS, TOLERANCE, error

from bn_cy import BatchNorm, batchnorm_backward, batchnorm_forward, functional, moments

DTYPES = [np.float32, np.float64]
KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def batch(rng, shape=(16, 5), axis=1, dtype=np.float32):
    """Return random x and dout."""
    return exact.ordinary(rng, shape, axis, dtype), rng.standard_normal(shape).astype(dtype)


def randomize(rng, layer):
    """Give the layer random parameters, in place."""
    for parameter in layer.params.values():
        parameter[:] = rng.uniform(0.5, 2, parameter.shape)
    return layer


def trained(rng, features=5, **options):
    """Return a layer with random parameters and running statistics of three batches."""
    layer = randomize(rng, BatchNorm(features, **options))
    for _ in range(3):
        layer.forward(batch(rng, (16, features))[0])
    return layer


def snapshot(layer):
    """Return copies of all that a layer's user can see of its state."""
    grads = {f"grad_{name}": value for name, value in layer.grads.items()}
    visible = {**layer.state_dict(), **grads, "training": layer.training}
    return {name: np.array(value) for name, value in visible.items()}


def assert_same_state(actual, expected):
    """Assert that two states are equal bit for bit."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(actual[key], value, err_msg=key)


def check_step(layer, model, x, dout):
    """Run layer and model forward and backward and compare all that comes out."""
    tolerance = TOLERANCE[x.dtype]
    y, dx = layer.forward(x), layer.backward(dout)
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == (x.shape, x.dtype) * 2
    gamma, beta = layer.gamma, layer.beta
    expected_y = model.forward(x, gamma, beta, layer.training)
    expected_dx, expected_dgamma, expected_dbeta = model.backward(dout, x, gamma, layer.training)
    mean, var = exact.statistics(x, model.axis)[1:] if layer.training else model.running
    form = {"eps": model.eps, "axis": model.axis}
    # Sums that may come close to zero are measured by the size of their terms.
    y_scale = exact.norm(exact.normalize(x, mean, var, gamma, **form))
    dx_scale = exact.norm(exact.frozen_gradient(dout, x, var, gamma, **form))
    dbeta_scale, dgamma_scale = exact.sum_scales(dout, x, mean, var, **form)
    assert error(y, expected_y, y_scale) <= tolerance
    assert error(dx, expected_dx, dx_scale) <= tolerance
    if gamma is not None:
        assert error(layer.dgamma, expected_dgamma, dgamma_scale) <= tolerance
    if beta is not None:
        assert error(layer.dbeta, expected_dbeta, dbeta_scale) <= tolerance
    for actual, expected in zip(running(layer), model.running, strict=True):
        assert error(actual, expected) <= tolerance


def running(layer):
    """Return the running mean and variance."""
    return layer.running_mean, layer.running_var


# Options


def test_a_new_layer():
    layer = BatchNorm(5)
    assert layer.training is True
    np.testing.assert_array_equal(layer.gamma, np.ones(5, np.float32))
    np.testing.assert_array_equal(layer.beta, np.zeros(5, np.float32))
    assert layer.gamma.dtype == layer.beta.dtype == np.float32
    np.testing.assert_array_equal(layer.running_mean, np.zeros(5))
    np.testing.assert_array_equal(layer.running_var, np.ones(5))
    assert layer.running_mean.dtype == layer.running_var.dtype == np.float64
    assert layer.num_batches_tracked == 0
    assert set(layer.params) == {"gamma", "beta"}


OPTIONS = list(itertools.product(COMBINATIONS, [True, False], [None, 0.3], [1, -1, 0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("affine", "unbiased", "momentum", "axis"), OPTIONS)
def test_options_combine(rng, affine, unbiased, momentum, axis, dtype):
    scale, shift = affine
    options = {"momentum": momentum, "unbiased": unbiased, "axis": axis, "eps": 1e-3}
    layer = BatchNorm(6, scale=scale, shift=shift, dtype=dtype, **options)
    randomize(rng, layer)
    model = exact.Layer(6, **options)
    shape = [4, 3, 5]
    shape[axis] = 6
    for training in (True, True, False, True, False):
        layer.train(training)
        x, dout = batch(rng, tuple(shape), axis, dtype)
        check_step(layer, model, x, dout)


@pytest.mark.parametrize("shape", [(16, 5), (3, 5, 7), (3, 5, 7, 7), (2, 5, 3, 4, 2)])
def test_call_is_forward(rng, shape):
    x, _ = batch(rng, shape)
    np.testing.assert_array_equal(BatchNorm(5)(x), BatchNorm(5).forward(x))


def test_the_layer_is_the_functions(rng):
    x, dout = batch(rng)
    layer = randomize(rng, BatchNorm(5, eps=1e-3))
    y, cache = batchnorm_forward(x, layer.gamma, layer.beta, 1e-3)
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(layer.backward(dout), dx)
    np.testing.assert_array_equal(layer.dgamma, dgamma.astype(np.float32))
    np.testing.assert_array_equal(layer.dbeta, dbeta.astype(np.float32))


@pytest.mark.parametrize("training", [True, False])
def test_given_outputs(rng, training):
    x, dout = batch(rng)
    layer = trained(rng).train(training)
    twin = copy.deepcopy(layer)
    y, dx = twin(x), twin.backward(dout)
    out = np.zeros_like(x)
    assert layer.forward(x, out=out) is out
    np.testing.assert_array_equal(out, y)
    assert layer(x, out=out) is out
    out[:] = dout
    assert layer.backward(out, out=out) is out
    np.testing.assert_array_equal(out, dx)


def test_data_of_another_precision_keep_theirs(rng):
    x, dout = batch(rng, dtype=np.float64)
    layer = randomize(rng, BatchNorm(5, dtype=np.float32))
    y, dx = layer(x), layer.backward(dout)
    assert y.dtype == dx.dtype == np.float64
    assert error(y, exact.forward(x, layer.gamma, layer.beta)) <= 1e-14
    assert layer.gamma.dtype == np.float32


@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
def test_absent_parameters_have_no_gradients(rng, scale, shift):
    x, dout = batch(rng)
    layer = BatchNorm(5, scale=scale, shift=shift)
    layer(x)
    layer.backward(dout)
    names = {name for name, there in (("gamma", scale), ("beta", shift)) if there}
    assert set(layer.params) == set(layer.grads) == names
    assert (layer.gamma is None, layer.dgamma is None) == (not scale, not scale)
    assert (layer.beta is None, layer.dbeta is None) == (not shift, not shift)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_features": -1}, "num_features"),
        ({"num_features": 2.5}, "num_features"),
        ({"eps": -1.0}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"momentum": "0.1"}, "momentum"),
        ({"momentum": np.full(2, 0.1)}, "momentum"),
        ({"dtype": np.float16}, "float16"),
        ({"dtype": np.int32}, "int32"),
        ({"axis": 1.5}, "axis"),
    ],
)
def test_unfit_options_are_refused(options, word):
    with pytest.raises((TypeError, ValueError), match=word):
        BatchNorm(**{"num_features": 5, **options})


# Parameters and gradients


def test_params_and_grads_are_live(rng):
    layer = BatchNorm(5)
    params, grads = layer.params, layer.grads
    x, dout = batch(rng)
    layer(x)
    layer.backward(dout)
    assert layer.params is params
    assert layer.grads is grads
    assert params["gamma"] is layer.gamma
    assert params["beta"] is layer.beta
    assert grads["gamma"] is layer.dgamma
    assert grads["beta"] is layer.dbeta


def test_gradients_have_the_parameters_shape_and_dtype(rng):
    layer = BatchNorm(5)
    x, dout = batch(rng)
    layer(x)
    layer.backward(dout)
    for name, parameter in layer.params.items():
        assert layer.grads[name].shape == parameter.shape
        assert layer.grads[name].dtype == parameter.dtype


def in_place(layer):
    for name, parameter in layer.params.items():
        parameter -= 0.1 * layer.grads[name]


def augmented(layer):
    for name in layer.params:
        layer.params[name] -= 0.1 * layer.grads[name]


def replaced(layer):
    for name in layer.params:
        layer.params[name] = layer.params[name] - 0.1 * layer.grads[name]


def augmented_attributes(layer):
    layer.gamma -= 0.1 * layer.dgamma
    layer.beta -= 0.1 * layer.dbeta


def attributes(layer):
    layer.gamma = layer.gamma - 0.1 * layer.dgamma
    layer.beta = layer.beta - 0.1 * layer.dbeta


@pytest.mark.parametrize(
    "update", [in_place, augmented, replaced, augmented_attributes, attributes]
)
def test_every_way_to_update_parameters(rng, update):
    layer = BatchNorm(5, dtype=np.float64)
    x, dout = batch(rng, dtype=np.float64)
    layer(x)
    layer.backward(dout)
    gamma = 1 - 0.1 * layer.dgamma
    beta = -0.1 * layer.dbeta
    update(layer)
    np.testing.assert_allclose(layer.gamma, gamma, rtol=1e-15)
    assert layer.params["gamma"] is layer.gamma
    assert error(layer(x), exact.forward(x, gamma, beta)) <= 1e-14
    np.testing.assert_array_equal(layer.state_dict()["weight"], layer.gamma)


def test_gradients_are_of_the_last_backward(rng):
    layer = BatchNorm(5)
    x, dout = batch(rng)
    layer(x)
    first = layer.backward(dout), layer.dgamma.copy(), layer.dbeta.copy()
    layer.backward(rng.standard_normal(x.shape).astype(np.float32))
    second = layer.backward(dout), layer.dgamma, layer.dbeta
    for actual, expected in zip(second, first, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("training", [True, False])
def test_update_between_forward_and_backward_changes_no_gradient(rng, training):
    layer = trained(rng).train(training)
    twin = copy.deepcopy(layer)
    x, dout = batch(rng)
    layer(x), twin(x)
    layer.gamma[:] = 100
    np.testing.assert_array_equal(layer.backward(dout), twin.backward(dout))


# Modes


def test_train_and_eval_return_the_layer():
    layer = BatchNorm(5)
    assert layer.eval() is layer
    assert layer.training is False
    assert layer.train() is layer
    assert layer.training is True
    assert layer.train(False) is layer
    assert layer.training is False


@pytest.mark.parametrize("training", [True, False])
def test_gradients_by_finite_differences(rng, training):
    layer = trained(rng, dtype=np.float64).train(training)
    x, dout = batch(rng, (6, 5), dtype=np.float64)

    def loss(_):
        return float(np.sum(copy.deepcopy(layer).forward(x) * dout))

    layer(x)
    dx = layer.backward(dout)
    for gradient, variable in ((dx, x), (layer.dgamma, layer.gamma), (layer.dbeta, layer.beta)):
        numeric = exact.finite_differences(loss, variable)
        assert error(gradient, numeric, exact.norm(dout)) <= 1e-9


def test_backward_belongs_to_the_mode_of_its_forward(rng):
    layer = trained(rng)
    x, dout = batch(rng)
    layer(x)
    dx = layer.backward(dout)
    layer.eval()
    np.testing.assert_array_equal(layer.backward(dout), dx)
    layer(x)
    frozen = layer.backward(dout)
    layer.train()
    np.testing.assert_array_equal(layer.backward(dout), frozen)
    assert not np.array_equal(frozen, dx)


def test_frozen_backward_uses_the_statistics_of_its_forward(rng):
    layer = trained(rng).eval()
    x, dout = batch(rng)
    layer(x)
    dx = layer.backward(dout)
    layer.reset_running_stats()
    np.testing.assert_array_equal(layer.backward(dout), dx)


def test_eval_of_one_row_and_of_none(rng):
    layer = trained(rng).eval()
    for rows in (1, 0):
        x = rng.standard_normal((rows, 5)).astype(np.float32)
        expected = exact.normalize(x, *running(layer), layer.gamma, layer.beta)
        scale = exact.norm(exact.normalize(x, *running(layer), layer.gamma))
        assert error(layer(x), expected, scale) <= 5e-7
        assert layer.backward(x).shape == (rows, 5)


def test_eval_changes_no_state(rng):
    layer = trained(rng).eval()
    before = snapshot(layer)
    layer(batch(rng)[0])
    assert_same_state(snapshot(layer), before)


def test_backward_before_forward(rng):
    with pytest.raises(RuntimeError, match="forward"):
        BatchNorm(5).backward(batch(rng)[1])


# Running statistics


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_long_random_sequence_of_steps(rng, momentum, unbiased):
    options = {"momentum": momentum, "unbiased": unbiased}
    layer = randomize(rng, BatchNorm(7, dtype=np.float64, **options))
    model = exact.Layer(7, **options)
    for _ in range(200):
        layer.train(bool(rng.random() < 0.7))
        x, dout = batch(rng, (int(rng.integers(2, 40)), 7), dtype=np.float64)
        check_step(layer, model, x * 3 + 1, dout)
    assert layer.num_batches_tracked == model.num_batches_tracked


def test_running_statistics_far_from_zero(rng):
    layer, model = BatchNorm(5), exact.Layer(5)
    for _ in range(300):
        x = (1e6 + rng.standard_normal((64, 5))).astype(np.float32)
        layer(x)
        model.forward(x)
    y = layer.eval()(x)
    assert error(y, model.forward(x, training=False)) <= 5e-7


def test_assigned_arrays_are_copied(rng):
    """Two layers never share an array, and who holds the layer's own is not cut off."""
    first, second = trained(rng), BatchNorm(5)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        own, given = getattr(second, name), getattr(first, name)
        setattr(second, name, given)
        assert getattr(second, name) is own
        assert not np.shares_memory(own, given)
        np.testing.assert_array_equal(own, given)
    assert second.params["gamma"] is second.gamma


@pytest.mark.parametrize("name", ["gamma", "running_mean", "running_var"])
def test_out_may_not_share_memory_with_the_layer(rng, name):
    layer = BatchNorm(6, dtype=np.float64)
    out = np.ones((4, 6))
    arrays = layer.params if name == "gamma" else layer._running
    arrays[name] = out[2]
    with pytest.raises(ValueError, match="out may not share memory with"):
        layer(rng.standard_normal((4, 6)), out=out)
    assert np.all(out == 1)
    assert layer.num_batches_tracked == 0


def test_a_masked_batch_is_refused(rng):
    layer = BatchNorm(5)
    before = snapshot(layer)
    with pytest.raises(TypeError, match=r"x must have no mask.*x\.filled"):
        layer(np.ma.masked_greater(batch(rng)[0], 0))
    assert_same_state(snapshot(layer), before)


@pytest.mark.parametrize("momentum", [1.0, None])
def test_a_batch_with_all_the_weight_keeps_its_digits(rng, momentum):
    """1 + 1*(var - 1) has none of a variance of 1e-18."""
    x = (1e-9 * rng.standard_normal((64, 5))).astype(np.float32)
    layer = BatchNorm(5, momentum=momentum, eps=0.0)
    y = layer(x)
    _, mean, var = moments(x)
    np.testing.assert_array_equal(layer.running_mean, mean)
    np.testing.assert_array_equal(layer.running_var, 64 / 63 * var)
    np.testing.assert_allclose(layer.eval()(x), y * np.sqrt(63 / 64), rtol=1e-5, atol=1e-6)


def test_a_batch_with_all_the_weight_forgets_a_nan(rng):
    layer = BatchNorm(5, momentum=1.0)
    layer(np.full((8, 5), np.nan, np.float32))
    x = rng.standard_normal((8, 5), np.float32)
    layer(x)
    np.testing.assert_array_equal(layer.running_mean, moments(x).mean)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_batch_without_weight_leaves_the_statistics_alone(rng, value):
    layer = BatchNorm(5, momentum=0.0)
    x = rng.standard_normal((8, 5), np.float32)
    x[0] = value
    layer(x)
    np.testing.assert_array_equal(layer.running_mean, np.zeros(5))
    np.testing.assert_array_equal(layer.running_var, np.ones(5))


def test_momentum_none_averages_all_batches(rng):
    layer = BatchNorm(5, momentum=None, dtype=np.float64)
    batches = [batch(rng, dtype=np.float64)[0] for _ in range(5)]
    for x in batches:
        layer(x)
    means = [exact.statistics(x)[1] for x in batches]
    assert error(layer.running_mean, np.mean(means, axis=0)) <= 1e-14


def test_only_training_forwards_are_counted(rng):
    layer = BatchNorm(5)
    for training, expected in ((True, 1), (False, 1), (True, 2)):
        layer.train(training)
        x, dout = batch(rng)
        layer(x)
        layer.backward(dout)
        assert layer.num_batches_tracked == expected


def test_empty_batch_in_training(rng):
    layer = trained(rng)
    before = {key: np.array(value) for key, value in layer.state_dict().items()}
    empty = np.empty((0, 5), np.float32)
    assert layer(empty).shape == (0, 5)
    assert layer.backward(empty).shape == (0, 5)
    np.testing.assert_array_equal(layer.dgamma, np.zeros(5))
    np.testing.assert_array_equal(layer.dbeta, np.zeros(5))
    assert_same_state(layer.state_dict(), before)


def test_reset_running_stats(rng):
    layer = trained(rng)
    gamma = layer.gamma.copy()
    layer.reset_running_stats()
    np.testing.assert_array_equal(layer.running_mean, np.zeros(5))
    np.testing.assert_array_equal(layer.running_var, np.ones(5))
    assert layer.num_batches_tracked == 0
    np.testing.assert_array_equal(layer.gamma, gamma)


def test_without_running_statistics(rng):
    layer = randomize(rng, BatchNorm(5, track_running_stats=False))
    assert layer.running_mean is None
    assert layer.running_var is None
    assert set(layer.state_dict()) == {"weight", "bias"}
    for mode in (True, False):
        layer.train(mode)
        x, dout = batch(rng)
        y, cache = batchnorm_forward(x, layer.gamma, layer.beta)
        np.testing.assert_array_equal(layer(x), y)
        np.testing.assert_array_equal(layer.backward(dout), batchnorm_backward(dout, cache)[0])
    layer.reset_running_stats()
    with pytest.raises(ValueError, match="x"):
        layer(x[:1])


# What is assigned


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize(
    "like",
    [
        np.ndarray.tolist,
        np.float32,
        lambda values: np.repeat(values, 2)[::2],
        lambda values: np.frombuffer(values.tobytes()),
    ],
    ids=["list", "float32", "strided", "read_only"],
)
def test_assigned_statistics_are_float64_and_updated(rng, name, like):
    values = rng.uniform(1, 2, 5).astype(np.float32).astype(np.float64)
    layer = trained(rng)
    twin = copy.deepcopy(layer)
    setattr(layer, name, like(values))
    getattr(twin, name)[...] = values
    assert getattr(layer, name).dtype == np.float64
    x, _ = batch(rng)
    layer(x), twin(x)
    assert_same_state(snapshot(layer), snapshot(twin))


def test_statistics_are_changed_in_place(rng):
    layer = trained(rng)
    mean, var = running(layer)
    layer.running_mean[...] = 3
    layer.running_var *= 2
    layer(batch(rng)[0])
    assert layer.running_mean is mean
    assert layer.running_var is var


def test_assigned_parameters_have_the_dtype_of_the_layer(rng):
    layer = BatchNorm(5)
    layer.gamma, layer.beta = np.full(5, 2.0), [1, 2, 3, 4, 5]
    assert layer.gamma.dtype == layer.beta.dtype == np.float32
    x, dout = batch(rng)
    check_step(layer, exact.Layer(5), x, dout)


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
@pytest.mark.parametrize("value", [None, np.ones(4), np.ones((1, 5)), 1.0, "ones", np.full(5, 1j)])
def test_unfit_arrays_are_not_assigned(rng, name, value):
    layer = trained(rng)
    before = snapshot(layer)
    with pytest.raises((TypeError, ValueError), match=name):
        setattr(layer, name, value)
    assert_same_state(snapshot(layer), before)


def test_negative_variances_are_refused(rng):
    layer = trained(rng)
    before = snapshot(layer)
    negative = np.array([1, np.nan, 1, -2, 1])
    with pytest.raises(ValueError, match=r"running_var .*negative.*-2.* 3"):
        layer.running_var = negative
    with pytest.raises(ValueError, match=r"running_var .*negative.*-2.* 3"):
        layer.load_state_dict({**layer.state_dict(), "running_var": negative})
    assert_same_state(snapshot(layer), before)


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
def test_what_a_layer_lacks_is_not_assigned(name):
    layer = BatchNorm(5, scale=False, shift=False, track_running_stats=False)
    with pytest.raises(AttributeError, match=f"no {name}"):
        setattr(layer, name, np.ones(5))
    assert getattr(layer, name) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("momentum", "a"), ("momentum", 5), ("num_batches_tracked", -1), ("num_batches_tracked", "a")],
)
def test_unfit_numbers_are_not_assigned(rng, name, value):
    layer = trained(rng)
    before = getattr(layer, name)
    with pytest.raises((TypeError, ValueError), match=name):
        setattr(layer, name, value)
    assert getattr(layer, name) == before


def test_gradients_may_be_cleared(rng):
    layer = BatchNorm(5)
    x, dout = batch(rng)
    layer(x)
    layer.backward(dout)
    layer.dgamma = layer.dbeta = None
    assert layer.grads == {"gamma": None, "beta": None}


# Refused calls


def test_a_forward_that_cannot_update_changes_nothing(rng):
    x, dout = batch(rng)
    for name in ("running_mean", "running_var"):
        layer = trained(rng)
        layer(x)
        dx, before, out = layer.backward(dout), snapshot(layer), np.zeros_like(x)
        getattr(layer, name).flags.writeable = False
        with pytest.raises(ValueError, match=name):
            layer.forward(x + 1, out=out)
        assert np.all(out == 0)
        assert_same_state(snapshot(layer), before)
        np.testing.assert_array_equal(layer.backward(dout), dx)


@pytest.mark.parametrize("unfit", [None, np.zeros(4), np.zeros(5, np.float32), np.zeros(10)[::2]])
def test_running_statistics_are_checked_where_they_are_written(rng, unfit):
    x, _ = batch(rng)
    for statistics in ((unfit, np.ones(5)), (np.zeros(5), unfit)):
        with pytest.raises((TypeError, ValueError)):
            functional._training_forward(x, *statistics, 0.1, True, None, None, 1e-5, 1, None)


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((16, 6), np.float32, ["x", "5", "6"]),
        ((16, 5), np.int64, ["x", "int64"]),
        ((5,), np.float32, ["x", "(5,)"]),
        ((1, 5), np.float32, ["x", "(1, 5)"]),
    ],
)
def test_a_refused_forward_changes_nothing(rng, shape, dtype, words):
    layer = trained(rng)
    x, dout = batch(rng)
    layer(x)
    dx = layer.backward(dout)
    before = snapshot(layer)
    with pytest.raises((TypeError, ValueError)) as caught:
        layer(np.ones(shape, dtype))
    for word in words:
        assert word in str(caught.value)
    assert_same_state(snapshot(layer), before)
    np.testing.assert_array_equal(layer.backward(dout), dx)


def test_a_forward_with_an_unfit_output_changes_nothing(rng):
    layer = trained(rng)
    before = snapshot(layer)
    x, _ = batch(rng)
    for out in (np.empty((16, 6), np.float32), np.empty((16, 5)), x):
        with pytest.raises((TypeError, ValueError), match="out"):
            layer(x, out=out)
    assert_same_state(snapshot(layer), before)


def test_a_refused_backward_changes_nothing(rng):
    layer = trained(rng)
    x, dout = batch(rng)
    layer(x)
    dx = layer.backward(dout)
    before = snapshot(layer)
    for unfit in (dout.T, dout[:-1], dout.astype(np.float64)):
        with pytest.raises((TypeError, ValueError), match="dout"):
            layer.backward(unfit)
    assert_same_state(snapshot(layer), before)
    np.testing.assert_array_equal(layer.backward(dout), dx)


# State


@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
@pytest.mark.parametrize("track", [True, False])
def test_state_dict_has_the_keys_of_pytorch(scale, shift, track):
    layer = BatchNorm(5, scale=scale, shift=shift, track_running_stats=track)
    there = [scale, shift, track, track, track]
    assert list(layer.state_dict()) == list(itertools.compress(KEYS, there))


def test_state_dict_is_a_copy(rng):
    layer = trained(rng)
    before = snapshot(layer)
    for value in layer.state_dict().values():
        np.asarray(value)[...] = 42
    assert_same_state(snapshot(layer), before)


def test_state_goes_from_layer_to_layer(rng):
    layer, other = trained(rng), BatchNorm(5)
    other.load_state_dict(layer.state_dict())
    assert_same_state(other.state_dict(), layer.state_dict())
    assert other.num_batches_tracked == 3
    x, _ = batch(rng)
    np.testing.assert_array_equal(other.eval()(x), layer.eval()(x))


def test_loading_copies_and_keeps_dtypes(rng):
    state = trained(rng, dtype=np.float64).state_dict()
    layer = BatchNorm(5)
    layer.load_state_dict(state)
    assert layer.gamma.dtype == layer.beta.dtype == np.float32
    before = snapshot(layer)
    for value in state.values():
        np.asarray(value)[...] = 42
    assert_same_state(snapshot(layer), before)


def test_a_state_may_hold_arrays_of_the_layer(rng):
    layer = trained(rng)
    gamma, beta = layer.gamma.copy(), layer.beta.copy()
    layer.load_state_dict({**layer.state_dict(), "weight": layer.beta, "bias": layer.gamma})
    np.testing.assert_array_equal(layer.gamma, beta)
    np.testing.assert_array_equal(layer.beta, gamma)


def test_params_stay_live_after_loading(rng):
    layer = BatchNorm(5)
    params = layer.params
    layer.load_state_dict(trained(rng).state_dict())
    assert params["gamma"] is layer.gamma


def test_training_goes_on_after_loading(rng):
    layer = trained(rng, momentum=None)
    other = BatchNorm(5, momentum=None)
    other.load_state_dict(layer.state_dict())
    x, _ = batch(rng)
    layer(x), other(x)
    assert_same_state(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("fault", ["missing", "shape", "complex", "text"])
def test_loading_is_all_or_nothing(rng, key, fault):
    layer = trained(rng)
    before = snapshot(layer)
    state = trained(rng).state_dict()
    if fault == "missing":
        del state[key]
    else:
        state[key] = {"shape": np.ones(6), "complex": np.full(5, 1j), "text": "many"}[fault]
    with pytest.raises((KeyError, TypeError, ValueError), match=key):
        layer.load_state_dict(state)
    assert_same_state(snapshot(layer), before)


@pytest.mark.parametrize("count", [7, 7.0, np.array([7]), np.float32(7)])
def test_loaded_count_may_be_any_one_integer(rng, count):
    layer = trained(rng)
    layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": count})
    assert layer.num_batches_tracked == 7
    assert type(layer.num_batches_tracked) is int


@pytest.mark.parametrize("count", [-1, 0.5, np.inf, np.nan, [3, 4]])
def test_loaded_count_must_be_one_integer(rng, count):
    layer = trained(rng)
    before = snapshot(layer)
    with pytest.raises(ValueError, match="num_batches_tracked"):
        layer.load_state_dict({**BatchNorm(5).state_dict(), "num_batches_tracked": count})
    assert_same_state(snapshot(layer), before)


@pytest.mark.parametrize(
    ("name", "key"), [("gamma", "weight"), ("beta", "bias"), ("running_mean",) * 2]
)
def test_nothing_is_loaded_beside_a_read_only_array(rng, name, key):
    layer = trained(rng)
    before = snapshot(layer)
    getattr(layer, name).flags.writeable = False
    with pytest.raises(ValueError, match=key):
        layer.load_state_dict(BatchNorm(5).state_dict())
    assert_same_state(snapshot(layer), before)


def test_unexpected_keys_are_refused(rng):
    layer = trained(rng)
    before = snapshot(layer)
    with pytest.raises((KeyError, ValueError), match="wieght"):
        layer.load_state_dict({**trained(rng).state_dict(), "wieght": np.ones(5)})
    bare = BatchNorm(5, scale=False)
    with pytest.raises((KeyError, ValueError), match="weight"):
        bare.load_state_dict(trained(rng).state_dict())
    assert_same_state(snapshot(layer), before)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("duplicate", [pickled, copy.deepcopy])
@pytest.mark.parametrize("options", [{}, {"scale": False, "axis": -1, "unbiased": False}])
def test_copies_are_the_layer(rng, duplicate, options):
    layer = trained(rng, eps=1e-3, momentum=None, dtype=np.float64, **options).eval()
    x, dout = batch(rng, dtype=np.float64)
    y = layer(x)
    layer.backward(dout)
    other = duplicate(layer)
    assert_same_state(snapshot(other), snapshot(layer))
    assert other.params.get("gamma") is other.gamma
    np.testing.assert_array_equal(other(x), y)
    layer.train()(x), other.train()(x)
    assert_same_state(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize("duplicate", [pickled, copy.deepcopy, copy.copy])
def test_copies_have_no_batch(rng, duplicate):
    layer = BatchNorm(5)
    x, dout = batch(rng)
    layer(x)
    with pytest.raises(RuntimeError, match="forward"):
        duplicate(layer).backward(dout)
    assert layer.backward(dout).shape == x.shape


@pytest.mark.parametrize("duplicate", [pickled, copy.deepcopy])
def test_deep_copies_share_no_memory(rng, duplicate):
    layer = trained(rng)
    other = duplicate(layer)
    before = snapshot(layer)
    other.params["gamma"][:] = 42
    other(batch(rng)[0])
    assert_same_state(snapshot(layer), before)


def test_pickle_is_small(rng):
    layer = BatchNorm(5)
    layer(batch(rng, (10000, 5))[0])
    assert len(pickle.dumps(layer)) < 3000
