"""Batch normalization in plain NumPy, every formula beside its derivation.

This module is for reading and for tests. It imports NumPy alone and is as slow as it looks; the
package's own functions compute the same with compiled loops.

Notation, for one feature; all features are treated alike and do not mix::

    x_1 ... x_n   the values of the feature in the batch
    mean          (sum_i x_i) / n
    var           (sum_i (x_i - mean)^2) / n          biased: divided by n, not by n - 1
    invstd        1 / sqrt(var + eps)
    xhat_i        (x_i - mean) * invstd
    y_i           gamma * xhat_i + beta
    l             the loss, one number that depends on every y_i
    dout_i        dl/dy_i, the upstream gradient; dx_i is dl/dx_i, and so on

The layer is that of [1]_, the steps of its graph are named as in [2]_, and the weight that needs no
batch is from [3]_.

Sums run over the batch, that is over every axis but the feature axis, which is the keyword `axis`
of every function that takes a batch. An axis that the array does not have is an IndexError.
A batch is a NumPy array of two dimensions or more, without a mask: anything else is a TypeError or
a ValueError. So is a dout or a residual of another shape, and what is meant to be one value per
feature and is not; they would broadcast to a wrong result in silence. A plain number stands for the
same in all features.

Nothing is cast: float32 in is float32 throughout, and np.longdouble in is a reference of higher
precision where the platform has one. Where the dtypes of the arguments differ, NumPy promotes.

Any batch is computed as the formulas stand. With one value per feature xhat is 0, so y is beta, and
dx and dgamma are 0. Without any, the moments are nan, with NumPy's warning about the division 0/0.

References
----------
.. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by
   Reducing Internal Covariate Shift", 2015, arXiv:1502.03167.
.. [2] Frederik Kratzert, "Understanding the backward pass through Batch Normalization Layer", 2016.
.. [3] T. Salimans and D. P. Kingma, "Weight Normalization: A Simple Reparameterization to
   Accelerate Training of Deep Neural Networks", 2016, arXiv:1602.07868.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "backward_closed_form",
    "backward_through_statistics",
    "check_gradient",
    "forward",
    "frozen_backward",
    "jacobian",
    "moments",
    "moments_one_pass",
    "normalize",
    "relu_backward",
    "relu_forward",
    "reparameterized_backward",
    "reparameterized_weight",
    "running_update",
    "staged_backward",
    "staged_forward",
    "weight_norm",
]

Array = NDArray[Any]


def _batch_axes(x: Array, axis: int) -> tuple[int, ...]:
    """Every axis of x but the feature axis."""
    feature_axis = range(x.ndim)[axis]
    return tuple(i for i in range(x.ndim) if i != feature_axis)


def _count(x: Array, axis: int) -> int:
    """Count the values of a feature in the batch, the n of the formulas."""
    return math.prod(x.shape[i] for i in _batch_axes(x, axis))


def _batch_sum(x: Array, axis: int) -> Array:
    """One sum per feature, shape (features,)."""
    total: Array = np.sum(x, axis=_batch_axes(x, axis))
    return total


def _wide(per_feature: Array, x: Array, axis: int) -> Array:
    """Lay one number per feature along x's feature axis, so that it broadcasts against x."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.reshape(per_feature, shape)


def _check_array(name: str, value: Any) -> None:
    """Refuse what has no shape and no dtype of its own."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(value).__name__}")
    if isinstance(value, np.ma.MaskedArray):  # the formulas count all values
        raise TypeError(f"{name} must have no mask, got {type(value).__name__}")


def _check_batch(x: Array) -> None:
    """Refuse what is no batch."""
    _check_array("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have two dimensions or more, got shape {x.shape}")


def _check_like(name: str, value: Array, x: Array) -> None:
    """Refuse a dout or a residual that does not fit, and what is no batch."""
    _check_batch(x)
    _check_array(name, value)
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape {x.shape} of x, got {value.shape}")


def _check_rows(x: Array, axis: int, **rows: Any) -> None:
    """Refuse parameters and statistics that are neither one value per feature nor a number."""
    for name, row in rows.items():
        if not isinstance(row, (np.ndarray, np.number, float, int)):
            raise TypeError(f"{name} must be a NumPy array or a number, got {type(row).__name__}")
        if np.shape(row) not in ((), (x.shape[axis],)):
            raise ValueError(
                f"{name} must have shape ({x.shape[axis]},), one value per feature, "
                f"got {np.shape(row)}"
            )


def moments(x: Array, *, axis: int = 1) -> tuple[int, Array, Array]:
    """Count, mean and biased variance of every feature, in two passes.

    Parameters
    ----------
    x : ndarray
        The batch, two dimensions or more.
    axis : int, optional
        The feature axis.

    Returns
    -------
    count : int
        Values per feature, n.
    mean, var : ndarray, shape (features,)
        The mean, and the variance divided by n.

    Notes
    -----
    The first pass has the mean, the second sums what is left of x without it::

        mean = (sum_i x_i) / n
        var  = (sum_i (x_i - mean)^2) / n

    The computed mean is off by some rounding error d. This harms little, because the deviations
    from the true mean m sum to 0 and the error enters squared::

        sum_i (x_i - m - d)^2 / n = sum_i (x_i - m)^2 / n - 2 d sum_i (x_i - m) / n + d^2
                                  = var + d^2

    Examples
    --------
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]])
    >>> count, mean, var = moments(x)
    >>> count, mean.tolist(), var.round(3).tolist()
    (3, [3.0, 20.0], [2.667, 200.0])
    """
    _check_batch(x)
    n = _count(x, axis)
    mean = _batch_sum(x, axis) / n
    var = _batch_sum((x - _wide(mean, x, axis)) ** 2, axis) / n
    return n, mean, var


def moments_one_pass(x: Array, *, axis: int = 1) -> tuple[int, Array, Array]:
    """Moments by E[x^2] - E[x]^2, kept to show why nobody should use it.

    Parameters
    ----------
    x : ndarray
        The batch, two dimensions or more.
    axis : int, optional
        The feature axis.

    Returns
    -------
    count : int
        Values per feature, n.
    mean, var : ndarray, shape (features,)
        The mean, and a variance that may be wrong in every digit and even negative.

    Notes
    -----
    In exact arithmetic the formula is right::

        sum_i (x_i - mean)^2 / n = sum_i x_i^2 / n - 2 mean sum_i x_i / n + mean^2
                                 = E[x^2] - 2 mean^2 + mean^2
                                 = E[x^2] - E[x]^2

    In floating point each of the two terms carries a rounding error of about u * mean^2, u being
    the precision of the dtype, and their difference keeps it. No digit of the variance is left once
    (mean/std)^2 reaches 1/u: at mean/std of a few thousand in float32 and 1e8 in float64. The two
    passes of `moments` never see mean^2.

    Examples
    --------
    The variance of these two values is 1. In one pass it vanishes:

    >>> x = np.array([[1e9 - 1], [1e9 + 1]])
    >>> moments(x)[2].tolist(), moments_one_pass(x)[2].tolist()
    ([1.0], [0.0])

    With a little bad luck it is negative, and its square root is nan:

    >>> x = np.array([[3e9 + 1], [3e9 + 2], [3e9 + 3]])
    >>> moments(x)[2].round(3).tolist(), moments_one_pass(x)[2].tolist()
    ([0.667], [-1024.0])
    """
    _check_batch(x)
    n = _count(x, axis)
    mean = _batch_sum(x, axis) / n
    var = _batch_sum(x**2, axis) / n - mean**2
    return n, mean, var


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
) -> Array:
    """Batch normalization with given statistics, as in evaluation.

    Parameters
    ----------
    x : ndarray
        The batch, two dimensions or more.
    mean, var : ndarray, shape (features,)
        The statistics to normalize with.
    gamma, beta : ndarray, shape (features,), or None
        Scale and shift; None stands for no scale, no shift.
    eps : float, optional
        Added to the variance.
    axis : int, optional
        The feature axis.

    Returns
    -------
    ndarray
        y, of x's shape.

    Notes
    -----
    The definition, from [1]_::

        xhat_i = (x_i - mean) / sqrt(var + eps)
        y_i    = gamma * xhat_i + beta

    References
    ----------
    .. [1] Ioffe and Szegedy, 2015, algorithm 2.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [5.0]])
    >>> normalize(x, np.array([3.0]), np.array([4.0]), eps=0).tolist()
    [[-1.0], [0.0], [1.0]]
    """
    _check_batch(x)
    affine = {"gamma": gamma, "beta": beta}
    given = {name: row for name, row in affine.items() if row is not None}
    _check_rows(x, axis, mean=mean, var=var, **given)
    xhat = (x - _wide(mean, x, axis)) / _wide(np.sqrt(var + eps), x, axis)
    scaled = xhat if gamma is None else _wide(gamma, x, axis) * xhat
    return scaled if beta is None else scaled + _wide(beta, x, axis)


def forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
) -> Array:
    """Batch normalization with the batch's own statistics, as in training.

    Parameters
    ----------
    x : ndarray
        The batch, two dimensions or more.
    gamma, beta : ndarray, shape (features,), or None
        Scale and shift; None stands for no scale, no shift.
    eps : float, optional
        Added to the variance.
    axis : int, optional
        The feature axis.

    Returns
    -------
    ndarray
        y, of x's shape. Every feature has mean beta and variance gamma^2 * var/(var + eps).

    Notes
    -----
    The definition, from [1]_::

        y_i = gamma * (x_i - mean) / sqrt(var + eps) + beta

    Mean and variance of y follow from those of x. The deviations x_i - mean sum to 0, so the mean
    of y is beta, and::

        sum_i (y_i - beta)^2 / n = gamma^2 sum_i (x_i - mean)^2 / n / (var + eps)
                                 = gamma^2 var / (var + eps)

    References
    ----------
    .. [1] Ioffe and Szegedy, 2015, algorithm 1.

    Examples
    --------
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> gamma, beta = np.array([1.0, 2.0]), np.array([0.0, 100.0])
    >>> forward(x, gamma, beta, eps=0).tolist()
    [[-1.0, 98.0], [1.0, 102.0]]
    """
    _, mean, var = moments(x, axis=axis)
    return normalize(x, mean, var, gamma, beta, eps, axis=axis)


def running_update(
    running_mean: Array,
    running_var: Array,
    x: Array,
    momentum: float = 0.1,
    *,
    weighs: str = "new",
    unbiased: bool = True,
    axis: int = 1,
) -> tuple[Array, Array]:
    """Take one more batch into the running statistics.

    Parameters
    ----------
    running_mean, running_var : ndarray, shape (features,)
        What they were before.
    x : ndarray
        The batch, two dimensions or more.
    momentum : float, optional
        A weight from 0 to 1.
    weighs : {"new", "old"}, optional
        What `momentum` is the weight of: the batch (PyTorch, whose 0.1 is the default here) or the
        running statistics (Keras, Flax, ONNX and the course CS231n: their 0.9 is PyTorch's 0.1).
    unbiased : bool, optional
        Whether the variance of the batch is divided by n - 1 (PyTorch) or by n (the others).
    axis : int, optional
        The feature axis.

    Returns
    -------
    running_mean, running_var : ndarray, shape (features,)
        What they are now, in new arrays.

    Raises
    ------
    ValueError
        momentum is not from 0 to 1, weighs is another word, or the estimate is to be unbiased and
        the batch has one value per feature or none.

    Notes
    -----
    With w for the weight of the batch::

        running_mean <- (1 - w) running_mean + w mean
        running_var  <- (1 - w) running_var  + w var            or, unbiased, w var n/(n - 1)

    Where n/(n - 1) comes from: for independent values of mean m and variance s^2, the mean of the
    batch has the variance s^2/n about m, and what the batch's own mean takes away is missing in its
    variance::

        sum_i (x_i - mean)^2 / n = sum_i (x_i - m)^2 / n - (mean - m)^2
        E[var]                   = s^2                   - s^2/n         = s^2 (n - 1)/n

    The batch is normalized with var itself, since it is that of these n values and estimates
    nothing.

    Examples
    --------
    The variance of this batch is 4 when divided by n = 2, and 8 when divided by n - 1:

    >>> x, zero, one = np.array([[3.0], [7.0]]), np.array([0.0]), np.array([1.0])
    >>> [r.tolist() for r in running_update(zero, one, x, 0.5)]
    [[2.5], [4.5]]
    >>> [r.tolist() for r in running_update(zero, one, x, 0.75, weighs="old", unbiased=False)]
    [[1.25], [1.75]]
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be from 0 to 1, got {momentum}")
    if weighs not in ("new", "old"):
        raise ValueError(f'weighs must be "new" or "old", got {weighs!r}')
    n, mean, var = moments(x, axis=axis)
    _check_rows(x, axis, running_mean=running_mean, running_var=running_var)
    if unbiased:
        if n < 2:
            raise ValueError(f"an unbiased variance needs two values per feature, got {n}")
        var = var * n / (n - 1)
    new, old = (momentum, 1 - momentum) if weighs == "new" else (1 - momentum, momentum)
    return old * running_mean + new * mean, old * running_var + new * var


def staged_forward(
    x: Array, gamma: Array, beta: Array, eps: float = 1e-5, *, axis: int = 1
) -> tuple[Array, dict[str, Any]]:
    """Forward pass as the nine steps of its computational graph.

    Parameters
    ----------
    x : ndarray
        The batch, two dimensions or more.
    gamma, beta : ndarray, shape (features,)
        Scale and shift.
    eps : float, optional
        Added to the variance.
    axis : int, optional
        The feature axis.

    Returns
    -------
    out : ndarray
        y, of x's shape.
    cache : dict
        What `staged_backward` needs: "x", "gamma", "beta", "axis", and the result of each step
        under its name in the notes. Of x's shape: "xmu", "sq", "xhat", "gammax", "out"; of shape
        (features,): "mu", "var", "sqrtvar", "ivar".

    Notes
    -----
    Each step is one operation whose derivative is known by heart. The steps and names are those of
    [1]_::

        1  mu      = sum(x)/n             one per feature
        2  xmu     = x - mu               mu is broadcast
        3  sq      = xmu^2
        4  var     = sum(sq)/n            one per feature
        5  sqrtvar = sqrt(var + eps)
        6  ivar    = 1/sqrtvar
        7  xhat    = xmu * ivar           ivar is broadcast; xmu is used here and in step 3
        8  gammax  = gamma * xhat         gamma is broadcast
        9  out     = gammax + beta        beta is broadcast

    References
    ----------
    .. [1] Kratzert, 2016.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [5.0], [7.0]])
    >>> out, cache = staged_forward(x, np.array([2.0]), np.array([1.0]), eps=4.0)
    >>> cache["mu"].tolist(), cache["var"].tolist(), cache["sqrtvar"].tolist()
    ([4.0], [5.0], [3.0])
    >>> out.round(3).tolist()
    [[-1.0], [0.333], [1.667], [3.0]]
    """
    _check_batch(x)
    _check_rows(x, axis, gamma=gamma, beta=beta)
    n = _count(x, axis)
    mu = _batch_sum(x, axis) / n
    xmu = x - _wide(mu, x, axis)
    sq = xmu**2
    var = _batch_sum(sq, axis) / n
    sqrtvar = np.sqrt(var + eps)
    ivar = 1 / sqrtvar
    xhat = xmu * _wide(ivar, x, axis)
    gammax = _wide(gamma, x, axis) * xhat
    out = gammax + _wide(beta, x, axis)
    cache = {
        "x": x,
        "gamma": gamma,
        "beta": beta,
        "axis": axis,
        "mu": mu,
        "xmu": xmu,
        "sq": sq,
        "var": var,
        "sqrtvar": sqrtvar,
        "ivar": ivar,
        "xhat": xhat,
        "gammax": gammax,
        "out": out,
    }
    return out, cache


def staged_backward(dout: Array, cache: dict[str, Any]) -> tuple[Array, Array, Array]:
    """Backward pass through the nine steps of `staged_forward`, last step first.

    Parameters
    ----------
    dout : ndarray
        dl/dout, of x's shape.
    cache : dict
        From `staged_forward`. Every gradient is added to it under its name in the notes, each of
        the shape of what it is the gradient of.

    Returns
    -------
    dx : ndarray
        dl/dx, of x's shape.
    dgamma, dbeta : ndarray, shape (features,)
        dl/dgamma and dl/dbeta.

    Notes
    -----
    Three rules do all the work. A step's input receives the gradient of its output times the
    derivative of the step. What the forward pass broadcast over the batch, the backward pass sums
    over the batch; what it summed, the backward pass broadcasts. What it used twice receives two
    gradients, and they add::

        9  out = gammax + beta        dgammax  = dout
                                      dbeta    = sum(dout)              beta was broadcast
        8  gammax = gamma * xhat      dxhat    = gamma * dgammax
                                      dgamma   = sum(dgammax * xhat)    gamma was broadcast
        7  xhat = xmu * ivar          dxmu1    = dxhat * ivar
                                      divar    = sum(dxhat * xmu)       ivar was broadcast
        6  ivar = 1/sqrtvar           dsqrtvar = -divar / sqrtvar^2
        5  sqrtvar = sqrt(var + eps)  dvar     = dsqrtvar / (2 sqrtvar)
        4  var = sum(sq)/n            dsq      = dvar / n               broadcast
        3  sq = xmu^2                 dxmu2    = 2 xmu * dsq
           xmu was used twice         dxmu     = dxmu1 + dxmu2
        2  xmu = x - mu               dx1      = dxmu
                                      dmu      = -sum(dxmu)             mu was broadcast
        1  mu = sum(x)/n              dx2      = dmu / n                broadcast
           x was used twice           dx       = dx1 + dx2

    References
    ----------
    .. [1] Kratzert, 2016.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [5.0], [7.0]])
    >>> out, cache = staged_forward(x, np.array([2.0]), np.array([1.0]), eps=4.0)
    >>> dout = np.array([[0.0], [9.0], [0.0], [0.0]])
    >>> dx, dgamma, dbeta = staged_backward(dout, cache)
    >>> dx.round(3).tolist(), dgamma.round(3).tolist(), dbeta.tolist()
    ([[-2.0], [4.333], [-1.333], [-1.0]], [-3.0], [9.0])
    >>> cache["divar"].tolist(), cache["dvar"].round(3).tolist()
    ([-18.0], [0.333])
    """
    x, axis = cache["x"], cache["axis"]
    _check_like("dout", dout, x)
    xmu, xhat, sqrtvar = cache["xmu"], cache["xhat"], cache["sqrtvar"]
    n = _count(x, axis)
    dgammax = dout
    dbeta = _batch_sum(dout, axis)
    dxhat = _wide(cache["gamma"], x, axis) * dgammax
    dgamma = _batch_sum(dgammax * xhat, axis)
    dxmu1 = dxhat * _wide(cache["ivar"], x, axis)
    divar = _batch_sum(dxhat * xmu, axis)
    dsqrtvar = -divar / sqrtvar**2
    dvar = dsqrtvar / (2 * sqrtvar)
    dsq = np.broadcast_to(_wide(dvar / n, x, axis), x.shape)
    dxmu2 = 2 * xmu * dsq
    dxmu = dxmu1 + dxmu2
    dx1 = dxmu
    dmu = -_batch_sum(dxmu, axis)
    dx2 = np.broadcast_to(_wide(dmu / n, x, axis), x.shape)
    dx = dx1 + dx2
    cache.update(
        dout=dout,
        dgammax=dgammax,
        dbeta=dbeta,
        dxhat=dxhat,
        dgamma=dgamma,
        dxmu1=dxmu1,
        divar=divar,
        dsqrtvar=dsqrtvar,
        dvar=dvar,
        dsq=dsq,
        dxmu2=dxmu2,
        dxmu=dxmu,
        dx1=dx1,
        dmu=dmu,
        dx2=dx2,
        dx=dx,
    )
    return dx, dgamma, dbeta


def backward_closed_form(
    dout: Array, x: Array, gamma: Array, eps: float = 1e-5, *, axis: int = 1
) -> tuple[Array, Array, Array]:
    """Backward pass in one line.

    Parameters
    ----------
    dout : ndarray
        dl/dy, of x's shape.
    x : ndarray
        The batch of the forward pass.
    gamma : ndarray, shape (features,)
        Scale.
    eps : float, optional
        Added to the variance.
    axis : int, optional
        The feature axis.

    Returns
    -------
    dx : ndarray
        dl/dx, of x's shape.
    dgamma, dbeta : ndarray, shape (features,)
        dl/dgamma and dl/dbeta.

    Notes
    -----
    gamma and beta reach the loss through every y_k = gamma xhat_k + beta::

        dl/dbeta  = sum_k dl/dy_k dy_k/dbeta  = sum_k dout_k
        dl/dgamma = sum_k dl/dy_k dy_k/dgamma = sum_k dout_k xhat_k

    So does x_i, because it moves the mean and the variance of all. With [k=i] for 1 where k = i and
    0 elsewhere::

        dmean/dx_i   = 1/n
        dvar/dx_i    = (2/n) sum_k (x_k - mean) ([k=i] - 1/n)
                     = (2/n) (x_i - mean)                       since sum_k (x_k - mean) = 0
        dinvstd/dx_i = -(1/2) (var + eps)^(-3/2) dvar/dx_i
                     = -(invstd^3 / n) (x_i - mean)
                     = -(invstd^2 / n) xhat_i

    The product rule on xhat_k = (x_k - mean) invstd::

        dxhat_k/dx_i = ([k=i] - 1/n) invstd + (x_k - mean) dinvstd/dx_i
                     = invstd ([k=i] - 1/n - xhat_k xhat_i / n)

    and the chain rule over all y_k::

        dl/dx_i = sum_k dl/dy_k gamma dxhat_k/dx_i
                = gamma invstd (dl/dy_i - (1/n) sum_k dl/dy_k - (xhat_i/n) sum_k dl/dy_k xhat_k)
                = gamma invstd (dout_i - dbeta/n - xhat_i dgamma/n)

    The middle line is where write-ups slip: without dl/dy_k inside the last sum, that sum is
    sum_k xhat_k = 0 and the term is lost. An upstream gradient of ones does not notice, since dx is
    then 0 either way; a random one does.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [5.0], [7.0]])
    >>> dout = np.array([[0.0], [9.0], [0.0], [0.0]])
    >>> dx, dgamma, dbeta = backward_closed_form(dout, x, np.array([2.0]), eps=4.0)
    >>> dx.round(3).tolist(), dgamma.round(3).tolist(), dbeta.tolist()
    ([[-2.0], [4.333], [-1.333], [-1.0]], [-3.0], [9.0])
    """
    _check_like("dout", dout, x)
    _check_rows(x, axis, gamma=gamma)
    n, mean, var = moments(x, axis=axis)
    invstd = 1 / np.sqrt(var + eps)
    xhat = (x - _wide(mean, x, axis)) * _wide(invstd, x, axis)
    dbeta = _batch_sum(dout, axis)
    dgamma = _batch_sum(dout * xhat, axis)
    residual = dout - _wide(dbeta / n, x, axis) - xhat * _wide(dgamma / n, x, axis)
    return _wide(gamma * invstd, x, axis) * residual, dgamma, dbeta


def backward_through_statistics(
    dout: Array, x: Array, gamma: Array, eps: float = 1e-5, *, axis: int = 1
) -> tuple[Array, Array, Array]:
    """Backward pass through the gradients of the mean and of the variance.

    Parameters
    ----------
    dout : ndarray
        dl/dy, of x's shape.
    x : ndarray
        The batch of the forward pass.
    gamma : ndarray, shape (features,)
        Scale.
    eps : float, optional
        Added to the variance.
    axis : int, optional
        The feature axis.

    Returns
    -------
    dx : ndarray
        dl/dx, of x's shape.
    dgamma, dbeta : ndarray, shape (features,)
        dl/dgamma and dl/dbeta.

    Notes
    -----
    This is the form of the paper [1]_. Read xhat_i as a function of x_i, mean and var, and var as a
    function of every x_i and mean. From y_i = gamma xhat_i + beta::

        dl/dxhat_i = gamma dl/dy_i

    var reaches the loss through every xhat_i::

        dxhat_i/dvar = -(1/2) (x_i - mean) (var + eps)^(-3/2)
        dl/dvar      = sum_i dl/dxhat_i dxhat_i/dvar
                     = -(1/2) invstd^3 sum_i dl/dxhat_i (x_i - mean)

    mean reaches it through every xhat_i and through var; the second way adds nothing, since the
    deviations sum to 0::

        dxhat_i/dmean = -invstd
        dvar/dmean    = -(2/n) sum_i (x_i - mean) = 0
        dl/dmean      = sum_i dl/dxhat_i dxhat_i/dmean + dl/dvar dvar/dmean
                      = -invstd sum_i dl/dxhat_i

    x_i reaches it three ways: through its own xhat_i, through var and through mean::

        dl/dx_i = dl/dxhat_i dxhat_i/dx_i + dl/dvar dvar/dx_i          + dl/dmean dmean/dx_i
                = dl/dxhat_i invstd       + dl/dvar (2/n) (x_i - mean) + dl/dmean / n

    Both sums start from dl/dxhat. Write-ups that print dl/dx there go in a circle, dl/dx being the
    last thing known; with dl/dy there instead, gamma is lost. Putting the first two results into
    the last line gives the one line of `backward_closed_form`.

    References
    ----------
    .. [1] Ioffe and Szegedy, 2015, section 3.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [5.0], [7.0]])
    >>> dout = np.array([[0.0], [9.0], [0.0], [0.0]])
    >>> dx, dgamma, dbeta = backward_through_statistics(dout, x, np.array([2.0]), eps=4.0)
    >>> dx.round(3).tolist(), dgamma.round(3).tolist(), dbeta.tolist()
    ([[-2.0], [4.333], [-1.333], [-1.0]], [-3.0], [9.0])
    """
    _check_like("dout", dout, x)
    _check_rows(x, axis, gamma=gamma)
    n, mean, var = moments(x, axis=axis)
    invstd = 1 / np.sqrt(var + eps)
    xmu = x - _wide(mean, x, axis)
    dxhat = _wide(gamma, x, axis) * dout
    dvar = -(invstd**3) / 2 * _batch_sum(dxhat * xmu, axis)
    dmean = -invstd * _batch_sum(dxhat, axis)
    dx = (
        dxhat * _wide(invstd, x, axis)
        + xmu * _wide(dvar * 2 / n, x, axis)
        + _wide(dmean / n, x, axis)
    )
    dgamma = _batch_sum(dout * xmu, axis) * invstd
    dbeta = _batch_sum(dout, axis)
    return dx, dgamma, dbeta


def frozen_backward(
    dout: Array,
    x: Array,
    gamma: Array,
    mean: Array,
    var: Array,
    eps: float = 1e-5,
    *,
    axis: int = 1,
) -> tuple[Array, Array, Array]:
    """Backward pass of `normalize`, the statistics being constants, as in evaluation.

    Parameters
    ----------
    dout : ndarray
        dl/dy, of x's shape.
    x : ndarray
        The batch of the forward pass.
    gamma : ndarray, shape (features,)
        Scale.
    mean, var : ndarray, shape (features,)
        The statistics of the forward pass, for instance running ones.
    eps : float, optional
        Added to the variance.
    axis : int, optional
        The feature axis.

    Returns
    -------
    dx : ndarray
        dl/dx, of x's shape.
    dgamma, dbeta : ndarray, shape (features,)
        dl/dgamma and dl/dbeta.

    Notes
    -----
    mean and var do not depend on x, so x_i reaches the loss through its own y_i only, and of the
    three ways of `backward_through_statistics` the first is left::

        dl/dx_i   = dl/dy_i dy_i/dxhat_i dxhat_i/dx_i = dout_i gamma invstd
        dl/dgamma = sum_i dl/dy_i dy_i/dgamma         = sum_i dout_i xhat_i
        dl/dbeta  = sum_i dl/dy_i dy_i/dbeta          = sum_i dout_i

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [5.0]])
    >>> dout = np.array([[9.0], [0.0], [3.0]])
    >>> gamma, mean, var = np.array([2.0]), np.array([3.0]), np.array([4.0])
    >>> dx, dgamma, dbeta = frozen_backward(dout, x, gamma, mean, var, eps=0)
    >>> dx.tolist(), dgamma.tolist(), dbeta.tolist()
    ([[9.0], [0.0], [3.0]], [-6.0], [12.0])
    """
    _check_like("dout", dout, x)
    _check_rows(x, axis, gamma=gamma)
    xhat = normalize(x, mean, var, eps=eps, axis=axis)
    dx = _wide(gamma / np.sqrt(var + eps), x, axis) * dout
    return dx, _batch_sum(dout * xhat, axis), _batch_sum(dout, axis)


def relu_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    residual: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
) -> Array:
    """Batch normalization, a residual added to it, and a ReLU, as in a block of a ResNet.

    Parameters
    ----------
    x : ndarray
        The batch, two dimensions or more.
    gamma, beta : ndarray, shape (features,)
        Scale and shift.
    residual : ndarray, optional
        What is added before the ReLU, of x's shape: the skip connection.
    eps : float, optional
        Added to the variance.
    axis : int, optional
        The feature axis.

    Returns
    -------
    ndarray
        y = max(gamma xhat + beta + residual, 0), of x's shape. NaN stays NaN.

    References
    ----------
    .. [1] K. He, X. Zhang, S. Ren and J. Sun, "Deep Residual Learning for Image Recognition", 2015,
       arXiv:1512.03385, figure 2.

    Examples
    --------
    >>> x, residual = np.array([[1.0], [3.0]]), np.array([[0.5], [-3.0]])
    >>> relu_forward(x, np.array([1.0]), np.array([2.0]), residual, eps=0).tolist()
    [[1.5], [0.0]]
    """
    if residual is not None:
        _check_like("residual", residual, x)
    z = forward(x, gamma, beta, eps, axis=axis)
    return np.maximum(z if residual is None else z + residual, 0)


def relu_backward(
    dout: Array,
    x: Array,
    gamma: Array,
    beta: Array,
    residual: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
) -> tuple[Array, Array, Array, Array]:
    """Backward pass of `relu_forward`.

    Parameters
    ----------
    dout : ndarray
        dl/dy, of x's shape.
    x, gamma, beta, residual, eps, axis
        As in `relu_forward`.

    Returns
    -------
    dx : ndarray
        dl/dx, of x's shape.
    dgamma, dbeta : ndarray, shape (features,)
        dl/dgamma and dl/dbeta.
    dresidual : ndarray
        dl/dresidual, of x's shape.

    Notes
    -----
    With z_i = gamma xhat_i + beta + residual_i and y_i = max(z_i, 0)::

        dy_i/dz_i = 1 where z_i > 0, and 0 where z_i < 0; at 0, where there is none, 0 is taken
        dl/dz_i   = dout_i where y_i > 0, else 0

    z_i is a sum, so that both of its parts receive all of its gradient: dl/dz is dl/dresidual, and
    it is what `backward_closed_form` takes for dout. Of y its sign alone is needed.

    Examples
    --------
    >>> x, dout = np.array([[1.0], [3.0], [5.0]]), np.array([[4.0], [2.0], [1.0]])
    >>> relu_backward(dout, x, np.array([1.0]), np.array([0.0]))[3].tolist()
    [[0.0], [0.0], [1.0]]
    """
    _check_like("dout", dout, x)
    y = relu_forward(x, gamma, beta, residual, eps, axis=axis)
    dresidual = np.where(y > 0, dout, 0)
    return *backward_closed_form(dresidual, x, gamma, eps, axis=axis), dresidual


def jacobian(x: Array, gamma: float, eps: float = 1e-5) -> Array:
    """All derivatives dy_k/dx_i of one feature.

    Parameters
    ----------
    x : ndarray, shape (n,)
        The values of the feature in the batch.
    gamma : float
        Its scale.
    eps : float, optional
        Added to the variance.

    Returns
    -------
    ndarray, shape (n, n)
        dy_k/dx_i in row k, column i.

    Notes
    -----
    y_k = gamma xhat_k + beta, and `backward_closed_form` derives dxhat_k/dx_i. In matrix form, with
    1 for the column vector of ones::

        J = gamma invstd (I - 1 1^T / n - xhat xhat^T / n)

    The backward pass is dx = J^T dout, and J tells what the layer does to a gradient::

        J^T = J                                            as the formula shows
        J 1 = gamma invstd (1 - 1 - 0) = 0                 a shift of x does not change y
        J xhat = gamma invstd xhat (1 - |xhat|^2 / n)
               = gamma invstd xhat eps/(var + eps)         nor, where eps = 0, does a stretch

    The last line holds since ``|xhat|^2 = n var/(var + eps)``. With eps = 0, J is gamma invstd
    times the projection onto what is at right angles to 1 and xhat, two directions that the
    gradient loses.

    Examples
    --------
    >>> J = jacobian(np.array([1.0, 3.0, 5.0, 7.0]), 2.0, eps=4.0)
    >>> J[1].round(3).tolist()
    [-0.222, 0.481, -0.148, -0.111]
    >>> (J.T @ np.array([0.0, 9.0, 0.0, 0.0])).round(3).tolist()
    [-2.0, 4.333, -1.333, -1.0]
    """
    _check_array("x", x)
    if x.ndim != 1:
        raise ValueError(f"x must be the values of one feature, shape (n,), got shape {x.shape}")
    n = len(x)
    xmu = x - x.mean()
    invstd = 1 / np.sqrt(np.mean(xmu**2) + eps)
    xhat = xmu * invstd
    J: Array = gamma * invstd * (np.eye(n, dtype=x.dtype) - (1 + np.outer(xhat, xhat)) / n)
    return J


def reparameterized_weight(W: Array, S: Array, gamma: Array, eps: float = 0) -> Array:
    """Batch norm as a weight: W with columns of length gamma in the metric of the covariance.

    This is for understanding. A layer for deployment needs the running statistics and beta, too.

    Parameters
    ----------
    W : ndarray, shape (inputs, features)
        The weight of ``x @ W``, a column per feature.
    S : ndarray, shape (inputs, inputs)
        The covariance of the inputs x, biased as `moments` has it.
    gamma : ndarray, shape (features,)
        Scale.
    eps : float, optional
        Added to the variance.

    Returns
    -------
    ndarray, shape (inputs, features)
        W_hat, such that ``x @ W_hat`` is gamma times the normalized ``x @ W`` for inputs of mean 0
        and covariance S. Where eps is 0 a feature of variance 0 has no W_hat: its column is nan.

    Notes
    -----
    For one column w and inputs of mean 0, the feature u = x w has mean 0 too, and::

        var(u) = E[(x w)^2] = E[w^T x^T x w] = w^T E[x^T x] w = w^T S w

        gamma (u - 0) / sqrt(var(u) + eps) = x (gamma w / sqrt(w^T S w + eps)) = x what

    With eps = 0 the length of w cancels: batch norm keeps the direction of w, and gamma alone sets
    the length, measured by S: what^T S what = gamma^2. `weight_norm` measures it by the identity
    instead.

    Examples
    --------
    >>> x = np.array([[1.0, 2.0], [-3.0, 0.0], [2.0, -2.0]])
    >>> W, gamma = np.array([[1.0, 5.0], [2.0, -1.0]]), np.array([1.0, 3.0])
    >>> W_hat = reparameterized_weight(W, x.T @ x / 3, gamma)
    >>> np.allclose(x @ W_hat, forward(x @ W, gamma, eps=0))
    True
    """
    var = np.sum(W * (S @ W), axis=0)
    W_hat: Array = W * (gamma / np.sqrt(var + eps))
    return W_hat


def reparameterized_backward(
    dW_hat: Array, W: Array, S: Array, gamma: Array, eps: float = 0
) -> tuple[Array, Array]:
    """Backward pass of `reparameterized_weight`: through a batch norm without looking at a batch.

    Parameters
    ----------
    dW_hat : ndarray, shape (inputs, features)
        dl/dW_hat: ``x.T @ dout`` for ``y = x @ W_hat``.
    W, S, gamma, eps
        As in `reparameterized_weight`.

    Returns
    -------
    dW : ndarray, shape (inputs, features)
        dl/dW.
    dgamma : ndarray, shape (features,)
        dl/dgamma.

    Raises
    ------
    ValueError
        dW_hat has not W's shape.

    Notes
    -----
    For one column, with invstd = (w^T S w + eps)^(-1/2) and what = gamma invstd w, S being
    symmetric::

        dinvstd/dw = -(1/2) invstd^3 d(w^T S w)/dw = -invstd^3 S w

        dl/dgamma = dl/dwhat^T invstd w
        dl/dw     = gamma invstd dl/dwhat + gamma (dl/dwhat^T w) dinvstd/dw
                  = gamma invstd (dl/dwhat - invstd dl/dgamma S w)

    Multiplied by w^T this gives gamma dl/dgamma (1 - invstd^2 w^T S w), which is 0 for eps = 0:
    the gradient is at right angles to the weight, whose length does not count.

    Examples
    --------
    >>> x = np.array([[1.0, 2.0], [-3.0, 0.0], [2.0, -2.0]])
    >>> W, gamma = np.array([[1.0, 5.0], [2.0, -1.0]]), np.array([1.0, 3.0])
    >>> dout = np.array([[1.0, 0.0], [2.0, -1.0], [4.0, 3.0]])
    >>> dW, dgamma = reparameterized_backward(x.T @ dout, W, x.T @ x / 3, gamma)
    >>> dx, same_dgamma, _ = backward_closed_form(dout, x @ W, gamma, eps=0)
    >>> np.allclose(dW, x.T @ dx), np.allclose(dgamma, same_dgamma)
    (True, True)
    """
    if np.shape(dW_hat) != W.shape:
        raise ValueError(f"dW_hat must have the shape {W.shape} of W, got {np.shape(dW_hat)}")
    SW = S @ W
    invstd = 1 / np.sqrt(np.sum(W * SW, axis=0) + eps)
    dgamma = np.sum(dW_hat * W, axis=0) * invstd
    dW = gamma * invstd * (dW_hat - invstd * dgamma * SW)
    return dW, dgamma


def weight_norm(W: Array, g: Array) -> Array:
    """Weight normalization: every column of the length g, whatever the inputs.

    Parameters
    ----------
    W : ndarray, shape (inputs, features)
        The weight of ``x @ W``, a column per feature.
    g : ndarray, shape (features,)
        The lengths.

    Returns
    -------
    ndarray, shape (inputs, features)
        ``g w/|w|`` in every column; nan in a column of zeros, which has no direction.

    Notes
    -----
    This is `reparameterized_weight` with S = I and eps = 0, since ``w^T I w = |w|^2``. It is batch
    norm for inputs of mean 0 that are white, and needs no batch [1]_::

        what = g w / sqrt(w^T I w) = g w / |w|

    References
    ----------
    .. [1] Salimans and Kingma, 2016, equation 2.

    Examples
    --------
    >>> weight_norm(np.array([[3.0, 0.0], [4.0, 2.0]]), np.array([10.0, 1.0])).tolist()
    [[6.0, 0.0], [8.0, 1.0]]
    """
    W_hat: Array = W * (g / np.sqrt(np.sum(W**2, axis=0)))
    return W_hat


def _default_step(x: Array) -> Any:
    """Balance the two errors of the 4th-order difference; see `check_gradient`."""
    scale = max(np.std(x), np.abs(x).mean() / 10) or 1
    exponent = np.round(np.log2(np.finfo(x.dtype).eps) / 5 + np.log2(scale))
    return np.ldexp(x.dtype.type(1), int(exponent))


def check_gradient(
    function: Callable[[Array], Array],
    x: Array,
    dout: Array,
    dx: Array,
    *,
    step: float | None = None,
) -> Array:
    """Compare a gradient with finite differences, entry by entry.

    Parameters
    ----------
    function : callable
        Takes an array like x and returns y; it is called four times per entry of x.
    x : ndarray
        Where to differentiate, any shape. Floating point; its dtype is the precision of the check.
    dout : ndarray
        dl/dy, of y's shape. Take it at random: for ones, dx of a batch norm is 0 and hides errors.
    dx : ndarray
        The gradient to check, of x's shape.
    step : float, optional
        The distance h of the differences. By default about u^(1/5) * scale, where u is the
        precision of x's dtype and scale the standard deviation of all of x, but at least a tenth of
        the mean absolute value (for a gamma of nearly equal entries), or 1 if x is 0. Pass a step
        where single features vary far less than that.

    Returns
    -------
    ndarray
        ``|numeric - dx|``, of x's shape: an absolute error, in the units of dx.

    Raises
    ------
    ValueError
        dx does not have x's shape, or dout not y's.

    Notes
    -----
    The loss is l(x) = sum(function(x) * dout), so that dl/dy is dout. Along one entry of x, by
    Taylor's theorem, with derivatives of l at x::

        D(h)  = l(x + h) - l(x - h)   = 2 h l' + (h^3/3) l''' + (h^5/60) l''''' + ...
        D(2h) = l(x + 2h) - l(x - 2h) = 4 h l' + (8 h^3/3) l''' + (32 h^5/60) l''''' + ...

        (8 D(h) - D(2h)) / (12 h) = l' - (h^4/30) l''''' + ...

    Rounding adds an error of about ``u |l| / h``. The sum of the two is least near h = u^(1/5), in
    units of the length over which l bends: h = 7e-4 in float64 and 2e-4 in 80-bit longdouble. The
    error is then about u^(4/5), or 3e-13 and 7e-16. The default is a power of two, so that x + h is
    as a rule exact. Differences are taken before the sum, so that what x's entry does not touch
    cancels.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> x, dout, gamma = rng.normal(size=(8, 3)), rng.normal(size=(8, 3)), rng.normal(size=3)
    >>> dx, dgamma, dbeta = backward_closed_form(dout, x, gamma)
    >>> bool((check_gradient(lambda x: forward(x, gamma), x, dout, dx) < 1e-10).all())
    True
    >>> bool((check_gradient(lambda x: forward(x, gamma), x, dout, 1.001 * dx) < 1e-10).any())
    False
    """
    _check_array("x", x)
    if np.shape(dx) != x.shape:
        raise ValueError(f"dx must have the shape of x, {x.shape}, but has {np.shape(dx)}")
    h = _default_step(x) if step is None else step

    def moved(index: tuple[int, ...], distance: float) -> Array:
        """Evaluate the function with one entry of x moved."""
        nearby = x.copy()
        nearby[index] += distance
        y = function(nearby)
        if np.shape(dout) != np.shape(y):
            raise ValueError(f"dout must have the shape {np.shape(y)} of y, got {np.shape(dout)}")
        return y

    numeric = np.empty_like(x)
    for index in np.ndindex(x.shape):
        near = moved(index, h) - moved(index, -h)
        far = moved(index, 2 * h) - moved(index, -2 * h)
        numeric[index] = np.sum((8 * near - far) * dout) / (12 * h)
    error: Array = np.abs(numeric - dx)
    return error
