"""Batch normalization as functions: each checks its arguments, allocates, and calls the kernels.

The formulas, over the ``n`` values of a feature::

    mean = sum(x)/n          var = sum((x - mean)^2)/n          invstd = 1/sqrt(var + eps)
    xhat = (x - mean)*invstd          y = gamma*xhat + beta
    dbeta = sum(dout)        dgamma = sum(dout*xhat)
    dx = gamma*invstd*(dout - dbeta/n - xhat*dgamma/n)

A residual is added to y, and a ReLU follows, in the same pass over memory::

    y = max(gamma*xhat + beta + residual, 0)        dresidual = dout where y > 0, else 0

and dresidual takes the place of dout in the other formulas.

`bn_cy.reference` derives them. Everywhere, ``x`` is an array of float32 or float64 in two
dimensions or more with the features along ``axis``. A C-contiguous array, or one that is after a
permutation of its axes, is used as it is; any other is copied once. An array or a tensor of another
library in the processor's memory is taken as it is, as x, as dout and as ``out``.
"""

from bn_cy._arguments import as_plain, refuse_overlapping_elements
from bn_cy._buffers import clear_buffers
from bn_cy._calls import Cache
from bn_cy._checks import check_apart_from_parameters
from bn_cy._masks import Kept
from bn_cy._moments import Moments
from bn_cy._resources import _stream_from  # no-cython-lint: for tests and measurements

from bn_cy._buffers cimport Block
from bn_cy._calls cimport Cache as Call
from bn_cy._calls cimport (
    checked_count, describe, frozen_cache, gradient_rows, gradients, launch_forward,
    measured_cache, rows_of, run_backward, run_forward,
)
from bn_cy._layout cimport batch_of
from bn_cy.kernels cimport MEAN, VAR

__all__ = [
    "Cache",
    "Moments",
    "batchnorm_backward",
    "batchnorm_forward",
    "clear_buffers",
    "frozen_forward",
    "gradient_sums",
    "input_gradient",
    "moments",
    "normalize",
]


def batchnorm_forward(
    x, gamma=None, beta=None, eps=1e-5, *, axis=1, out=None, relu=False, residual=None,
    mask=None, lengths=None
):
    """Normalize every feature by its mean and variance in the batch.

    Parameters
    ----------
    x : array of float32 or float64, two dimensions or more
        The batch. The cache refers to it: it must not change before the backward.
    gamma, beta : array of shape (features,) and any real dtype, optional
        Scale and shift, rounded to x's dtype; None: absent. A shape that broadcasts along the
        feature axis alone is one, too, such as (1, features) or (1, features, 1, 1); the
        gradient has it then.
    eps : float, optional
        Added to the variance.
    axis : int, optional
        The feature axis of `x`.
    out : array of x's shape and dtype, optional
        Where to write `y`. It may not share memory with `x`. It may be `residual` itself, but may
        not overlap it otherwise.
    relu : bool, optional
        Whether a ReLU follows: the maximum with 0. NaN stays NaN.
    residual : array of x's shape and dtype, optional
        Added to the result, before the ReLU if there is one.
    mask : array of bool, of x's shape without the feature axis or broadcast to it, optional
        What counts (True). The rest is as if it were not there, whatever it holds: it is in no
        statistic and no gradient, and `y` and `dx` are 0 there.
    lengths : array of int and shape (examples,), optional
        In place of a mask, for padded sequences, whose steps lie along the second axis that is
        not the features': how many of them count.

    Returns
    -------
    y : array of x's shape and dtype
        ``gamma*(x - mean)/sqrt(var + eps) + beta``, and what follows it; `out`, if given.
    cache : Cache
        For `batchnorm_backward`. It keeps copies of `gamma` and `beta`, and, with a residual and
        a ReLU, a bit a value.

    Raises
    ------
    TypeError
        If `x` is not of float32 or float64, a parameter is not of real numbers, `axis` is no
        integer, `eps` no number, `relu` not True or False, or `mask` not of booleans.
    ValueError
        If a shape, `axis`, `eps`, `residual`, `mask`, `lengths` or `out` does not fit, or if there
        is one value per feature, which has no variance. An empty batch is allowed: its `y` is
        empty.

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
    >>> bn_cy.batchnorm_forward(x, eps=0, relu=True)[0]
    array([[0., 0.],
           [1., 1.]])
    """
    cdef Call cache
    if mask is not None or lengths is not None:
        kept = Kept(as_plain("x", x), axis, mask, lengths)
        target = kept.target(out)
        check_apart_from_parameters(target, gamma, beta)
        kept.check_variance()
        x, _, residual = kept.gathered(x, residual)
        y, cache = batchnorm_forward(
            x, gamma, beta, eps, axis=axis, relu=relu, residual=residual)
        cache._kept = kept
        return kept.scatter(y, target, out), cache
    cache = measured_cache(x, axis)
    return run_forward(cache, x, gamma, beta, eps, out, relu, residual, True, NULL, True), cache


def frozen_forward(
    x, mean, var, gamma=None, beta=None, eps=1e-5, *, axis=1, out=None, relu=False,
    residual=None
):
    """Normalize every feature by a given mean and variance, for a backward: eval mode of a layer.

    Parameters
    ----------
    x : array of float32 or float64, two dimensions or more
        The batch. The cache refers to it: it must not change before the backward.
    mean, var : array of shape (features,) and any real dtype
        The statistics, which do not depend on `x`; used in float64.
    gamma, beta, eps, axis, out, relu, residual
        As in `batchnorm_forward`.

    Returns
    -------
    y : array of x's shape and dtype
        ``gamma*(x - mean)/sqrt(var + eps) + beta``, and what follows it; `out`, if given.
    cache : Cache
        For `batchnorm_backward`, whose dx is then ``gamma*invstd*dout``; after a ReLU dout counts
        where y > 0.

    Raises
    ------
    TypeError, ValueError
        As `batchnorm_forward`, and if a variance is negative; one value per feature is allowed.

    See Also
    --------
    normalize : the same without a backward, which may write over `x`.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> x = np.array([[1.0], [5.0]])
    >>> y, cache = bn_cy.frozen_forward(x, mean=[3.0], var=[4.0], eps=0)
    >>> bn_cy.batchnorm_backward(np.array([[1.0], [3.0]]), cache)[0]
    array([[0.5],
           [1.5]])
    """
    cdef Call cache = frozen_cache(x, mean, var, axis)
    return run_forward(cache, x, gamma, beta, eps, out, relu, residual, False, NULL, True), cache


def batchnorm_backward(dout, cache, *, out=None):
    """Gradients of `batchnorm_forward`.

    Parameters
    ----------
    dout : array of x's shape and any floating-point dtype
        The gradient with respect to `y`, rounded to x's dtype.
    cache : Cache
        What the forward returned.
    out : array of x's shape and dtype, optional
        Where to write `dx`. It may be `dout` itself, but may not overlap it otherwise; it may not
        share memory with `x`, unless this is one that had to be copied.

    Returns
    -------
    dx : array of x's shape and dtype
        ``gamma*invstd*(dout - dbeta/n - xhat*dgamma/n)``; `out`, if given.
    dgamma, dbeta : array of the parameters' shape and x's dtype, or None
        ``sum(dout*xhat)`` and ``sum(dout)``; None if the forward had no `gamma` or no `beta`.
    dresidual : array of x's shape and dtype
        Only if the forward had a residual: dout where ``y > 0``, else 0; without a ReLU a copy of
        dout. After a ReLU the other gradients are those of this.

    Raises
    ------
    TypeError, ValueError
        If `dout` or `out` is not an array of x's shape, `out` not of its dtype, or `cache` is not
        a cache.
    RuntimeError
        If `x` was changed after the forward. It is noticed by 64 of its values, wherever they lie:
        a change of all values does not pass, one of few, or of an `x` that is nearly all 0, may.

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
    if not isinstance(cache, Call):
        raise TypeError(
            f"cache must be a Cache, as batchnorm_forward returns, got {type(cache).__name__}; "
            "what a layer's forward left goes to the layer's backward")
    kept = cache._kept
    if kept is None:
        return gradients(cache, dout, out)
    target = kept.target(out)
    refuse_overlapping_elements(target)
    dx, dgamma, dbeta, *dresidual = gradients(cache, kept.gather("dout", dout), None)
    return (
        kept.scatter(dx, target, out), dgamma, dbeta,
        *[kept.scatter(d, kept.target(None)) for d in dresidual])


def moments(x, *, axis=1, mask=None, lengths=None):
    """Count, mean and biased variance of every feature.

    Parameters
    ----------
    x : array of float32 or float64, two dimensions or more
        The batch.
    axis : int, optional
        The feature axis of `x`.
    mask, lengths : array, optional
        What counts, as in `batchnorm_forward`.

    Returns
    -------
    Moments
        ``count``, the values per feature; ``mean`` and ``var``, float64 arrays of shape
        (features,). Of an empty batch: zeros.

    Raises
    ------
    TypeError, ValueError
        As `batchnorm_forward`; one value per feature is allowed, its variance is 0.

    Notes
    -----
    The moments of parts merge to those of the whole: with ``n = na + nb`` and ``d = mb - ma``,
    ``mean = ma + d*nb/n`` and ``n*var = na*va + nb*vb + d*d*na*nb/n`` (Chan, Golub and LeVeque,
    1979).

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> bn_cy.moments(np.array([[1.0, 5.0], [3.0, 5.0]]))
    Moments(count=2, mean=array([2., 5.]), var=array([1., 0.]))
    """
    if mask is not None or lengths is not None:
        x = Kept(as_plain("x", x), axis, mask, lengths).gather("x", x)
    cdef Call cache = Call(batch_of(x, axis))
    launch_forward(cache, NULL, NULL, NULL, NULL, 1, True, NULL)  # moments do not depend on eps
    return Moments(cache.batch.count, cache.row_array(MEAN), cache.row_array(VAR))


def normalize(
    x, mean, var, gamma=None, beta=None, eps=1e-5, *, axis=1, out=None, relu=False,
    residual=None
):
    """Normalize every feature by a given mean and variance, as in eval mode.

    Parameters
    ----------
    x : array of float32 or float64, two dimensions or more
        The batch.
    mean, var : array of shape (features,) and any real dtype
        The statistics; used in float64.
    gamma, beta, eps, axis, relu, residual
        As in `batchnorm_forward`.
    out : array of x's shape and dtype, optional
        Where to write `y`. It may be `x` or `residual` itself; it may not overlap them otherwise.

    Returns
    -------
    y : array of x's shape and dtype
        ``gamma*(x - mean)/sqrt(var + eps) + beta``, and what follows it; `out`, if given.

    Raises
    ------
    TypeError, ValueError
        As `batchnorm_forward`, and if a variance is negative; one value per feature is allowed.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> bn_cy.normalize(np.array([[1.0], [5.0]]), mean=[3.0], var=[4.0], eps=0)
    array([[-1.],
           [ 1.]])
    """
    cdef Call cache = frozen_cache(x, mean, var, axis)
    return run_forward(cache, x, gamma, beta, eps, out, relu, residual, False, NULL, False)


def gradient_sums(
    dout, x, mean, var, eps=1e-5, *, axis=1, relu=False, gamma=None, beta=None
):
    """The two sums over the batch that the backward needs: the first half of `batchnorm_backward`.

    Parameters
    ----------
    dout, x : array of float32 or float64, two dimensions or more
        The gradient with respect to `y`, and the batch; of one shape. dout is rounded to x's
        dtype.
    mean, var : array of shape (features,) and any real dtype
        The statistics that normalized `x`; used in float64.
    eps, axis
        As in `batchnorm_forward`.
    relu : bool, optional
        Whether a ReLU followed: then dout counts where y > 0. Where a residual was added, too,
        pass its gradient as dout instead, ``np.where(y > 0, dout, 0)``, and leave this False.
    gamma, beta : array of shape (features,) and any real dtype, optional
        Scale and shift of the forward. They have a say with `relu` alone.

    Returns
    -------
    sum_dout, sum_dout_xhat : float64 array of shape (features,)
        ``sum(dout)`` and ``sum(dout*xhat)``: dbeta and dgamma, where this batch is all there is.

    Raises
    ------
    TypeError, ValueError
        If a shape, a dtype, `axis`, `eps` or `relu` does not fit, or if a variance is negative.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> x = np.array([[1.0], [3.0]])
    >>> bn_cy.gradient_sums(np.array([[1.0], [2.0]]), x, mean=[2.0], var=[1.0], eps=0)
    (array([3.]), array([1.]))
    """
    cdef Call cache = frozen_cache(x, mean, var, axis)
    describe(cache, gamma, beta, eps, relu)
    sums = gradient_rows(cache, dout)
    return sums[0], sums[1]


def input_gradient(
    dout, x, mean, var, gamma, eps, sum_dout, sum_dout_xhat, count, *, axis=1, out=None,
    relu=False, beta=None
):
    """Gradient with respect to x, given the sums over the batch: the second half of
    `batchnorm_backward`.

    Where the batch is spread over processes, `sum_dout`, `sum_dout_xhat` and `count` are those of
    all of them together.

    Parameters
    ----------
    dout, x, mean, var, eps, axis
        As in `gradient_sums`.
    gamma : array of shape (features,) and any real dtype, or None
        The scale, rounded to x's dtype.
    sum_dout, sum_dout_xhat : array of shape (features,) and any real dtype
        What `gradient_sums` returned, added up over all parts of the batch.
    count : int or float
        Values per feature in the whole batch; infinite for frozen statistics.
    out : array of x's shape and dtype, optional
        Where to write `dx`. It may be `dout` itself, but may not overlap it otherwise; it may not
        share memory with `x`, unless this is one that had to be copied.
    relu : bool, optional
        As in `gradient_sums`.
    beta : array of shape (features,) and any real dtype, optional
        The shift of the forward. It has a say with `relu` alone.

    Returns
    -------
    dx : array of x's shape and dtype
        ``gamma*invstd*(dout - sum_dout/count - xhat*sum_dout_xhat/count)``; `out`, if given.

    Raises
    ------
    TypeError, ValueError
        If a shape, a dtype, `axis`, `eps`, `count`, `out` or `relu` does not fit, or if a variance
        is negative.

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
    cdef Call cache = frozen_cache(x, mean, var, axis)
    cdef Block memory = rows_of(cache.batch, 2)
    cdef double *sums = <double *>memory.start
    cache.values = checked_count(count, cache.batch.size == 0)
    describe(cache, gamma, beta, eps, relu)
    cache.batch.row(sums, "sum_dout", sum_dout)
    cache.batch.row(sums + cache.batch.shape.features, "sum_dout_xhat", sum_dout_xhat)
    return run_backward(cache, dout, None, None, None, sums, False, out)
