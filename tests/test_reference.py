"""The reference against exact arithmetic, finite differences and itself."""

import doctest
import itertools
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from bn_cy import BatchNorm, reference

SHAPES_AND_AXES = [
    ((8, 3), 1),
    ((8, 3), -1),
    ((3, 8), 0),
    ((4, 3, 2), 1),
    ((4, 2, 3), -1),
    ((2, 3, 2, 2), 1),
    ((2, 2, 2, 3), 3),
    ((3, 2, 2, 2), 0),
    ((2, 2, 1, 3, 2), -2),
]
DTYPES = [np.float32, np.float64, np.longdouble]
PRECISE_DTYPES = [np.float64, np.longdouble]
EPS = 1e-3  # large enough that leaving it out shows

BACKWARD_PASSES = {
    "staged": lambda dout, x, gamma, beta, axis: reference.staged_backward(
        dout, reference.staged_forward(x, gamma, beta, EPS, axis=axis)[1]
    ),
    "closed_form": lambda dout, x, gamma, beta, axis: reference.backward_closed_form(
        dout, x, gamma, EPS, axis=axis
    ),
    "through_statistics": lambda dout, x, gamma, beta, axis: reference.backward_through_statistics(
        dout, x, gamma, EPS, axis=axis
    ),
}

over_shapes = pytest.mark.parametrize(("shape", "axis"), SHAPES_AND_AXES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)
over_precise_dtypes = pytest.mark.parametrize("dtype", PRECISE_DTYPES)
over_backward_passes = pytest.mark.parametrize("backward", BACKWARD_PASSES)


class Batch:
    """A random problem: batch, parameters and upstream gradient."""

    def __init__(self, rng, shape, axis, dtype=np.float64):
        features = shape[axis]
        self.other_axes = tuple(i for i in range(len(shape)) if i != axis % len(shape))
        self.gamma = rng.uniform(0.5, 2, features).astype(dtype)
        self.beta = rng.normal(size=features).astype(dtype)
        self.x = spread(rng, shape, axis).astype(dtype)
        self.dout = rng.normal(size=shape).astype(dtype)

    def mean(self, values):
        return np.mean(values, axis=self.other_axes)

    def wide(self, per_feature):
        return np.expand_dims(per_feature, self.other_axes)

    def replay(self, **given):
        """Forward pass in which the steps named are not computed but given."""

        def step(name, compute):
            return given[name] if name in given else compute()

        x = step("x", lambda: self.x)
        mu = step("mu", lambda: self.mean(x))
        xmu = step("xmu", lambda: x - self.wide(mu))
        sq = step("sq", lambda: xmu**2)
        var = step("var", lambda: self.mean(sq))
        sqrtvar = step("sqrtvar", lambda: np.sqrt(var + EPS))
        ivar = step("ivar", lambda: 1 / sqrtvar)
        xhat = step("xhat", lambda: xmu * self.wide(ivar))
        gammax = step("gammax", lambda: self.wide(self.gamma) * xhat)
        return gammax + self.wide(self.beta)


def spread(rng, shape, axis):
    """Draw features whose standard deviation is about 1, so that differences need no luck."""
    features = shape[axis]
    n = int(np.prod(shape)) // features
    grid = np.linspace(-1.7, 1.7, n)[:, None] + rng.uniform(-0.1, 0.1, (n, features))
    rows = rng.permuted(grid, axis=0) + rng.normal(size=features)
    folded = [size for i, size in enumerate(shape) if i != axis % len(shape)]
    return np.moveaxis(rows.reshape(*folded, features), -1, axis)


def assert_gradient(function, x, dout, dx, step=None):
    """Hold dx against differences, at 1000 times their ideal error u^(4/5)."""
    error = reference.check_gradient(function, x, dout, dx, step=step)
    assert error.shape == x.shape
    assert (error <= 1000 * np.finfo(x.dtype).eps ** 0.8).all(), error


def assert_close(actual, desired, ulps=200):
    """Compare to some units of rounding of the largest entry, dtype and shape included."""
    assert actual.dtype == desired.dtype
    assert actual.shape == desired.shape
    tolerance = ulps * np.finfo(desired.dtype).eps * max(1, np.abs(desired).max())
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance)


# Moments and forward


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_of_random_data_are_those_of_exact_arithmetic(rng, dtype):
    x = (100 + rng.normal(size=(20, 3))).astype(dtype)
    count, mean, var = reference.moments(x)
    assert count == 20
    for feature in range(3):
        values = [Fraction(float(value)) for value in x[:, feature]]
        exact_mean = sum(values) / 20
        exact_var = sum((value - exact_mean) ** 2 for value in values) / 20
        precision = float(np.finfo(dtype).eps)
        assert float(mean[feature]) == pytest.approx(float(exact_mean), rel=20 * precision)
        # d^2, for a mean that is off by d, comes to the rounding of the sum.
        error_of_mean = 20 * 100 * precision
        assert float(var[feature]) == pytest.approx(
            float(exact_var), rel=40 * precision, abs=error_of_mean**2
        )


@over_dtypes
@over_shapes
def test_moments_over_any_axis(rng, shape, axis, dtype):
    x = Batch(rng, shape, axis, dtype).x
    rows = np.moveaxis(x, axis, -1).reshape(-1, shape[axis])
    count, mean, var = reference.moments(x, axis=axis)
    assert count == len(rows)
    assert_close(mean, rows.mean(axis=0))
    assert_close(var, rows.var(axis=0))


@over_shapes
def test_one_pass_is_right_where_the_mean_is_small(rng, shape, axis):
    x = Batch(rng, shape, axis).x
    count, mean, var = reference.moments_one_pass(x, axis=axis)
    expected_count, expected_mean, expected_var = reference.moments(x, axis=axis)
    assert count == expected_count
    assert_close(mean, expected_mean)
    assert_close(var, expected_var)


@pytest.mark.parametrize(("dtype", "offset"), [(np.float32, 1e4), (np.float64, 1e9)])
def test_one_pass_loses_the_variance_at_an_offset_and_two_passes_keep_it(dtype, offset):
    # Dyadic deviations, exact at these offsets in both dtypes. Their variance is 0.3125.
    x = (offset + np.array([[-0.75], [-0.25], [0.25], [0.75]])).astype(dtype)
    assert reference.moments(x)[2][0] == 0.3125
    assert abs(reference.moments_one_pass(x)[2][0] - 0.3125) > 0.3


@over_dtypes
@over_shapes
def test_forward_has_mean_beta_and_the_variance_of_its_derivation(rng, shape, axis, dtype):
    batch = Batch(rng, shape, axis, dtype)
    y = reference.forward(batch.x, batch.gamma, batch.beta, EPS, axis=axis)
    assert y.dtype == dtype
    _, _, var_x = reference.moments(batch.x, axis=axis)
    _, mean_y, var_y = reference.moments(y, axis=axis)
    assert_close(mean_y, batch.beta)
    assert_close(var_y, batch.gamma**2 * var_x / (var_x + EPS))


@over_shapes
def test_absent_parameters_are_ones_and_zeros(rng, shape, axis):
    batch = Batch(rng, shape, axis)
    x, gamma, beta = batch.x, batch.gamma, batch.beta
    ones, zeros = np.ones_like(gamma), np.zeros_like(beta)
    assert_close(reference.forward(x, axis=axis), reference.forward(x, ones, zeros, axis=axis))
    assert_close(
        reference.forward(x, gamma, axis=axis), reference.forward(x, gamma, zeros, axis=axis)
    )
    assert_close(
        reference.forward(x, beta=beta, axis=axis), reference.forward(x, ones, beta, axis=axis)
    )


@over_dtypes
@over_shapes
def test_staged_forward_is_forward(rng, shape, axis, dtype):
    batch = Batch(rng, shape, axis, dtype)
    out, cache = reference.staged_forward(batch.x, batch.gamma, batch.beta, EPS, axis=axis)
    assert_close(out, reference.forward(batch.x, batch.gamma, batch.beta, EPS, axis=axis))
    assert cache["out"] is out


# Running statistics


@over_dtypes
@over_shapes
@pytest.mark.parametrize("unbiased", [True, False])
def test_running_update_in_both_meanings_of_momentum(rng, shape, axis, dtype, unbiased):
    x = Batch(rng, shape, axis, dtype).x
    mean, var = rng.normal(size=shape[axis]).astype(dtype), np.ones(shape[axis], dtype)
    n, batch_mean, batch_var = reference.moments(x, axis=axis)
    batch_var = batch_var * n / (n - unbiased)
    for weighs, momentum in [("new", 0.125), ("old", 0.875)]:
        updated = reference.running_update(
            mean, var, x, momentum, weighs=weighs, unbiased=unbiased, axis=axis
        )
        assert_close(updated[0], mean * dtype(7 / 8) + batch_mean / dtype(8))
        assert_close(updated[1], var * dtype(7 / 8) + batch_var / dtype(8))


@pytest.mark.parametrize("unbiased", [True, False])
def test_running_update_is_that_of_the_layer(rng, unbiased):
    layer = BatchNorm(3, momentum=0.3, unbiased=unbiased, dtype=np.float64)
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    for _ in range(3):
        x = rng.normal(size=(8, 3))
        layer(x)
        mean, var = reference.running_update(mean, var, x, 0.3, unbiased=unbiased)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)


def test_the_whole_weight_gives_one_side_to_the_last_digit(rng):
    mean, var, x = rng.normal(size=3), rng.uniform(1, 2, 3), rng.normal(size=(8, 3))
    batch = reference.moments(x)[1:]
    for weighs, expected in [("new", batch), ("old", (mean, var))]:
        updated = reference.running_update(mean, var, x, 1, weighs=weighs, unbiased=False)
        np.testing.assert_array_equal(updated, expected)


def test_the_unbiased_variance_is_right_on_average():
    """All batches of three values out of {0, 1, 5}, each as likely as any: exact in fractions."""
    population = [Fraction(value) for value in (0, 1, 5)]
    mean = sum(population) / 3
    variance = sum((value - mean) ** 2 for value in population) / 3
    batches = list(itertools.product(population, repeat=3))
    zero = np.array([Fraction(0)])

    def average(unbiased):
        found = (
            reference.running_update(zero, zero, np.array(batch)[:, None], 1, unbiased=unbiased)
            for batch in batches
        )
        return sum(var[0] for _, var in found) / len(batches)

    assert average(True) == variance
    assert average(False) == variance * 2 / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.5}, "momentum must be from 0 to 1, got 1.5"),
        ({"momentum": float("nan")}, "momentum must be from 0 to 1, got nan"),
        ({"weighs": "both"}, 'weighs must be "new" or "old", got \'both\''),
        ({"x": np.ones((1, 2))}, "an unbiased variance needs two values per feature, got 1"),
    ],
)
def test_running_update_names_what_does_not_fit(arguments, message):
    given = {"x": np.ones((4, 2)), **arguments}
    with pytest.raises(ValueError, match=message):
        reference.running_update(np.zeros(2), np.ones(2), **given)


# Backward


@over_backward_passes
@over_precise_dtypes
@over_shapes
def test_backward_against_differences(rng, shape, axis, dtype, backward):
    batch = Batch(rng, shape, axis, dtype)
    x, gamma, beta, dout = batch.x, batch.gamma, batch.beta, batch.dout
    dx, dgamma, dbeta = BACKWARD_PASSES[backward](dout, x, gamma, beta, axis)

    def forward(x, gamma, beta):
        return reference.forward(x, gamma, beta, EPS, axis=axis)

    assert_gradient(lambda x: forward(x, gamma, beta), x, dout, dx)
    assert_gradient(lambda gamma: forward(x, gamma, beta), gamma, dout, dgamma)
    assert_gradient(lambda beta: forward(x, gamma, beta), beta, dout, dbeta)


@pytest.mark.parametrize("backward", ["closed_form", "through_statistics"])
@over_dtypes
@over_shapes
def test_backward_passes_agree(rng, shape, axis, dtype, backward):
    batch = Batch(rng, shape, axis, dtype)
    arguments = batch.dout, batch.x, batch.gamma, batch.beta, axis
    gradients = BACKWARD_PASSES[backward](*arguments)
    for actual, desired in zip(gradients, BACKWARD_PASSES["staged"](*arguments), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, desired)


@over_precise_dtypes
@over_shapes
def test_frozen_backward_against_differences(rng, shape, axis, dtype):
    batch = Batch(rng, shape, axis, dtype)
    x, gamma, beta, dout = batch.x, batch.gamma, batch.beta, batch.dout
    mean = rng.normal(size=shape[axis]).astype(dtype)
    var = rng.uniform(0.5, 2, shape[axis]).astype(dtype)
    dx, dgamma, dbeta = reference.frozen_backward(dout, x, gamma, mean, var, EPS, axis=axis)

    def evaluate(x, gamma, beta):
        return reference.normalize(x, mean, var, gamma, beta, EPS, axis=axis)

    assert_gradient(lambda x: evaluate(x, gamma, beta), x, dout, dx)
    assert_gradient(lambda gamma: evaluate(x, gamma, beta), gamma, dout, dgamma)
    assert_gradient(lambda beta: evaluate(x, gamma, beta), beta, dout, dbeta)


@over_precise_dtypes
@over_shapes
@pytest.mark.parametrize("added", [False, True])
def test_relu_backward_against_differences(rng, shape, axis, dtype, added):
    batch = Batch(rng, shape, axis, dtype)
    x, gamma, beta, dout = batch.x, batch.gamma, batch.beta, batch.dout
    residual = None
    if added:  # such that no sum is near 0, where the ReLU has no derivative
        z = rng.choice([-1, 1], shape) * rng.uniform(0.5, 2, shape)
        residual = z.astype(dtype) - reference.forward(x, gamma, beta, EPS, axis=axis)
    elif np.abs(reference.forward(x, gamma, beta, EPS, axis=axis)).min() < 0.01:
        beta = beta + dtype(9)  # far to one side
    gradients = reference.relu_backward(dout, x, gamma, beta, residual, EPS, axis=axis)

    def forward(**changed):
        given = {"x": x, "gamma": gamma, "beta": beta, "residual": residual, **changed}
        return reference.relu_forward(**given, eps=EPS, axis=axis)

    for name, at, gradient in zip(
        ("x", "gamma", "beta", "residual"), (x, gamma, beta, residual), gradients, strict=True
    ):
        if at is not None:
            assert_gradient(lambda value, name=name: forward(**{name: value}), at, dout, gradient)


STEPS = ["gammax", "xhat", "ivar", "sqrtvar", "var", "sq", "xmu", "mu", "x"]


@pytest.mark.parametrize("name", STEPS)
@over_shapes
def test_gradient_of_every_step_against_differences(rng, shape, axis, name):
    batch = Batch(rng, shape, axis)
    _, cache = reference.staged_forward(batch.x, batch.gamma, batch.beta, EPS, axis=axis)
    reference.staged_backward(batch.dout, cache)
    assert_gradient(
        lambda value: batch.replay(**{name: value}), cache[name], batch.dout, cache["d" + name]
    )


@over_shapes
def test_each_use_of_what_is_used_twice_against_differences(rng, shape, axis):
    batch = Batch(rng, shape, axis)
    _, cache = reference.staged_forward(batch.x, batch.gamma, batch.beta, EPS, axis=axis)
    reference.staged_backward(batch.dout, cache)
    x, xmu, mu, ivar = (cache[name] for name in ("x", "xmu", "mu", "ivar"))
    uses = {
        "dxmu1": (xmu, lambda xmu: batch.replay(xmu=xmu, ivar=ivar)),
        "dxmu2": (xmu, lambda xmu: batch.replay(sq=xmu**2)),
        "dx1": (x, lambda x: batch.replay(x=x, mu=mu)),
        "dx2": (x, lambda x: batch.replay(mu=batch.mean(x))),
    }
    for gradient, (at, function) in uses.items():
        assert_gradient(function, at, batch.dout, cache[gradient])


def test_staged_backward_leaves_every_gradient_in_the_cache(rng):
    batch = Batch(rng, (8, 3), 1)
    _, cache = reference.staged_forward(batch.x, batch.gamma, batch.beta, EPS)
    returned = reference.staged_backward(batch.dout, cache)
    for name in [*STEPS, "gamma", "beta", "out"]:
        assert cache["d" + name].shape == cache[name].shape
    for gradient, name in zip(returned, ["dx", "dgamma", "dbeta"], strict=True):
        assert cache[name] is gradient


# Misprints of well-known write-ups, each written out here with the place of the slip left open: the
# right term there passes the check, and the misprint alone makes it fail.


def through_statistics_from(start, batch):
    """The three ways to x, the gradients of mean and var summed from `start`."""
    x, n = batch.x, len(batch.x)
    invstd = 1 / np.sqrt(x.var(axis=0) + EPS)
    xmu = x - x.mean(axis=0)
    dvar = -(invstd**3) / 2 * np.sum(start * xmu, axis=0)
    dmean = -invstd * np.sum(start, axis=0)
    return batch.gamma * batch.dout * invstd + dvar * 2 * xmu / n + dmean / n


def closed_form_with(last_sum, batch):
    """The one line, with `last_sum` where sum_k dl/dy_k xhat_k belongs."""
    x, dout, n = batch.x, batch.dout, len(batch.x)
    invstd = 1 / np.sqrt(x.var(axis=0) + EPS)
    xhat = (x - x.mean(axis=0)) * invstd
    return batch.gamma * invstd * (dout - dout.sum(axis=0) / n - xhat * last_sum(dout, xhat) / n)


def largest_error(dx, batch):
    def forward(x):
        return reference.forward(x, batch.gamma, eps=EPS)

    return reference.check_gradient(forward, batch.x, batch.dout, dx).max()


def test_statistics_receive_their_gradient_from_dxhat_and_from_nothing_else(rng):
    batch = Batch(rng, (8, 3), 1)
    dx, _, _ = reference.backward_through_statistics(batch.dout, batch.x, batch.gamma, EPS)
    assert largest_error(dx, batch) < 1e-9
    assert largest_error(through_statistics_from(batch.gamma * batch.dout, batch), batch) < 1e-9
    assert largest_error(through_statistics_from(dx, batch), batch) > 1e-3
    assert largest_error(through_statistics_from(batch.dout, batch), batch) > 1e-3


def test_closed_form_keeps_dout_inside_the_last_sum(rng):
    batch = Batch(rng, (8, 3), 1)
    right = closed_form_with(lambda dout, xhat: np.sum(dout * xhat, axis=0), batch)
    misprint = closed_form_with(lambda dout, xhat: np.sum(xhat, axis=0), batch)
    assert largest_error(right, batch) < 1e-9
    assert largest_error(misprint, batch) > 1e-3


def test_an_upstream_gradient_of_ones_would_let_a_misprint_pass(rng):
    batch = Batch(rng, (8, 3), 1)
    batch.dout = np.ones_like(batch.dout)
    misprint = closed_form_with(lambda dout, xhat: np.sum(xhat, axis=0), batch)
    assert largest_error(misprint, batch) < 1e-9


# Jacobian


@pytest.fixture
def feature(rng):
    """The values of one feature, a scale and an upstream gradient."""
    batch = Batch(rng, (8, 1), 1)
    return batch.x[:, 0], batch.gamma[0], batch.dout[:, 0]


@over_dtypes
def test_jacobian_gives_dx(feature, dtype):
    x, gamma, dout = (values.astype(dtype) for values in feature)
    dx, _, _ = reference.backward_closed_form(dout[:, None], x[:, None], gamma, EPS)
    assert_close(reference.jacobian(x, gamma, EPS).T @ dout, dx[:, 0])


@over_precise_dtypes
def test_every_row_of_the_jacobian_against_differences(feature, dtype):
    x, gamma = (values.astype(dtype) for values in feature[:2])

    def forward(x):
        return reference.forward(x[:, None], gamma, eps=EPS)[:, 0]

    one_hot = np.eye(len(x), dtype=dtype)
    for dout, row in zip(one_hot, reference.jacobian(x, gamma, EPS), strict=True):
        assert_gradient(forward, x, dout, row)


def test_jacobian_is_symmetric_and_loses_two_directions(feature):
    x, gamma, _ = feature
    J = reference.jacobian(x, gamma, eps=0)
    assert_close(J, J.T)
    assert_close(J @ np.ones_like(x), np.zeros_like(x))
    assert_close(J @ (x - x.mean()), np.zeros_like(x))
    # What is left is gamma*invstd times a projection onto n - 2 dimensions.
    scale = gamma / x.std()
    assert_close(J @ J, scale * J)
    assert np.trace(J) == pytest.approx(scale * (len(x) - 2), rel=1e-13)


def test_eps_keeps_some_of_the_stretch(feature):
    x, gamma, _ = feature
    xmu, var = x - x.mean(), x.var()
    J = reference.jacobian(x, gamma, EPS)
    assert_close(J @ np.ones_like(x), np.zeros_like(x))
    assert_close(J @ xmu, gamma / np.sqrt(var + EPS) * xmu * EPS / (var + EPS))


# Weights


@pytest.mark.parametrize("eps", [0, EPS])
@over_dtypes
def test_reparameterized_weight_normalizes_what_follows(rng, dtype, eps):
    x = spread(rng, (50, 3), 1).astype(dtype)
    x -= x.mean(axis=0)
    W, gamma = rng.normal(size=(3, 4)).astype(dtype), rng.normal(size=4).astype(dtype)
    W_hat = reference.reparameterized_weight(W, x.T @ x / len(x), gamma, eps)
    assert_close(x @ W_hat, reference.forward(x @ W, gamma, eps=eps))


@pytest.mark.parametrize("eps", [0, EPS])
@over_precise_dtypes
def test_reparameterized_backward_against_differences(rng, dtype, eps):
    x = spread(rng, (50, 3), 1).astype(dtype)
    x -= x.mean(axis=0)
    S, dout = x.T @ x / dtype(50), rng.normal(size=(50, 4)).astype(dtype)
    W, gamma = rng.normal(size=(3, 4)).astype(dtype), rng.normal(size=4).astype(dtype)
    dW_hat = x.T @ dout
    dW, dgamma = reference.reparameterized_backward(dW_hat, W, S, gamma, eps)

    def weight(W, gamma):
        return reference.reparameterized_weight(W, S, gamma, eps)

    scale = max(1, np.abs(dW_hat).max())
    assert_gradient(lambda W: weight(W, gamma), W, dW_hat / scale, dW / scale)
    assert_gradient(lambda gamma: weight(W, gamma), gamma, dW_hat / scale, dgamma / scale)
    dx, dgamma_of_batch, _ = reference.backward_closed_form(dout, x @ W, gamma, eps)
    assert_close(dW, x.T @ dx)
    assert_close(dgamma, dgamma_of_batch)


@over_dtypes
def test_weight_norm_is_the_sibling_with_white_inputs(rng, dtype):
    W, g = rng.normal(size=(4, 3)).astype(dtype), rng.uniform(0.5, 2, 3).astype(dtype)
    normed = reference.weight_norm(W, g)
    assert_close(normed, reference.reparameterized_weight(W, np.eye(4, dtype=dtype), g))
    assert_close(np.linalg.norm(normed, axis=0), g)
    assert_close(reference.weight_norm(7 * W, g), normed)


# The check itself


@over_precise_dtypes
def test_differences_are_of_fourth_order(dtype):
    # Every value but the quotient by 12 is an integer, and exact. The error term -(h^4/30) f'''''
    # is 0 for x^4 and -4 for x^5.
    x = np.arange(-3, 4, dtype=dtype)
    ones = np.ones_like(x)
    error = reference.check_gradient(lambda x: x**4, x, ones, 4 * x**3, step=1)
    np.testing.assert_array_equal(error, 0)
    error = reference.check_gradient(lambda x: x**5, x, ones, 5 * x**4, step=1)
    np.testing.assert_array_equal(error, 4)


def test_a_wrong_entry_is_found_where_it_is(rng):
    batch = Batch(rng, (4, 3, 2), 1)
    dx, _, _ = reference.backward_closed_form(batch.dout, batch.x, batch.gamma, EPS)
    dx[2, 1, 0] += 1e-6
    error = reference.check_gradient(
        lambda x: reference.forward(x, batch.gamma, eps=EPS), batch.x, batch.dout, dx
    )
    assert error[2, 1, 0] == pytest.approx(1e-6, rel=1e-3)
    assert np.count_nonzero(error > 1e-9) == 1


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_step_follows_the_spread_of_x(rng, scale):
    batch = Batch(rng, (8, 3), 1)
    x = batch.x * scale
    dx, _, _ = reference.backward_closed_form(batch.dout, x, batch.gamma, eps=0)
    error = reference.check_gradient(
        lambda x: reference.forward(x, batch.gamma, eps=0), x, batch.dout, dx
    )
    assert (error * scale < 1e-9).all(), error


def test_the_step_does_not_vanish_where_x_hardly_varies(rng):
    x, dout = 1 + 1e-9 * rng.normal(size=5), rng.normal(size=5)
    assert_gradient(np.exp, x, dout, np.exp(x) * dout)


def test_check_gradient_leaves_x_alone(rng):
    x = rng.normal(size=(4, 2))
    before = x.copy()
    reference.check_gradient(np.exp, x, np.ones_like(x), np.exp(x))
    np.testing.assert_array_equal(x, before)


def test_check_gradient_refuses_a_gradient_of_another_shape():
    x = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"\(4, 2\), but has \(2,\)"):
        reference.check_gradient(np.exp, x, x, np.ones(2))


# The edges


@over_backward_passes
def test_one_value_per_feature(rng, backward):
    x, dout = rng.normal(size=(1, 3)), rng.normal(size=(1, 3))
    gamma, beta = rng.normal(size=3), rng.normal(size=3)
    np.testing.assert_array_equal(reference.forward(x, gamma, beta), beta[None])
    dx, dgamma, dbeta = BACKWARD_PASSES[backward](dout, x, gamma, beta, 1)
    np.testing.assert_array_equal(dx, np.zeros((1, 3)))
    np.testing.assert_array_equal(dgamma, np.zeros(3))
    np.testing.assert_array_equal(dbeta, dout[0])


def test_one_value_has_a_jacobian_of_zero():
    np.testing.assert_array_equal(reference.jacobian(np.array([3.0]), 2.0), [[0.0]])


TAKE_A_BATCH = {
    "moments": reference.moments,
    "moments_one_pass": reference.moments_one_pass,
    "normalize": lambda x: reference.normalize(x, np.zeros(3), np.ones(3)),
    "forward": reference.forward,
    "relu_forward": lambda x: reference.relu_forward(x, np.ones(3), np.zeros(3)),
    "running_update": lambda x: reference.running_update(np.zeros(3), np.ones(3), x),
    "staged_forward": lambda x: reference.staged_forward(x, np.ones(3), np.zeros(3)),
    "closed form": lambda x: reference.backward_closed_form(x, x, np.ones(3)),
    "statistics": lambda x: reference.backward_through_statistics(x, x, np.ones(3)),
    "frozen": lambda x: reference.frozen_backward(x, x, np.ones(3), np.zeros(3), np.ones(3)),
    "relu_backward": lambda x: reference.relu_backward(x, x, np.ones(3), np.zeros(3)),
}


@pytest.mark.parametrize("name", TAKE_A_BATCH)
def test_what_is_no_batch_is_named(name):
    with pytest.raises(TypeError, match="x must be a NumPy array, got list"):
        TAKE_A_BATCH[name]([[1.0, 2.0, 3.0], [2.0, 3.0, 5.0]])
    with pytest.raises(ValueError, match=r"x must have two dimensions or more, got shape \(3,\)"):
        TAKE_A_BATCH[name](np.ones(3))


def test_other_lists_and_shapes_are_named():
    x, gamma = np.ones((4, 3)), np.ones(3)
    with pytest.raises(TypeError, match="dout must be a NumPy array, got list"):
        reference.backward_closed_form(x.tolist(), x, gamma)
    for row, kind in (([1.0, 1.0, 1.0], "list"), (None, "NoneType")):
        message = f"must be a NumPy array or a number, got {kind}"
        with pytest.raises(TypeError, match=f"gamma {message}"):
            reference.backward_closed_form(x, x, row)
        with pytest.raises(TypeError, match=f"gamma {message}"):
            reference.staged_forward(x, row, gamma)
        with pytest.raises(TypeError, match=f"var {message}"):
            reference.normalize(x, gamma, row)
        with pytest.raises(TypeError, match=f"running_mean {message}"):
            reference.running_update(row, gamma, x)
    with pytest.raises(TypeError, match="x must be a NumPy array, got list"):
        reference.jacobian([1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match=r"shape \(n,\), got shape \(4, 3\)"):
        reference.jacobian(x, 1.0)
    with pytest.raises(TypeError, match="x must be a NumPy array, got list"):
        reference.check_gradient(np.exp, [1.0, 2.0], np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match=r"dW_hat must have the shape \(3, 3\) of W, got \(3,\)"):
        reference.reparameterized_backward(gamma, np.eye(3), np.eye(3), gamma)


def test_check_gradient_refuses_a_dout_that_would_broadcast():
    x = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"dout must have the shape \(4, 2\) of y, got \(2,\)"):
        reference.check_gradient(np.exp, x, np.ones(2), x)


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_that_is_not_there_is_an_error(axis):
    with pytest.raises(IndexError):
        reference.forward(np.ones((4, 2)), axis=axis)


def test_the_examples_in_the_docstrings():
    failed, attempted = doctest.testmod(reference)
    assert failed == 0
    assert attempted >= len(reference.__all__)


@pytest.mark.parametrize("shape", [(1, 3), (8, 1), (3,), (8, 3, 1)])
def test_a_residual_of_another_shape_is_refused(rng, shape):
    given, residual = Batch(rng, (8, 3), 1), rng.standard_normal(shape)
    with pytest.raises(ValueError, match=r"residual must have the shape \(8, 3\) of x"):
        reference.relu_forward(given.x, given.gamma, given.beta, residual)
    with pytest.raises(ValueError, match=r"residual must have the shape \(8, 3\) of x"):
        reference.relu_backward(given.dout, given.x, given.gamma, given.beta, residual)


@pytest.mark.parametrize("name", ["x", "dout", "residual"])
def test_a_mask_is_refused(rng, name):
    """The sums would leave out what n counts."""
    given = {each: rng.standard_normal((8, 3)) for each in ("x", "dout", "residual")}
    given[name] = np.ma.masked_greater(given[name], 0)
    with pytest.raises(TypeError, match=f"{name} must have no mask, got MaskedArray"):
        reference.relu_backward(gamma=np.ones(3), beta=np.zeros(3), **given)


ROWS = np.arange(24.0).reshape(8, 3) ** 2

# The calls, and what is to be one value per feature in each.
TAKE_ROWS = {
    "normalize": (reference.normalize, "mean var gamma beta"),
    "forward": (reference.forward, "gamma beta"),
    "running_update": (reference.running_update, "running_mean running_var"),
    "staged_forward": (reference.staged_forward, "gamma beta"),
    "closed form": (partial(reference.backward_closed_form, ROWS), "gamma"),
    "statistics": (partial(reference.backward_through_statistics, ROWS), "gamma"),
    "frozen": (partial(reference.frozen_backward, ROWS), "gamma mean var"),
    "relu_backward": (partial(reference.relu_backward, ROWS), "gamma beta"),
}


@pytest.mark.parametrize(
    ("name", "row"), [(name, row) for name, (_, rows) in TAKE_ROWS.items() for row in rows.split()]
)
@pytest.mark.parametrize("shape", [(1,), (4,), (1, 3), (8, 3)])
def test_what_is_not_one_value_per_feature_is_refused(rng, name, row, shape):
    call, rows = TAKE_ROWS[name]
    fitting = {each: rng.uniform(1, 2, 3) for each in rows.split()}
    call(x=ROWS, **fitting)
    with pytest.raises(ValueError, match=rf"{row} must have shape \(3,\), one value per feature"):
        call(x=ROWS, **fitting | {row: rng.uniform(1, 2, shape)})


@pytest.mark.parametrize("name", [*BACKWARD_PASSES, "frozen", "relu"])
@pytest.mark.parametrize("shape", [(1, 3), (8, 1), (3,), (8, 3, 1)])
def test_a_dout_of_another_shape_is_refused(rng, name, shape):
    """It would broadcast."""
    x, ones = rng.standard_normal((8, 3)), np.ones(3)
    passes = {
        **BACKWARD_PASSES,
        "frozen": lambda dout, x, gamma, beta, axis: reference.frozen_backward(
            dout, x, gamma, beta, gamma, axis=axis
        ),
        "relu": lambda dout, x, gamma, beta, axis: reference.relu_backward(
            dout, x, gamma, beta, axis=axis
        ),
    }
    with pytest.raises(ValueError, match=r"dout must have the shape \(8, 3\) of x"):
        passes[name](rng.standard_normal(shape), x, ones, ones, 1)
