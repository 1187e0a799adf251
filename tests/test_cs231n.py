"""The course's functions against its algorithm in NumPy, and by the course's own checks."""

import numpy as np
import pytest

from bn_cy import cs231n

SHAPES = [(4, 5), (2, 3), (200, 50)]


def course_forward(x, gamma, beta, bn_param):
    """The forward of assignment 2, step by step as the course asks for it."""
    mode, eps = bn_param["mode"], bn_param.get("eps", 1e-5)
    momentum = bn_param.get("momentum", 0.9)
    running_mean = bn_param.get("running_mean", np.zeros(x.shape[1]))
    running_var = bn_param.get("running_var", np.zeros(x.shape[1]))
    if mode == "train":
        mean, var = x.mean(axis=0), x.var(axis=0)
        running_mean = momentum * running_mean + (1 - momentum) * mean
        running_var = momentum * running_var + (1 - momentum) * var
    else:
        mean, var = running_mean, running_var
    bn_param["running_mean"], bn_param["running_var"] = running_mean, running_var
    std = np.sqrt(var + eps)
    xhat = (x - mean) / std
    return gamma * xhat + beta, (xhat, gamma, std)


def course_backward(dout, cache):
    """Its backward: through xhat, the variance and the mean."""
    xhat, gamma, std = cache
    dxhat = gamma * dout
    dvar = -np.sum(dxhat * xhat, axis=0) / (2 * std**2)
    dmean = -np.sum(dxhat, axis=0) / std
    dx = dxhat / std + (2 * dvar * xhat * std + dmean) / len(dout)
    return dx, np.sum(dout * xhat, axis=0), np.sum(dout, axis=0)


def rel_error(x, y):
    """The course's measure: the largest difference, relative to the entries."""
    return np.max(np.abs(x - y) / np.maximum(1e-8, np.abs(x) + np.abs(y)))


def numerical_gradient(function, x, dout, h=1e-5):
    """The course's eval_numerical_gradient_array: central differences."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + h
        above = function()
        x[i] = kept - h
        below = function()
        x[i] = kept
        gradient[i] = np.sum((above - below) * dout) / (2 * h)
    return gradient


@pytest.fixture(params=SHAPES, ids=str)
def problem(request, rng):
    """Give x, gamma, beta and dout, spread as in the course's notebook."""
    shape = request.param
    x, dout = 5 * rng.normal(size=shape) + 12, rng.normal(size=shape)
    return x, rng.normal(size=shape[1]), rng.normal(size=shape[1]), dout


@pytest.mark.parametrize("given", [{}, {"eps": 0.01, "momentum": 0.7}], ids=str)
def test_training_and_testing_are_those_of_the_course(problem, rng, given):
    x, gamma, beta, _ = problem
    ours, theirs = dict(given), dict(given)
    for mode in ["train", "train", "train", "test", "train", "test"]:
        ours["mode"] = theirs["mode"] = mode
        batch = x + rng.normal(size=x.shape)
        out, _ = cs231n.batchnorm_forward(batch, gamma, beta, ours)
        expected, _ = course_forward(batch, gamma, beta, theirs)
        np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-11)
        assert ours.keys() == theirs.keys()
        for name in ("running_mean", "running_var"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-13)


@pytest.mark.parametrize("backward", [cs231n.batchnorm_backward, cs231n.batchnorm_backward_alt])
def test_gradients_are_those_of_the_course(problem, backward):
    x, gamma, beta, dout = problem
    _, cache = cs231n.batchnorm_forward(x, gamma, beta, {"mode": "train"})
    _, course_cache = course_forward(x, gamma, beta, {"mode": "train"})
    for ours, theirs in zip(
        backward(dout, cache), course_backward(dout, course_cache), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * max(1, np.abs(theirs).max()))


def test_the_notebook_of_the_course_is_content(rng):
    """Its gradient check: N, D = 4, 5, relative errors between 1e-13 and 1e-8 expected."""
    x, dout = 5 * rng.normal(size=(4, 5)) + 12, rng.normal(size=(4, 5))
    gamma, beta = rng.normal(size=5), rng.normal(size=5)

    def forward():
        return cs231n.batchnorm_forward(x, gamma, beta, {"mode": "train"})[0]

    _, cache = cs231n.batchnorm_forward(x, gamma, beta, {"mode": "train"})
    gradients = cs231n.batchnorm_backward(dout, cache)
    for values, gradient in zip((x, gamma, beta), gradients, strict=True):
        assert np.abs(numerical_gradient(forward, values, dout) - gradient).max() < 1e-8
    for first, second in zip(gradients, cs231n.batchnorm_backward_alt(dout, cache), strict=True):
        assert rel_error(first, second) == 0


def test_after_many_batches_testing_is_close_to_training(rng):
    """The course's check of test mode: means near beta, deviations near gamma."""
    W1, W2 = rng.normal(size=(50, 60)), rng.normal(size=(60, 3))
    gamma, beta = np.array([1.0, 2.0, 3.0]), np.array([11.0, 12.0, 13.0])
    bn_param = {"mode": "train"}
    for _ in range(60):
        a = np.maximum(rng.normal(size=(200, 50)) @ W1, 0) @ W2
        cs231n.batchnorm_forward(a, gamma, beta, bn_param)
    bn_param["mode"] = "test"
    a = np.maximum(rng.normal(size=(2000, 50)) @ W1, 0) @ W2
    out, _ = cs231n.batchnorm_forward(a, gamma, beta, bn_param)
    assert (np.abs(out.mean(axis=0) - beta) < 0.2 * gamma).all()
    np.testing.assert_allclose(out.std(axis=0), gamma, rtol=0.1)


def test_testing_has_a_backward_of_constant_statistics(problem):
    x, gamma, beta, dout = problem
    bn_param = {"mode": "train"}
    cs231n.batchnorm_forward(x, gamma, beta, bn_param)
    bn_param["mode"] = "test"
    _, cache = cs231n.batchnorm_forward(x, gamma, beta, bn_param)
    dx, _, _ = cs231n.batchnorm_backward(dout, cache)
    expected = gamma / np.sqrt(bn_param["running_var"] + 1e-5) * dout
    np.testing.assert_allclose(dx, expected, rtol=1e-13)


def test_running_statistics_that_are_given_are_replaced_and_not_written(rng):
    mean, var = np.zeros(3), np.ones(3)
    bn_param = {"mode": "train", "running_mean": mean, "running_var": var}
    cs231n.batchnorm_forward(rng.normal(size=(8, 3)), np.ones(3), np.zeros(3), bn_param)
    assert (mean == 0).all()
    assert (var == 1).all()
    assert (bn_param["running_mean"] != 0).all()


def test_an_empty_batch_leaves_the_running_statistics():
    kept = {"running_mean": np.full(3, 2.0), "running_var": np.full(3, 5.0)}
    bn_param = {"mode": "train", **kept}
    cs231n.batchnorm_forward(np.empty((0, 3)), np.ones(3), np.zeros(3), bn_param)
    for name, array in kept.items():
        np.testing.assert_array_equal(bn_param[name], array)


def test_a_wrong_mode_is_named():
    x, ones = np.ones((4, 3)), np.ones(3)
    with pytest.raises(ValueError, match=r'"train" or "test", got \'eval\''):
        cs231n.batchnorm_forward(x, ones, ones, {"mode": "eval"})
    with pytest.raises(KeyError, match="mode"):
        cs231n.batchnorm_forward(x, ones, ones, {})


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"momentum": 1.5}, ValueError, r'bn_param\["momentum"\] must be from 0 to 1, got 1\.5'),
        ({"momentum": np.nan}, ValueError, "from 0 to 1, got nan"),
        ({"momentum": None}, TypeError, "must be a number, got None"),
        ({"running_mean": np.zeros((3, 1))}, ValueError, r"\(3,\), .* got \(3, 1\)"),
        ({"running_var": np.zeros(4)}, ValueError, r'"running_var"\] must .*\(3,\), .* got \(4,\)'),
        ({"running_mean": ["1", "2", "3"]}, TypeError, "must be of real numbers, got <U1"),
        ({"running_mean": np.ma.zeros(3)}, TypeError, "must have no mask"),
        ({"running_var": np.array([1.0, -2, 0])}, ValueError, r"not be negative, got -2\.0"),
    ],
)
def test_a_bn_param_that_does_not_fit_is_refused_and_kept(rng, mode, given, kind, message):
    bn_param = {"mode": mode, **given}
    with pytest.raises(kind, match=message):
        cs231n.batchnorm_forward(rng.normal(size=(8, 3)), np.ones(3), np.zeros(3), bn_param)
    assert bn_param.keys() == {"mode", *given}


def test_statistics_may_be_lists(rng):
    x = rng.normal(size=(8, 3))
    given = {"running_mean": [1.0, 2.0, 3.0], "running_var": [4.0, 5.0, 6.0]}
    lists = {"mode": "train", **given}
    arrays = {"mode": "train", **{name: np.array(row) for name, row in given.items()}}
    for bn_param in (lists, arrays):
        cs231n.batchnorm_forward(x, np.ones(3), np.zeros(3), bn_param)
    for name in given:
        np.testing.assert_array_equal(lists[name], arrays[name])
