"""The kernels against every derivation of `bn_cy.reference`, in 80-bit arithmetic."""

import numpy as np
import pytest

from bn_cy import batchnorm_backward, batchnorm_forward, moments, reference

CASES = [  # one for every way in which an array is walked
    ((33, 70), 1),
    ((50, 3), 1),
    ((7, 20, 3, 5), 1),
    ((2, 3, 37, 31), 1),
    ((9, 2, 27, 19), 1),
    ((6, 9, 8, 20), -1),
    ((60, 300), 0),
    ((40, 700), 1),  # rows that are not merged
    ((9, 50), 1),  # few values: moments in double
    ((200, 3, 3, 5), 1),  # rows of images that are merged
    ((2, 3, 9001), 1),  # runs that are cut
    ((2, 3, 8325), 1),  # and leave a row of five values
]
LARGEST_JACOBIAN = 1000  # values of a feature: it has as many rows and columns


def staged(dout, x, gamma, axis):
    _, cache = reference.staged_forward(x, gamma, np.zeros_like(gamma), axis=axis)
    return reference.staged_backward(dout, cache)


def closed_form(dout, x, gamma, axis):
    return reference.backward_closed_form(dout, x, gamma, axis=axis)


def through_statistics(dout, x, gamma, axis):
    return reference.backward_through_statistics(dout, x, gamma, axis=axis)


def by_jacobian(dout, x, gamma, axis):
    """dx = J^T dout, feature by feature; the sums from the closed form."""
    dx = np.empty_like(x)
    features = (np.moveaxis(array, axis, 0) for array in (dx, dout, x))
    for to, upstream, values, scale in zip(*features, gamma, strict=True):
        jacobian = reference.jacobian(values.ravel(), scale)
        to[...] = (jacobian.T @ upstream.ravel()).reshape(to.shape)
    return dx, *closed_form(dout, x, gamma, axis)[1:]


def error(got, expected, scale):
    return float(np.linalg.norm((got - expected).ravel()) / np.linalg.norm(scale.ravel()))


DERIVED = [
    (shape, axis, derivation)
    for shape, axis in CASES
    for derivation in (staged, closed_form, through_statistics, by_jacobian)
    if derivation is not by_jacobian or np.prod(shape) // shape[axis] <= LARGEST_JACOBIAN
]


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 5e-7), (np.float64, 1e-14)])
@pytest.mark.parametrize(("shape", "axis", "derivation"), DERIVED)
def test_backward_is_every_derivation(rng, shape, axis, dtype, bound, derivation):
    x, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    gamma = rng.uniform(0.5, 1.5, shape[axis]).astype(dtype)
    _, cache = batchnorm_forward(x, gamma, np.zeros_like(gamma), axis=axis)
    got = batchnorm_backward(dout, cache)
    expected = derivation(*(a.astype(np.longdouble) for a in (dout, x, gamma)), axis)
    # Sums may cancel: they are held against the root of their squared terms.
    terms = np.full(shape[axis], np.sqrt(x.size // shape[axis]))
    for one, other, scale in zip(got, expected, (dout, terms, terms), strict=True):
        assert error(one, other, scale) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 5e-7), (np.float64, 1e-14)])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_forward_is_the_formula(rng, shape, axis, dtype, bound):
    x = rng.standard_normal(shape).astype(dtype)
    gamma, beta = rng.uniform(0.5, 1.5, (2, shape[axis])).astype(dtype)
    y, _ = batchnorm_forward(x, gamma, beta, axis=axis)
    precise = [a.astype(np.longdouble) for a in (x, gamma, beta)]
    expected = reference.forward(*precise, axis=axis)
    assert error(y, expected, expected) <= bound
    count, mean, var = moments(x, axis=axis)
    exact = reference.moments(precise[0], axis=axis)
    assert count == exact[0]
    assert error(mean, exact[1], np.sqrt(exact[2])) <= bound
    assert error(var, exact[2], exact[2]) <= bound
