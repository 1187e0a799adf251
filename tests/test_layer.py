"""The layer against an 80-bit model: options, modes, running statistics, state."""

import copy
import itertools
import pickle
import threading
import weakref

import exact
import numpy as np
import pytest
from exact import COMBINATIONS, TOLERANCE, error

from bn_cy import (
    BatchNorm,
    _calls,
    batchnorm_backward,
    batchnorm_forward,
    functional,
    moments,
    set_num_threads,
)

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
    assert (layer.num_features, layer.dtype, layer.frozen) == (5, np.float32, False)
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


def test_call_is_the_forward_of_a_subclass(rng):
    class OfIntegers(BatchNorm):
        def forward(self, x, **options):
            return super().forward(np.asarray(x, np.float32), **options)

    x, layer = rng.integers(0, 9, (8, 5)), OfIntegers(5)
    np.testing.assert_array_equal(layer(x, update=False), layer.forward(x))
    assert layer.num_batches_tracked == 1


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
        ({"num_features": 0}, "num_features"),
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
        ({"dtype": None}, "dtype must be float32 or float64, got None"),
        ({"dtype": "foo"}, "dtype must be float32 or float64, got 'foo'"),
        ({"on_nonfinite": np.arange(2)}, "on_nonfinite must be one of"),
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
    cache = layer.cache
    first = layer.backward(dout, cache=cache), layer.dgamma.copy(), layer.dbeta.copy()
    layer.backward(rng.standard_normal(x.shape).astype(np.float32), cache=cache)
    second = layer.backward(dout, cache=cache), layer.dgamma, layer.dbeta
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


def test_a_cache_belongs_to_the_mode_of_its_forward(rng):
    layer = trained(rng)
    x, dout = batch(rng)
    layer(x)
    cache = layer.cache
    dx = layer.backward(dout)
    layer.eval()
    np.testing.assert_array_equal(layer.backward(dout, cache=cache), dx)
    layer(x)
    frozen_cache = layer.cache
    frozen = layer.backward(dout)
    layer.train()
    np.testing.assert_array_equal(layer.backward(dout, cache=frozen_cache), frozen)
    assert not np.array_equal(frozen, dx)


@pytest.mark.parametrize("training", [True, False])
def test_a_backward_in_another_mode_than_its_forward_is_refused(rng, training):
    layer = trained(rng).train(training)
    x, dout = batch(rng)
    layer(x)
    layer.train(not training)
    mode = "training" if training else "eval"
    with pytest.raises(RuntimeError, match=f"the last forward was in {mode} mode.*cache="):
        layer.backward(dout)
    assert not any(gradient.any() for gradient in layer.grads.values())
    layer.train(training)
    assert np.isfinite(layer.backward(dout)).all()


def test_a_cache_serves_one_backward_and_is_let_go(rng):
    layer = trained(rng)
    x, dout = batch(rng)
    layer(x)
    alive = weakref.ref(x)
    del x
    layer.backward(dout)
    assert layer.cache is None
    assert alive() is None
    with pytest.raises(RuntimeError, match=r"each forward serves one backward.*layer\.cache"):
        layer.backward(dout)


def test_two_forwards_and_then_two_backwards(rng):
    layer, twin = trained(rng), trained(rng)
    twin.load_state_dict(layer.state_dict())
    (first, dout), (second, other) = batch(rng), batch(rng)
    twin(first)
    expected = [twin.backward(dout), twin.dgamma, twin.dbeta]
    layer(first)
    cache = layer.cache
    layer(second)
    layer.backward(other)
    actual = [layer.backward(dout, cache=cache), layer.dgamma, layer.dbeta]
    for one, of_twin in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, of_twin)


def test_a_cache_of_another_layer_is_refused(rng):
    layer, other = BatchNorm(5), BatchNorm(5, scale=False)
    x, dout = batch(rng)
    other(x)
    with pytest.raises(ValueError, match=r"of a forward of this layer: expected .*True, True"):
        layer.backward(dout, cache=other.cache)
    with pytest.raises(TypeError, match="cache must be a Cache, got str"):
        layer.backward(dout, cache="last")
    grouped = BatchNorm(5, ghost_batch_size=8)
    grouped(x)
    with pytest.raises(TypeError, match=r"a Cache, .* got GhostCache; .* the layer's"):
        functional.batchnorm_backward(dout, grouped.cache)
    with pytest.raises(TypeError):
        functional.Cache(None)
    assert not any(gradient.any() for gradient in layer.grads.values())


def test_copies_of_the_parameters_are_plain(rng):
    layer = trained(rng)
    for best in (copy.deepcopy(layer.params), pickle.loads(pickle.dumps(layer.params))):
        assert type(best) is dict
        layer.gamma[:] = 9
        assert best["gamma"][0] != 9
        layer.params.update(best)
        np.testing.assert_array_equal(layer.gamma, best["gamma"])


def test_a_cache_has_the_statistics_of_the_batch(rng):
    layer = trained(rng)
    x, _ = batch(rng)
    layer(x)
    count, mean, var = moments(x)
    assert layer.cache.count == count
    np.testing.assert_array_equal(layer.cache.mean, mean)
    np.testing.assert_array_equal(layer.cache.var, var)
    layer.eval()(x)
    assert layer.cache.count == np.inf
    np.testing.assert_array_equal(layer.cache.mean, layer.running_mean)
    with pytest.raises(TypeError, match="a Cache does not pickle: it refers to the batch"):
        pickle.dumps(layer.cache)


def test_frozen_backward_uses_the_statistics_of_its_forward(rng):
    layer = trained(rng).eval()
    x, dout = batch(rng)
    layer(x)
    cache = layer.cache
    dx = layer.backward(dout, cache=cache)
    layer.reset_running_stats()
    np.testing.assert_array_equal(layer.backward(dout, cache=cache), dx)


# Freezing, and forwards that do not count


def test_a_frozen_layer_trains_its_parameters_alone(rng):
    layer, evaluated = trained(rng).freeze(), trained(rng).eval()
    evaluated.load_state_dict(layer.state_dict())
    before = snapshot(layer)
    assert layer.frozen
    x, dout = batch(rng)
    for _ in range(2):
        np.testing.assert_array_equal(layer.train()(x), evaluated(x))
        np.testing.assert_array_equal(layer.backward(dout), evaluated.backward(dout))
        np.testing.assert_array_equal(layer.dgamma, evaluated.dgamma)
        np.testing.assert_array_equal(layer.dbeta, evaluated.dbeta)
    after = snapshot(layer)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        np.testing.assert_array_equal(getattr(layer, name), getattr(evaluated, name))
    assert len(before) == len(after)
    assert copy.deepcopy(layer).frozen
    assert pickle.loads(pickle.dumps(layer)).frozen
    layer.unfreeze()(x)
    assert layer.num_batches_tracked == evaluated.num_batches_tracked + 1


def test_a_layer_without_running_statistics_is_not_frozen():
    with pytest.raises(RuntimeError, match="no running statistics"):
        BatchNorm(5, track_running_stats=False).freeze()


def test_a_forward_that_does_not_update(rng):
    layer = trained(rng)
    x, dout = batch(rng)
    before = layer.state_dict()
    y = layer(x, update=False)
    dx = layer.backward(dout)
    assert_same_state(layer.state_dict(), before)
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(layer.backward(dout), dx)
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


# Batches that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_batch_that_is_not_finite_is_refused_by_default(rng, value):
    layer = trained(rng)
    x, _ = batch(rng)
    before = snapshot(layer)
    x[3, [1, 4]] = value
    with pytest.raises(FloatingPointError, match="at 2 of the features: 1, 4; the batch is not"):
        layer(x)
    assert_same_state(snapshot(layer), before)
    assert layer.cache is None  # of the batch before


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(64, 2000), (20000, 12), (4, 3, 50, 60), (2, 5000)])
def test_no_feature_is_updated_where_one_is_not_finite(rng, shape, threads):
    set_num_threads(threads)
    try:
        layer = BatchNorm(shape[1])
        x = rng.standard_normal(shape, np.float32)
        x[-1, -1] = np.nan
        with pytest.raises(FloatingPointError, match=f"features: {shape[1] - 1};"):
            layer(x)
        assert not layer.running_mean.any()
        layer.on_nonfinite = "skip"
        y = layer(x)
        assert np.isnan(y[:, -1]).all()
        assert np.isfinite(y[:, :-1]).all()
        assert not layer.running_mean.any()
        assert layer.num_batches_tracked == 0
        layer.on_nonfinite = "update"
        layer(x)
        assert np.isnan(layer.running_mean[-1])
        assert np.all(layer.running_mean[:-1] != 0)
        assert layer.num_batches_tracked == 1
    finally:
        set_num_threads(None)


def test_a_double_whose_variance_overflows_is_not_finite(rng):
    layer = BatchNorm(2, dtype=np.float64)
    x = rng.standard_normal((9, 2))
    x[:, 1] *= 1e200
    with pytest.raises(FloatingPointError, match="or a variance that overflows, at 1 of the feat"):
        layer(x)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="on_nonfinite must be one of raise, skip, update"):
        BatchNorm(3, on_nonfinite="ignore")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_threads_that_train_one_layer_lose_no_batch(rng, momentum):
    layer = BatchNorm(700, momentum=momentum)
    batches = [k + rng.standard_normal((40, 700), np.float32) for k in range(4)]

    def train(x):
        for _ in range(25):
            layer(x)

    workers = [threading.Thread(target=train, args=(x,)) for x in batches]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert layer.num_batches_tracked == 100
    if momentum is None:
        expected = np.mean([moments(x).mean for x in batches], axis=0)
        np.testing.assert_allclose(layer.running_mean, expected, rtol=1e-12)


USES = {
    "forward": lambda layer, x: layer(x),
    "state_dict": lambda layer, x: layer.state_dict(),
    "load_state_dict": lambda layer, x: layer.load_state_dict(BatchNorm(5).state_dict()),
    "reset_running_stats": lambda layer, x: layer.reset_running_stats(),
    "pickle": lambda layer, x: pickle.dumps(layer),
    "copy": lambda layer, x: copy.copy(layer),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_another_thread_waits_for_a_training_forward(rng, use):
    layer = trained(rng)
    before = snapshot(layer)
    worker = threading.Thread(target=use, args=(layer, batch(rng)[0]))
    with layer._lock:  # as such a forward has it
        worker.start()
        worker.join(0.1)
        assert worker.is_alive()
        assert_same_state(snapshot(layer), before)
    worker.join(60)
    assert not worker.is_alive()


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
    dict.__setitem__(arrays, name, out[2])
    with pytest.raises(ValueError, match="out may not share memory with"):
        layer(rng.standard_normal((4, 6)), out=out)
    assert np.all(out == 1)
    assert layer.num_batches_tracked == 0


class Tensor:
    """An array of another library."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.mark.parametrize("name", ["gamma", "running_mean", "running_var", "dbeta"])
@pytest.mark.parametrize("wrap", [np.asarray, Tensor])
def test_out_may_not_be_of_the_layer_in_any_mode(rng, name, wrap):
    layer = BatchNorm(4, dtype=np.float64, ghost_batch_size=2)
    x = rng.standard_normal((4, 4))
    row = getattr(layer, name).reshape(1, 4)
    square = np.lib.stride_tricks.as_strided(row, x.shape, (0, 8))  # every row is the layer's own
    before = layer.state_dict()
    what = {"gamma": "gamma or beta", "dbeta": "grads"}.get(name, "the running statistics")
    layer.dgamma = None  # one that was cleared

    def check(call, *given, out, **options):
        with pytest.raises(ValueError, match=f"out may not share memory with {what}"):
            call(*given, out=wrap(out), **options)
        assert_same_state(layer.state_dict(), before)

    check(layer, x, out=square)  # in groups
    layer.ghost_batch_size = None
    check(layer, x, out=square)
    check(layer, x, out=square, update=False)
    check(layer, x, out=square, mask=np.ones(4, bool))
    check(layer.freeze(), x, out=square)
    check(layer.unfreeze().eval(), x[:1], out=row)
    layer(x[:1])
    check(layer.backward, x[:1], out=row)


def test_a_masked_batch_is_refused(rng):
    layer = BatchNorm(5)
    before = snapshot(layer)
    x = batch(rng)[0]
    with pytest.raises(TypeError, match=r"x must have no mask.*x\.filled.*mask=, a flag for each"):
        layer(np.ma.masked_greater(x, 0))
    out = np.ma.zeros((16, 5), np.float32)
    with pytest.raises(TypeError, match=r"out must have no mask, got MaskedArray: pass out\.data$"):
        layer(x, out=out)
    assert_same_state(snapshot(layer), before)
    layer.eval()(x)
    with pytest.raises(
        TypeError, match=r"dout must have no mask.* pass dout\.data or dout\.filled"
    ):
        layer.backward(out)
    with pytest.raises(TypeError, match=r"out must have no mask"):
        layer.backward(x, out=out)
    assert not out.any()


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
    layer = BatchNorm(5, momentum=1.0, on_nonfinite="update")
    layer(np.full((8, 5), np.nan, np.float32))
    x = rng.standard_normal((8, 5), np.float32)
    layer(x)
    np.testing.assert_array_equal(layer.running_mean, moments(x).mean)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_batch_without_weight_leaves_the_statistics_alone(rng, value):
    layer = BatchNorm(5, momentum=0.0, on_nonfinite="update")
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
    negative = np.array([1, 0, 1, -2, 1])
    with pytest.raises(ValueError, match=r"running_var .*negative.*-2.* 3"):
        layer.running_var = negative
    with pytest.raises(ValueError, match=r"running_var .*negative.*-2.* 3"):
        layer.load_state_dict({**layer.state_dict(), "running_var": negative})
    assert_same_state(snapshot(layer), before)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(rng, name, value):
    layer = trained(rng)
    before = snapshot(layer)
    statistics = np.ones(5)
    statistics[3] = value
    with pytest.raises(ValueError, match=f"{name} must be finite, got {value} at 1 of.*: 3"):
        setattr(layer, name, statistics)
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        layer.load_state_dict({**layer.state_dict(), name: statistics})
    assert_same_state(snapshot(layer), before)


def test_arrays_of_the_layer_keep_their_place(rng):
    layer = trained(rng)
    gamma, held = layer.gamma, layer.params
    layer.params["gamma"] = np.arange(5.0)
    layer.params["gamma"] -= 1
    layer.params.update(beta=np.full(5, 3))
    with pytest.raises(ValueError, match="beta must have shape"):
        layer.params.update(gamma=np.full(5, 7), beta=np.full(6, 7))
    assert layer.params is held
    assert layer.gamma is gamma is held["gamma"]
    assert gamma.tolist() == [-1, 0, 1, 2, 3]
    assert layer.beta.tolist() == [3] * 5
    with pytest.raises(ValueError, match=r"gamma must have shape \(5,\)"):
        layer.params["gamma"] = np.ones(6)
    with pytest.raises(KeyError):
        layer.params["delta"] = np.ones(5)
    for change in (held.clear, held.popitem, lambda: held.pop("gamma")):
        with pytest.raises(TypeError, match="keep their place"):
            change()


@pytest.mark.parametrize("name", ["num_features", "dtype", "params", "frozen", "cache"])
def test_what_the_layer_was_made_by_is_not_assigned(name):
    layer = BatchNorm(5)
    value = getattr(layer, name)
    with pytest.raises(AttributeError):
        setattr(layer, name, value)


@pytest.mark.parametrize(
    ("name", "value"), [("eps", -1.0), ("eps", "a"), ("axis", 1.5), ("on_nonfinite", None)]
)
def test_attributes_are_checked_where_they_are_assigned(name, value):
    layer = BatchNorm(5)
    before = getattr(layer, name)
    with pytest.raises((TypeError, ValueError), match=name):
        setattr(layer, name, value)
    assert getattr(layer, name) == before


@pytest.mark.parametrize("name", ["training", "unbiased", "relu"])
@pytest.mark.parametrize("value", ["eval", None, 2, 1.0, np.ones(5), [True]])
def test_what_only_counts_as_true_is_not_assigned(name, value):
    layer = BatchNorm(5)
    before = getattr(layer, name)
    with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
        setattr(layer, name, value)
    assert getattr(layer, name) is before
    for flag in (np.False_, 1, False, np.int64(1), np.array(False), np.array(1)):
        setattr(layer, name, flag)
        assert getattr(layer, name) is bool(flag)


@pytest.mark.parametrize("name", ["scale", "shift", "track_running_stats", "unbiased", "relu"])
def test_arrays_and_text_are_no_flags(name):
    for value in (np.ones(5), np.ones(1), "no"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
            BatchNorm(5, **{name: value})


def test_a_mode_is_a_flag(rng):
    layer = trained(rng)
    with pytest.raises(TypeError, match="mode must be True or False, got 'eval'"):
        layer.train("eval")
    assert layer.training
    assert not layer.train(np.False_).training


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("running_var", -5, "running_var must not be negative, got -4"),
        ("running_var", np.nan, "running_var must be finite, got nan"),
        ("running_mean", np.inf, "running_mean must be finite, got inf"),
    ],
)
def test_statistics_are_checked_after_an_operation_in_place(name, bad, message):
    layer = BatchNorm(3)
    with pytest.raises(ValueError, match=message):
        setattr(layer, name, getattr(layer, name).__iadd__(bad))


def test_a_cache_with_parameters_of_another_shape_leaves_gradients_of_the_layers(rng):
    x, dout = rng.standard_normal((2, 6, 3))
    layer = BatchNorm(3, dtype=np.float64)
    _, cache = batchnorm_forward(x, np.ones((1, 3)), np.zeros((3, 1)).T)
    layer.backward(dout, cache=cache)
    assert layer.dgamma.shape == layer.dbeta.shape == (3,)
    np.testing.assert_allclose(layer.dbeta, dout.sum(0))
    layer.params["gamma"] -= 0.1 * layer.grads["gamma"]


def test_missing_gradients_are_named():
    layer = BatchNorm(3, scale=False)
    with pytest.raises(AttributeError, match="this layer has no dgamma"):
        layer.dgamma = np.ones(3)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_whether_to_update_is_a_flag(rng, mode):
    layer = getattr(trained(rng), mode)()
    before = snapshot(layer)
    with pytest.raises(TypeError, match="update must be True or False, got 'no'"):
        layer(rng.standard_normal((6, 5)), update="no")
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


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("params", "assign its entries"),
        ("grads", "assign its entries; None clears one"),
        ("num_features", "make a new layer"),
        ("dtype", "make a new layer"),
        ("frozen", r"call freeze\(\) or unfreeze\(\)"),
        ("cache", "pass one to backward as cache="),
    ],
)
def test_what_cannot_be_assigned_names_another_way(rng, name, instead):
    layer = trained(rng)
    x, dout = batch(rng)
    layer(x)
    own = getattr(layer, name)
    for value in (None, own):
        with pytest.raises(
            AttributeError, match=f"{name} of a layer cannot be assigned: {instead}"
        ):
            setattr(layer, name, value)
    assert getattr(layer, name) is own
    assert np.isfinite(layer.backward(dout)).all()


# Refused calls


def test_a_forward_that_cannot_update_changes_nothing(rng):
    x, dout = batch(rng)
    for name in ("running_mean", "running_var"):
        layer = trained(rng)
        layer(x)
        dx = layer.backward(dout, cache=layer.cache)
        before, out = snapshot(layer), np.zeros_like(x)
        getattr(layer, name).flags.writeable = False
        with pytest.raises(ValueError, match=name):
            layer.forward(x + 1, out=out)
        assert np.all(out == 0)
        assert_same_state(snapshot(layer), before)
        np.testing.assert_array_equal(layer.backward(dout), dx)


def test_arrays_are_assigned_all_or_none(rng):
    """Also where one turns out to be read-only when another could be written."""
    layer = trained(rng)
    x, _ = batch(rng)
    layer(x)
    before = snapshot(layer)
    layer.beta.flags.writeable = layer.running_var.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        layer.params.update(gamma=np.full(5, 7), beta=np.full(5, 7))
    with pytest.raises(ValueError, match="read-only"):
        layer.reset_running_stats()
    with pytest.raises(ValueError, match=r"beta cannot be assigned: .* read-only"):
        layer.beta = np.full(5, 7)
    assert_same_state(snapshot(layer), before)


class Full(np.ndarray):
    """An array to which nothing can be copied, as memory ends."""

    def __setitem__(self, *_):
        raise MemoryError("none")


def test_a_result_that_cannot_be_copied_changes_nothing(rng):
    layer = trained(rng)
    x, _ = batch(rng)
    layer(x)
    before = snapshot(layer)
    out = np.zeros((16, 10), x.dtype)[:, ::2].view(Full)
    with pytest.raises(MemoryError, match="none"):
        layer(x + 1, out=out)
    assert_same_state(snapshot(layer), before)


@pytest.mark.parametrize("unfit", [None, np.zeros(4), np.zeros(5, np.float32), np.zeros(10)[::2]])
def test_running_statistics_are_checked_where_they_are_written(rng, unfit):
    x, _ = batch(rng)
    tracked = np.zeros((), np.int64)
    rest = 0.1, True, True, None, None, 1e-5, 1, None, False, None
    for statistics in ((unfit, np.ones(5)), (np.zeros(5), unfit)):
        with pytest.raises((TypeError, ValueError)):
            _calls.training_forward(x, *statistics, tracked, *rest)
    assert tracked == 0


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
    dx = layer.backward(dout, cache=layer.cache)
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
    dx = layer.backward(dout, cache=layer.cache)
    before = snapshot(layer)
    for unfit in (dout.T, dout[:-1], dout.astype(np.int64)):
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


def test_a_state_without_a_counter_and_a_state_of_a_network(rng):
    layer, other = trained(rng), trained(rng)
    state = other.state_dict()
    network = {f"layers.1.{key}": value for key, value in state.items()}
    network["layers.10.weight"] = network["head.bias"] = np.ones(7)
    layer.load_state_dict(network, prefix="layers.1.")
    assert_same_state(layer.state_dict(), state)
    del state["num_batches_tracked"]
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0
    with pytest.raises(KeyError, match=r"missing: \['weight'\], unexpected: \['wieght'\]"):
        layer.load_state_dict({**{k: v for k, v in state.items() if k != "weight"}, "wieght": 1})


def test_keys_are_named_with_their_prefix(rng):
    layer = BatchNorm(5, track_running_stats=False)
    with pytest.raises(KeyError, match=r"\['c.weight', 'c.bias'\]; no key begins with 'c.'"):
        layer.load_state_dict(layer.state_dict(), prefix="c.")
    with pytest.raises(KeyError, match=r"missing: \['c.bias'\], unexpected: \['c.gain'\]"):
        layer.load_state_dict({"c.weight": np.ones(5), "c.gain": 1, "gain": 1}, prefix="c.")
    with pytest.raises(KeyError, match=r"missing: \['bias', 'weight'\], unexpected: none"):
        layer.load_state_dict({})


@pytest.mark.parametrize(
    ("state", "prefix", "message"),
    [
        ([("weight", np.ones(5))], "", "state must be a mapping of str to array, .*got list"),
        ("weight", "", "state must be a mapping of str to array, .*got str"),
        (None, "", "state must be a mapping of str to array, .*got NoneType"),
        ({0: np.ones(5)}, "", "state must have keys of str, got the int 0"),
        ({b"weight": np.ones(5)}, "", "state must have keys of str, got the bytes b'weight'"),
        ({}, None, 'prefix must be a str, such as "layers.1.", or "" for none, got NoneType'),
        ({}, 1, "prefix must be a str, .*got int"),
    ],
)
def test_what_is_no_state_is_refused(rng, state, prefix, message):
    layer = trained(rng)
    before = snapshot(layer)
    with pytest.raises(TypeError, match=message):
        layer.load_state_dict(state, prefix=prefix)
    assert_same_state(snapshot(layer), before)


def test_a_pickle_of_a_later_version_is_refused(rng):
    state = trained(rng).__getstate__()
    with pytest.raises(ValueError, match="pickled in version 4 of its format"):
        BatchNorm(5).__setstate__({**state, "_pickle_version": 4})


def test_a_pickle_of_version_2_loads(rng):
    layer = trained(rng)
    state = layer.__getstate__() | {"version": 2}
    del state["_pickle_version"]
    again, before = BatchNorm.__new__(BatchNorm), dict(state)
    again.__setstate__(state)
    assert state == before
    assert vars(again).keys() == vars(layer).keys()
    assert_same_state(snapshot(again), snapshot(layer))


class Named(BatchNorm):
    """A layer with attributes of its own."""


class Slotted(BatchNorm):
    """One with a slot, and one that is never filled."""

    __slots__ = ("grade", "unused")


class Evaluating(BatchNorm):
    """One with a default of its own where `BatchNorm` has a property."""

    training = False


class SlottedFlag(BatchNorm):
    """One with a slot there."""

    __slots__ = ("training",)


@pytest.mark.parametrize("kind", [Evaluating, SlottedFlag])
def test_a_subclass_may_have_a_flag_of_its_own(kind):
    layer = kind(5).eval()
    for mode in (False, True):
        for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
            assert again.training is mode
            assert vars(again).keys() == vars(layer).keys()
        layer.train()


@pytest.mark.parametrize("kind", [Named, Slotted])
def test_attributes_of_a_subclass_are_kept(rng, kind):
    layer = kind(5)
    layer.version, layer.grade = "v7", 3
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert (again.version, again.grade) == ("v7", 3)
        assert not hasattr(again, "unused")
        assert vars(again).keys() == vars(layer).keys()


@pytest.mark.parametrize("change", ["eval", "freeze", "train"])
def test_repr_is_the_expression_of_such_a_layer(change):
    layer = BatchNorm(5, eps=1e-3, momentum=None, shift=False, axis=-1, dtype="f8", relu=True)
    getattr(layer, change)()
    again = eval(repr(layer), {"BatchNorm": BatchNorm})
    assert repr(again) == repr(layer)
    assert (again.training, again.frozen) == (layer.training, layer.frozen)
    assert repr(layer).endswith({"eval": ".eval()", "freeze": ".freeze()", "train": ")"}[change])


def test_a_batch_without_the_feature_axis_is_refused():
    with pytest.raises(ValueError, match=r"axis must be from -2 to 1 for x of shape \(7, 5\)"):
        BatchNorm(5, axis=3)(np.ones((7, 5), np.float32))


def test_a_batch_of_channels_last_is_hinted_at(rng):
    with pytest.raises(ValueError, match=r"features along axis 1.*last axis: axis=-1"):
        BatchNorm(5)(np.ones((7, 3, 5), np.float32))
    with pytest.raises(ValueError, match=r"two values per feature or more.*ones in eval mode"):
        BatchNorm(5)(np.ones((1, 5), np.float32))


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        (key, fault)
        for key in KEYS
        for fault in ("missing", "shape", "complex", "text")
        if (key, fault) != ("num_batches_tracked", "missing")  # then it is 0
    ],
)
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


@pytest.mark.parametrize("count", [7, 7.0, np.array([7]), np.float32(7), 2**63 - 1])
def test_loaded_count_may_be_any_one_integer(rng, count):
    layer = trained(rng)
    layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": count})
    assert layer.num_batches_tracked == count
    assert type(layer.num_batches_tracked) is int


@pytest.mark.parametrize("count", [-1, 0.5, 2**63, 2**70, np.inf, np.nan, [3, 4]])
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


@pytest.mark.parametrize("duplicate", [pickled, copy.deepcopy, copy.copy])
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


@pytest.mark.parametrize("duplicate", [pickled, copy.deepcopy, copy.copy])
def test_copies_share_no_memory(rng, duplicate):
    layer = trained(rng)
    x, dout = batch(rng)
    layer(x)
    layer.backward(dout)
    layer.dbeta = None
    other = duplicate(layer)
    before = snapshot(layer)
    assert_same_state(snapshot(other), before)
    for array in (*other.params.values(), other.dgamma, other.running_mean, other.running_var):
        array[:] = 42
    other.grads["beta"] = other.dgamma
    other(x)
    assert_same_state(snapshot(layer), before)


def test_pickle_is_small(rng):
    layer = BatchNorm(5)
    layer(batch(rng, (10000, 5))[0])
    assert len(pickle.dumps(layer)) < 3000
