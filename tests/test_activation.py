"""ReLU and residual in the pass of the batch norm: the bits of doing them apart, and what is new.

The bits of the bare batch norm are held against higher precision elsewhere. A fused call must give
those of the bare call followed by the addition and the maximum, forward and backward.
"""

import numpy as np
import pytest
from exact import LAYOUTS, parameters

import bn_cy
from bn_cy import functional, reference
from bn_cy._digests import CASES

DTYPES = [np.float32, np.float64]
# Rows, runs and images that end within a byte, and blocks that begin there.
ODD = [((3000, 99), 1), ((40, 700), 1), ((61, 2503), 1), ((300, 300), 1), ((38, 7, 6, 33), 1)]
ODD += [((2000, 300), 1), ((2048, 500), 1), ((2048, 100, 3), 1)]  # merged for sums, not for writing
ODD += [((2000, 3, 3, 3), 1)]  # merged images, in two cells for writing
PATHS = [*CASES, *ODD, ((8, 64, 28, 28), 1)]
FOLLOWED = [(True, False), (False, True), (True, True)]  # relu, residual

pytestmark = pytest.mark.usefixtures("settings")
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)
over_paths = pytest.mark.parametrize(("shape", "axis"), PATHS)
PLACES = [0, 1 << 60]  # sizes from which results are written past the cache: all, and none
over_followed = pytest.mark.parametrize(("relu", "added"), FOLLOWED)


class Batch:
    """A random problem: batch, gradient, residual, parameters."""

    def __init__(self, rng, shape, axis, dtype):
        self.axis = axis
        self.x = (3 + rng.standard_normal(shape)).astype(dtype)
        self.dout, self.residual = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
        self.gamma, self.beta = parameters(rng, shape[axis], dtype)
        self.gamma[::3] *= -1

    @property
    def given(self):
        return self.x, self.gamma, self.beta


def assert_same_bits(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def apart(forward, b, relu, added):
    """Return y and the gradients of the bare batch norm with NumPy's addition and maximum."""
    y, cache = forward()
    z = y + b.residual if added else y
    dresidual = np.where(z > 0, b.dout, 0).astype(b.x.dtype) if relu else b.dout
    gradients = bn_cy.batchnorm_backward(dresidual, cache)
    return np.maximum(z, 0) if relu else z, *gradients, *([dresidual] if added else [])


def fused(forward, b, relu, added):
    y, cache = forward(relu=relu, residual=b.residual if added else None)
    return y, *bn_cy.batchnorm_backward(b.dout, cache)


@over_dtypes
@over_paths
@over_followed
def test_training_has_the_bits_of_separate_passes(rng, shape, axis, dtype, relu, added):
    b = Batch(rng, shape, axis, dtype)

    def forward(**followed):
        return bn_cy.batchnorm_forward(*b.given, axis=axis, **followed)

    expected = apart(forward, b, relu, added)
    for size in PLACES:
        functional._stream_from(size)
        for threads in (1, 2, 3):
            bn_cy.set_num_threads(threads)
            assert_same_bits(fused(forward, b, relu, added), expected)


@over_dtypes
@over_paths
@over_followed
def test_frozen_statistics_have_the_bits_of_separate_passes(rng, shape, axis, dtype, relu, added):
    b = Batch(rng, shape, axis, dtype)
    _, mean, var = bn_cy.moments(b.x, axis=axis)

    def forward(**followed):
        return bn_cy.frozen_forward(b.x, mean, var, *b.given[1:], axis=axis, **followed)

    expected = apart(forward, b, relu, added)
    for size in PLACES:
        functional._stream_from(size)
        assert_same_bits(fused(forward, b, relu, added), expected)
    residual = b.residual if added else None
    y = bn_cy.normalize(
        b.x, mean, var, *b.given[1:], axis=axis, relu=relu, residual=residual, out=b.x
    )
    assert y is b.x
    assert_same_bits([y], expected[:1])


@over_dtypes
@over_paths
def test_the_pieces_through_a_relu(rng, shape, axis, dtype):
    b = Batch(rng, shape, axis, dtype)
    count, mean, var = bn_cy.moments(b.x, axis=axis)
    y = bn_cy.normalize(b.x, mean, var, b.gamma, b.beta, axis=axis)
    opened = np.where(y > 0, b.dout, 0).astype(dtype)
    sums = bn_cy.gradient_sums(
        b.dout, b.x, mean, var, axis=axis, relu=True, gamma=b.gamma, beta=b.beta
    )
    assert_same_bits(sums, bn_cy.gradient_sums(opened, b.x, mean, var, axis=axis))
    given = b.x, mean, var, b.gamma, 1e-5, *sums, count
    dx = bn_cy.input_gradient(b.dout, *given, axis=axis, relu=True, beta=b.beta)
    assert_same_bits([dx], [bn_cy.input_gradient(opened, *given, axis=axis)])


@over_dtypes
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_absent_parameters(rng, dtype, scaled, shifted):
    b = Batch(rng, (90, 37), 1, dtype)
    gamma, beta = b.gamma if scaled else None, b.beta if shifted else None

    def forward(**followed):
        return bn_cy.batchnorm_forward(b.x, gamma, beta, **followed)

    for relu, added in FOLLOWED:
        got, expected = fused(forward, b, relu, added), apart(forward, b, relu, added)
        present = [i for i, array in enumerate(expected) if array is not None]
        assert [i for i, array in enumerate(got) if array is not None] == present
        assert_same_bits([got[i] for i in present], [expected[i] for i in present])


@over_followed
def test_features_that_are_summed_again(rng, relu, added):
    """Outliers and constants in the forward; in the backward sums that overflow in float32."""
    b = Batch(rng, (300, 40), 1, np.float32)
    b.x[0, ::4], b.x[:, 1::4] = 1e9, 7
    b.dout[:, ::2] = 1e38 * b.dout[:, ::2].clip(-3, 3)
    b.x[:, 2::8] = np.tile(np.float32([0.1, 0.7]), 150)[:, None]  # few values: noticed, in doubt

    def forward(**followed):
        return bn_cy.batchnorm_forward(*b.given, **followed)

    expected = apart(forward, b, relu, added)
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(b.dout.sum(axis=0)).all()
    for size in PLACES:
        functional._stream_from(size)
        assert_same_bits(fused(forward, b, relu, added), expected)


@over_followed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(rng, layout, relu, added):
    b = Batch(rng, (6, 20, 5, 7), 1, np.float32)
    b.x, b.dout = LAYOUTS[layout](b.x), LAYOUTS[layout](b.dout)

    def forward(**followed):
        return bn_cy.batchnorm_forward(*b.given, **followed)

    expected = apart(forward, b, relu, added)
    for same_order in (False, True):
        if same_order:
            b.residual = LAYOUTS[layout](b.residual)
        assert_same_bits(fused(forward, b, relu, added), expected)


@over_dtypes
@pytest.mark.parametrize("added", [False, True])
def test_against_finite_differences(rng, dtype, added):
    """With a random upstream gradient, away from 0, where the ReLU has no derivative."""
    shape, eps, clear = (7, 3, 2), 1e-3, 0.02
    while True:
        b = Batch(rng, shape, 1, np.float64)
        residual = b.residual if added else None
        z = bn_cy.batchnorm_forward(*b.given, eps, residual=residual)[0]
        if np.abs(z).min() > clear:
            break
    values = [array.astype(dtype) for array in (*b.given, b.residual)]

    def forward_of(k):
        def forward(value):
            precise = [array.astype(np.longdouble) for array in values]
            precise[k] = value
            x, gamma, beta, r = precise
            return reference.relu_forward(x, gamma, beta, r if added else None, eps)

        return forward

    _, cache = bn_cy.batchnorm_forward(
        *values[:3], eps, relu=True, residual=values[3] if added else None
    )
    dout = b.dout.astype(dtype)
    gradients = bn_cy.batchnorm_backward(dout, cache)
    assert len(gradients) == 3 + added
    bound = 1e-5 if dtype == np.float32 else 1e-13
    for k, gradient in enumerate(gradients):
        at, dout, gradient = (a.astype(np.longdouble) for a in (values[k], dout, gradient))
        error = reference.check_gradient(forward_of(k), at, dout, gradient, step=2.0**-12)
        assert error.max() <= bound, k


@over_dtypes
@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize(
    ("shape", "axis"), [((1000, 37), 1), ((9, 20, 14, 14), 1), ((20, 3000), 0)]
)
def test_the_accuracy_contract_with_a_relu(rng, shape, axis, dtype, offset):
    b = Batch(rng, shape, axis, dtype)
    b.x += dtype(offset)
    y, cache = bn_cy.batchnorm_forward(*b.given, axis=axis, relu=True, residual=b.residual)
    got = bn_cy.batchnorm_backward(b.dout, cache)
    precise = [a.astype(np.longdouble) for a in (b.x, b.gamma, b.beta, b.residual, b.dout)]
    *given, dout = precise
    z = reference.forward(*given[:3], axis=axis) + given[3]
    # Where z is 0 but for a rounding error, y may be on either side of it: its own sign counts.
    opened = np.where(y > 0, dout, 0)
    expected = *reference.backward_closed_form(opened, *given[:2], axis=axis), opened
    unit = 1 if dtype == np.float32 else 1e-7
    norm = np.linalg.norm
    assert norm((y - np.maximum(z, 0)).ravel()) <= 2e-7 * unit * norm(np.maximum(z, 0).ravel())
    assert norm((got[0] - expected[0]).ravel()) <= 2e-7 * unit * norm(expected[0].ravel())
    terms = norm(opened.ravel())  # what the sums are made of: they may cancel
    for one, other in zip(got[1:3], expected[1:3], strict=True):
        assert norm(one - other) <= 4e-7 * unit * terms
    assert_same_bits(got[3:], [opened.astype(dtype)])


def test_at_zero_the_gradient_is_zero():
    x = np.array([[-1.0], [0.0], [1.0]])
    y, cache = bn_cy.batchnorm_forward(x, relu=True)
    assert y[1] == 0
    gradients = bn_cy.batchnorm_backward(np.array([[0.0], [5.0], [0.0]]), cache)
    assert not gradients[0].any()
    y, cache = bn_cy.batchnorm_forward(x, relu=True, residual=np.zeros((3, 1)))
    assert bn_cy.batchnorm_backward(np.full((3, 1), 5.0), cache)[3].ravel().tolist() == [0, 0, 5]


@over_dtypes
@pytest.mark.parametrize("added", [False, True])
def test_nan_stays_nan(dtype, added):
    x = np.ones((9, 3), dtype)
    x[2, 1] = np.nan
    residual = np.zeros_like(x) if added else None
    y = bn_cy.batchnorm_forward(x, relu=True, residual=residual)[0]
    assert np.isnan(y[:, 1]).all()
    assert not y[:, [0, 2]].any()
    y = bn_cy.normalize(x, np.zeros(3), np.ones(3), relu=True, residual=residual)
    assert np.isnan(y).sum() == 1


@over_dtypes
def test_infinity_in_eval_has_the_gradient_of_a_constant_scale(dtype):
    x = np.array([[np.inf, -np.inf]], dtype)
    y, cache = bn_cy.frozen_forward(x, np.zeros(2), np.ones(2), eps=0, relu=True)
    assert y.tolist() == [[np.inf, 0]]
    assert bn_cy.batchnorm_backward(np.full((1, 2), 3, dtype), cache)[0].tolist() == [[3, 0]]


def test_the_cache_keeps_beta_but_neither_residual_nor_y(rng):
    b = Batch(rng, (50, 3), 1, np.float32)
    for added in (False, True):
        y, cache = bn_cy.batchnorm_forward(
            *b.given, relu=True, residual=b.residual if added else None
        )
        expected = bn_cy.batchnorm_backward(b.dout, cache)
        beta, residual = b.beta.copy(), b.residual.copy()
        b.beta[:], b.residual[:], y[:] = 9, 9, -1
        assert_same_bits(bn_cy.batchnorm_backward(b.dout, cache), expected)
        b.beta[:], b.residual[:] = beta, residual


@over_followed
def test_outputs_may_take_the_place_of_what_is_read(rng, relu, added):
    b = Batch(rng, (300, 99), 1, np.float32)
    residual = b.residual if added else None
    for size in PLACES:
        functional._stream_from(size)
        y, cache = bn_cy.batchnorm_forward(*b.given, relu=relu, residual=residual)
        expected = bn_cy.batchnorm_backward(b.dout, cache)
        if added:
            out = b.residual.copy()
            again, _ = bn_cy.batchnorm_forward(*b.given, relu=relu, residual=out, out=out)
            assert again is out
            assert_same_bits([out], [y])
        dout = b.dout.copy()
        dx, *_, last = bn_cy.batchnorm_backward(dout, cache, out=dout)
        assert dx is dout
        assert_same_bits([dx, last], [expected[0], expected[-1]])


def test_the_residuals_gradient_is_an_array_of_its_own(rng):
    b = Batch(rng, (50, 3), 1, np.float32)
    for relu in (False, True):
        _, cache = bn_cy.batchnorm_forward(*b.given, relu=relu, residual=b.residual)
        dx, *_, dresidual = bn_cy.batchnorm_backward(b.dout, cache)
        for array in (b.dout, dx, b.residual):
            assert not np.shares_memory(dresidual, array)


@pytest.mark.parametrize("mode", [True, False])
@over_followed
def test_the_layer(rng, mode, relu, added):
    b = Batch(rng, (60, 12), 1, np.float32)
    bare, layer = bn_cy.BatchNorm(12), bn_cy.BatchNorm(12, relu=relu)
    for one in (bare, layer):
        one.gamma, one.beta = b.gamma, b.beta
        one.train(mode)
    residual = b.residual if added else None
    z = bare(b.x) + (b.residual if added else 0)
    y = layer(b.x, residual=residual)
    assert_same_bits([y], [np.maximum(z, 0) if relu else z])
    opened = np.where(z > 0, b.dout, 0) if relu else b.dout
    dx, got = bare.backward(opened), layer.backward(b.dout)
    assert_same_bits(got if added else [got], [dx, opened] if added else [dx])
    assert_same_bits([layer.dgamma, layer.dbeta], [bare.dgamma, bare.dbeta])
    assert_same_bits([layer.running_mean, layer.running_var], [bare.running_mean, bare.running_var])


def test_an_empty_batch():
    x = np.empty((0, 3), np.float32)
    y, cache = bn_cy.batchnorm_forward(x, np.ones(3), relu=True, residual=x)
    dx, dgamma, dbeta, dresidual = bn_cy.batchnorm_backward(x, cache)
    assert y.shape == dx.shape == dresidual.shape == (0, 3)
    assert not dgamma.any()
    assert dbeta is None


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (np.zeros((9, 4), np.float32), r"residual must have the shape \(9, 3\) and dtype float32"),
        (np.zeros((9, 3), np.float64), r"residual must have the shape \(9, 3\) and dtype float32"),
        (np.zeros((9, 1), np.float32), r"residual must have the shape"),
    ],
)
def test_a_residual_that_does_not_fit_is_refused_and_changes_nothing(residual, message):
    x = np.ones((9, 3), np.float32)
    layer = bn_cy.BatchNorm(3, relu=True)
    out = np.full_like(x, 5)
    for call in (layer.forward, layer.eval().forward):
        with pytest.raises(ValueError, match=message):
            call(x, residual=residual, out=out)
    assert (out == 5).all()
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()
    with pytest.raises(TypeError, match=r"residual must be of float32 or float64, got int64"):
        layer(x, residual=np.ones((9, 3), np.int64))


def test_an_output_that_overlaps_a_part_of_the_residual_is_refused(rng):
    memory = rng.standard_normal((10, 3)).astype(np.float32)
    x = rng.standard_normal((9, 3)).astype(np.float32)
    before = memory.copy()
    with pytest.raises(ValueError, match="out may be residual itself, but may not overlap"):
        bn_cy.batchnorm_forward(x, residual=memory[1:], out=memory[:-1])
    assert_same_bits([memory], [before])
