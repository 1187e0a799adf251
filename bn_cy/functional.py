"""Batch normalization as functions: each checks its arguments, allocates, and calls the kernels.

The formulas, over the ``n`` values of a feature::

    mean = sum(x)/n          var = sum((x - mean)^2)/n          invstd = 1/sqrt(var + eps)
    xhat = (x - mean)*invstd          y = gamma*xhat + beta
    dbeta = sum(dout)        dgamma = sum(dout*xhat)
    dx = gamma*invstd*(dout - dbeta/n - xhat*dgamma/n)

`bn_cy.reference` derives them. Everywhere, ``x`` is an array of float32 or float64 in two dimensions or
more with the features along ``axis``. A C-contiguous array, or one that is after a permutation of its
axes, is used as it is; any other is copied once.
"""

import math
import operator
from typing import NamedTuple

import numpy as np

from bn_cy._dispatch import kernels
from bn_cy._layout import layout_of, native_floats
from bn_cy._threads import get_num_threads

__all__ = [
    "Moments",
    "batchnorm_backward",
    "batchnorm_forward",
    "gradient_sums",
    "input_gradient",
    "moments",
    "normalize",
]

# The kernels keep these rows of float64 values, one value a feature, in one flat array.
MEAN, REST, VAR, INVSTD, GAMMA = range(5)
ROWS = 5

SERIAL = 10_000  # elements below which a second thread costs more than it brings
STREAMED = 4 << 20  # bytes from which an output is written past the cache


class Moments(NamedTuple):
    """What `moments` returns: the count, the mean and the biased variance of every feature."""

    count: int
    mean: np.ndarray
    var: np.ndarray


class Cache:
    """What a forward leaves for its backward: x by reference, and O(features) numbers.

    `count` is the number of values that each statistic was made of: infinite for frozen ones, which do
    not depend on x.
    """

    __slots__ = ("count", "layout", "scaled", "shifted", "statistics", "x")

    def __init__(self, x, layout, statistics, count, scaled, shifted):
        self.x = x
        self.layout = layout
        self.statistics = statistics
        self.count = count
        self.scaled = scaled
        self.shifted = shifted


def batchnorm_forward(x, gamma=None, beta=None, eps=1e-5, *, axis=1, out=None):
    """Normalize every feature by its mean and variance in the batch.

    Parameters
    ----------
    x : array of float32 or float64, two dimensions or more
        The batch. The cache refers to it: it must not change before the backward.
    gamma, beta : array of shape (features,), optional
        Scale and shift; None: absent.
    eps : float, optional
        Added to the variance.
    axis : int, optional
        The feature axis of `x`.
    out : array of x's shape and dtype, optional
        Where to write `y`. It may not share memory with `x`.

    Returns
    -------
    y : array of x's shape and dtype
        ``gamma*(x - mean)/sqrt(var + eps) + beta``; `out`, if given.
    cache : Cache
        For `batchnorm_backward`. It keeps a copy of `gamma`.

    Raises
    ------
    TypeError
        If an array is not of a floating type that is accepted.
    ValueError
        If a shape, `axis`, `eps` or `out` does not fit, or if there is one value per feature, which has
        no variance. An empty batch is allowed: its `y` is empty.

    Notes
    -----
    S. Ioffe and C. Szegedy, *Batch Normalization*, 2015, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, cache = bn_cy.batchnorm_forward(x, eps=0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    x, layout = as_batch(x, axis, out)
    if layout.count == 1:
        raise ValueError(
            f"x must have two values per feature or more to have a variance, got one: "
            f"shape {layout.shape}, axis {axis}"
        )
    statistics = np.empty(ROWS * layout.features)
    y = run_forward(x, layout, statistics, gamma, beta, eps, out, measure=True)
    return y, Cache(x, layout, statistics, layout.count, gamma is not None, beta is not None)


def frozen_forward(x, mean, var, gamma, beta, eps, axis, out):
    """Normalize by given statistics; return (y, cache) as `batchnorm_forward` does."""
    x, layout = as_batch(x, axis, out)
    statistics = given_statistics(mean, var, layout)
    y = run_forward(x, layout, statistics, gamma, beta, eps, out, measure=False)
    return y, Cache(x, layout, statistics, math.inf, gamma is not None, beta is not None)


def batchnorm_backward(dout, cache, *, out=None):
    """Gradients of `batchnorm_forward`.

    Parameters
    ----------
    dout : array of x's shape and dtype
        The gradient with respect to `y`.
    cache : Cache
        What the forward returned.
    out : array of x's shape and dtype, optional
        Where to write `dx`. It may be `dout` itself; it may not share memory with `x`.

    Returns
    -------
    dx : array of x's shape and dtype
        ``gamma*invstd*(dout - dbeta/n - xhat*dgamma/n)``; `out`, if given.
    dgamma, dbeta : array of shape (features,) and x's dtype, or None
        ``sum(dout*xhat)`` and ``sum(dout)``; None if the forward had no `gamma` or no `beta`.

    Raises
    ------
    TypeError, ValueError
        If `dout` or `out` is not an array of x's shape and dtype, or `cache` is not a cache.

    Notes
    -----
    The closed form; `bn_cy.reference.backward_closed_form` derives it.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, cache = bn_cy.batchnorm_forward(x, beta=np.zeros(1))
    >>> dx, dgamma, dbeta = bn_cy.batchnorm_backward(np.ones((3, 1)), cache)
    >>> dgamma is None, dbeta
    (True, array([3.]))
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be what batchnorm_forward returned, got {type(cache).__name__}")
    layout = cache.layout
    dgamma = np.zeros(layout.features, layout.dtype) if cache.scaled else None
    dbeta = np.zeros(layout.features, layout.dtype) if cache.shifted else None
    sums = np.empty(2 * layout.features)
    dx = run_backward(
        dout, cache.x, layout, cache.statistics, sums, dgamma, dbeta, cache.count, out, measure=True
    )
    return dx, dgamma, dbeta


def moments(x, *, axis=1):
    """Count, mean and biased variance of every feature.

    Parameters
    ----------
    x : array of float32 or float64, two dimensions or more
        The batch.
    axis : int, optional
        The feature axis of `x`.

    Returns
    -------
    Moments
        ``count``, the values per feature; ``mean`` and ``var``, float64 arrays of shape (features,).
        Of an empty batch: zeros.

    Raises
    ------
    TypeError, ValueError
        As `batchnorm_forward`; one value per feature is allowed, its variance is 0.

    Notes
    -----
    The moments of parts merge to those of the whole: with ``n = na + nb`` and ``d = mb - ma``,
    ``mean = ma + d*nb/n`` and ``n*var = na*va + nb*vb + d*d*na*nb/n`` (Chan, Golub and LeVeque, 1979).

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> bn_cy.moments(np.array([[1.0, 5.0], [3.0, 5.0]]))
    Moments(count=2, mean=array([2., 5.]), var=array([1., 0.]))
    """
    x, layout = as_batch(x, axis)
    statistics = np.zeros((ROWS, layout.features))
    if layout.size:
        kernels.forward(
            None, statistics, x, None, None, *layout.grid, 1.0, True, False, threads_for(layout)
        )
    return Moments(layout.count, statistics[MEAN].copy(), statistics[VAR].copy())


def normalize(x, mean, var, gamma=None, beta=None, eps=1e-5, *, axis=1, out=None):
    """Normalize every feature by a given mean and variance, as in eval mode.

    Parameters
    ----------
    x : array of float32 or float64, two dimensions or more
        The batch.
    mean, var : array of shape (features,)
        The statistics; used in float64.
    gamma, beta, eps, axis, out
        As in `batchnorm_forward`.

    Returns
    -------
    y : array of x's shape and dtype
        ``gamma*(x - mean)/sqrt(var + eps) + beta``; `out`, if given.

    Raises
    ------
    TypeError, ValueError
        As `batchnorm_forward`; one value per feature is allowed.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> bn_cy.normalize(np.array([[1.0], [5.0]]), mean=[3.0], var=[4.0], eps=0)
    array([[-1.],
           [ 1.]])
    """
    return frozen_forward(x, mean, var, gamma, beta, eps, axis, out)[0]


def gradient_sums(dout, x, mean, var, eps=1e-5, *, axis=1):
    """The two sums over the batch that the backward needs: the first half of `batchnorm_backward`.

    Parameters
    ----------
    dout, x : array of float32 or float64, two dimensions or more
        The gradient with respect to `y`, and the batch; of one shape and dtype.
    mean, var : array of shape (features,)
        The statistics that normalized `x`.
    eps, axis
        As in `batchnorm_forward`.

    Returns
    -------
    sum_dout, sum_dout_xhat : float64 array of shape (features,)
        ``sum(dout)`` and ``sum(dout*xhat)``: dbeta and dgamma, where this batch is all there is.

    Raises
    ------
    TypeError, ValueError
        If a shape, a dtype, `axis` or `eps` does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> x = np.array([[1.0], [3.0]])
    >>> bn_cy.gradient_sums(np.array([[1.0], [2.0]]), x, mean=[2.0], var=[1.0], eps=0)
    (array([3.]), array([1.]))
    """
    x, layout = as_batch(x, axis)
    statistics = described_statistics(mean, var, None, eps, layout)
    sums = np.zeros((2, layout.features))
    dout = layout.compact(as_gradient(dout, layout))
    if layout.size:
        kernels.backward(
            None, None, None, sums, statistics, dout, x, *layout.grid, 1.0, True, False, threads_for(layout)
        )
    return sums[0], sums[1]


def input_gradient(
    dout, x, mean, var, gamma, eps, sum_dout, sum_dout_xhat, count, *, axis=1, out=None
):
    """Gradient with respect to x, given the sums over the batch: the second half of `batchnorm_backward`.

    Where the batch is spread over processes, `sum_dout`, `sum_dout_xhat` and `count` are those of all of
    them together.

    Parameters
    ----------
    dout, x, mean, var, eps, axis
        As in `gradient_sums`.
    gamma : array of shape (features,) or None
        The scale.
    sum_dout, sum_dout_xhat : array of shape (features,)
        What `gradient_sums` returned, added up over all parts of the batch.
    count : int or float
        Values per feature in the whole batch; infinite for frozen statistics.
    out : array of x's shape and dtype, optional
        Where to write `dx`. It may be `dout` itself; it may not share memory with `x`.

    Returns
    -------
    dx : array of x's shape and dtype
        ``gamma*invstd*(dout - sum_dout/count - xhat*sum_dout_xhat/count)``; `out`, if given.

    Raises
    ------
    TypeError, ValueError
        If a shape, a dtype, `axis`, `eps`, `count` or `out` does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> x, dout = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> count, mean, var = bn_cy.moments(x)
    >>> sums = bn_cy.gradient_sums(dout, x, mean, var)
    >>> dx = bn_cy.input_gradient(dout, x, mean, var, None, 1e-5, *sums, count)
    >>> _, cache = bn_cy.batchnorm_forward(x)
    >>> bool(np.array_equal(dx, bn_cy.batchnorm_backward(dout, cache)[0]))
    True
    """
    x, layout = as_batch(x, axis)
    statistics = described_statistics(mean, var, gamma, eps, layout)
    sums = np.stack([as_row("sum_dout", sum_dout, layout), as_row("sum_dout_xhat", sum_dout_xhat, layout)])
    if not count > 0 and layout.size:
        raise ValueError(f"count must be positive, got {count!r}")
    return run_backward(dout, x, layout, statistics, sums, None, None, count, out, measure=False)


# Running the kernels


def run_forward(x, layout, statistics, gamma, beta, eps, out, *, measure):
    """Check what is left, allocate y, and fill statistics and y."""
    if gamma is not None:
        gamma = as_parameter("gamma", gamma, layout)
    if beta is not None:
        beta = as_parameter("beta", beta, layout)
    check_eps(eps)
    y = layout.empty() if out is None else target(out, layout)
    if layout.size:
        streaming = layout.nbytes >= STREAMED
        kernels.forward(
            y, statistics, x, gamma, beta, *layout.grid, eps, measure, streaming, threads_for(layout)
        )
    return y if out is None else delivered(y, out)


def run_backward(dout, x, layout, statistics, sums, dgamma, dbeta, count, out, *, measure):
    """Check dout and out, allocate dx, and fill sums, dgamma, dbeta and dx."""
    dout = as_gradient(dout, layout)
    if out is None:
        dx = layout.empty()
    else:
        dx = target(out, layout)
        check_overlap(out, x, dout)
    dout = layout.compact(dout)
    if layout.size:
        streaming = layout.nbytes >= STREAMED
        threads = threads_for(layout)
        kernels.backward(
            dx, dgamma, dbeta, sums, statistics, dout, x, *layout.grid, count, measure, streaming, threads
        )
    return dx if out is None else delivered(dx, out)


def threads_for(layout):
    """Return how many threads to ask the kernels for."""
    return 1 if layout.size < SERIAL else get_num_threads()


def target(out, layout):
    """Return `out`, or an array to be copied into it where the kernels cannot write it."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    if out.shape != layout.shape or out.dtype != layout.dtype:
        raise ValueError(
            f"out must have the shape {layout.shape} and dtype {layout.dtype} of x, "
            f"got {out.shape} and {out.dtype}"
        )
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    return out if layout.has(out) else layout.empty()


def check_overlap(out, x, dout):
    """Refuse a dx that would overwrite x, or a part of dout that is still to be read."""
    if np.shares_memory(out, x):
        raise ValueError("out may not share memory with x")
    itself = out is dout or out.__array_interface__ == dout.__array_interface__
    if not itself and np.shares_memory(out, dout):
        raise ValueError("out may be dout itself, but may not overlap it otherwise")


def delivered(result, out):
    """Return `out`, filled with the result."""
    if result is not out:
        out[...] = result
    return out


# Checking arguments


def as_batch(x, axis, out=None):
    """Return x as an array that the kernels take, and its layout."""
    x = np.asarray(x)
    layout = layout_of(x.shape, x.strides, x.dtype, axis)
    if out is not None and np.shares_memory(out, x):
        raise ValueError("out may not share memory with x, which the backward needs")
    return layout.compact(x), layout


def as_gradient(dout, layout):
    """Return dout as an array of x's shape and dtype."""
    dout = np.asarray(dout)
    if dout.shape != layout.shape or native_floats("dout", dout.dtype) is not layout.dtype:
        raise ValueError(
            f"dout must have the shape {layout.shape} and dtype {layout.dtype} of x, "
            f"got {dout.shape} and {dout.dtype}"
        )
    return dout


def as_parameter(name, values, layout):
    """Return a parameter as a contiguous array of x's dtype."""
    if type(values) is not np.ndarray or values.dtype is not layout.dtype or not values.flags.c_contiguous:
        values = np.ascontiguousarray(as_real(name, values), layout.dtype)
    check_row(name, values, layout)
    return values


def as_real(name, values):
    """Return an array of real numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be of real numbers, got {array.dtype}")
    return array


def as_row(name, values, layout):
    """Return one float64 value per feature."""
    array = np.asarray(as_real(name, values), np.float64)
    check_row(name, array, layout)
    return array


def check_row(name, array, layout):
    """Refuse what is not one value per feature."""
    if array.shape != (layout.features,):
        raise ValueError(
            f"{name} must have shape ({layout.features},), one value per feature, got {array.shape}"
        )


def as_index(name, value):
    """Return an integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def as_float_dtype(name, dtype):
    """Return float32 or float64 as a dtype."""
    return native_floats(name, np.dtype(dtype))


def check_eps(eps):
    """Refuse what cannot be added to a variance."""
    try:
        valid = 0 <= eps < math.inf
    except TypeError:
        raise TypeError(f"eps must be a number, got {eps!r}") from None
    if not valid:
        raise ValueError(f"eps must be finite and not negative, got {eps!r}")


def given_statistics(mean, var, layout):
    """Return the kernels' array of statistics for a mean and a variance from outside."""
    statistics = np.zeros((ROWS, layout.features))
    statistics[MEAN] = as_row("mean", mean, layout)
    statistics[VAR] = as_row("var", var, layout)
    return statistics


def described_statistics(mean, var, gamma, eps, layout):
    """The same with the rows that a forward would have filled."""
    check_eps(eps)
    statistics = given_statistics(mean, var, layout)
    with np.errstate(divide="ignore", invalid="ignore"):  # as in the kernels: inf and NaN say enough
        statistics[INVSTD] = 1 / np.sqrt(statistics[VAR] + eps)
    statistics[GAMMA] = 1 if gamma is None else as_parameter("gamma", gamma, layout)
    return statistics
