"""The batch norm of the course CS231n, with the course's signatures, on compiled loops.

Stanford's assignment on batch normalization asks for these three functions, and other courses have
taken them over. Here they are for a network written for the course: the names, the arguments and
the numbers are the course's, the time is that of `bn_cy`. Momentum weighs the old value::

    running = momentum * running + (1 - momentum) * batch

The course divides the running variance by n, and starts both running statistics at zero. How the
derivatives come about is in `bn_cy.reference`, where `staged_backward` is the course's first
exercise and `backward_closed_form` its second.

References
----------
CS231n, "Deep Learning for Computer Vision", Stanford University, assignment 2,
https://cs231n.github.io
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bn_cy import functional
from bn_cy._arguments import as_real
from bn_cy._attributes import checked_weight

__all__ = ["batchnorm_backward", "batchnorm_backward_alt", "batchnorm_forward"]

Array = NDArray[Any]


def batchnorm_forward(
    x: Array, gamma: Array, beta: Array, bn_param: dict[str, Any]
) -> tuple[Array, functional.Cache]:
    """Batch normalization of rows of features, in training or in testing.

    Parameters
    ----------
    x : array of float32 or float64, shape (N, D)
        N examples of D features.
    gamma, beta : array of shape (D,)
        Scale and shift.
    bn_param : dict
        "mode": "train" or "test", required. "eps": added to the variance, 1e-5 by default.
        "momentum": the weight of the old value in the running statistics, 0.9 by default.
        "running_mean", "running_var": arrays of shape (D,), zeros where they are missing. In
        training they are replaced by new ones.

    Returns
    -------
    out : array of shape (N, D)
        The result, of x's dtype.
    cache : Cache
        For `batchnorm_backward`. In testing, where the course has none, it is that of constant
        statistics.

    Raises
    ------
    KeyError
        bn_param has no "mode".
    TypeError, ValueError
        The mode is another one, or an argument does not fit. One example alone has no variance to
        train with.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_cy import cs231n
    >>> x, bn_param = np.array([[1.0], [5.0]]), {"mode": "train", "eps": 0}
    >>> out, cache = cs231n.batchnorm_forward(x, np.ones(1), np.zeros(1), bn_param)
    >>> out.tolist(), bn_param["running_mean"].round(3).tolist()
    ([[-1.0], [1.0]], [0.3])
    >>> cs231n.batchnorm_backward(np.array([[1.0], [2.0]]), cache)[1:]
    (array([1.]), array([3.]))
    """
    mode = bn_param["mode"]
    eps = bn_param.get("eps", 1e-5)
    momentum = checked_weight('bn_param["momentum"]', bn_param.get("momentum", 0.9))
    mean, var = (_statistic(bn_param, name, x) for name in ("running_mean", "running_var"))
    if mode == "train":
        out, cache = functional.batchnorm_forward(x, gamma, beta, eps)
        if not cache.empty:
            mean = momentum * mean + (1 - momentum) * cache.mean
            var = momentum * var + (1 - momentum) * cache.var
    elif mode == "test":
        out, cache = functional.frozen_forward(x, mean, var, gamma, beta, eps)
    else:
        raise ValueError(f'bn_param["mode"] must be "train" or "test", got {mode!r}')
    bn_param["running_mean"], bn_param["running_var"] = mean, var
    return out, cache


def _statistic(bn_param: dict[str, Any], name: str, x: Array) -> Array:
    """Return a running statistic, zeros where there is none."""
    features = np.shape(x)[1:2]
    values = bn_param.get(name)
    if values is None:
        return np.zeros(features)
    array: Array = as_real(f'bn_param["{name}"]', values).astype(np.float64)
    if array.shape != features:
        raise ValueError(
            f'bn_param["{name}"] must have shape {features}, one value per feature, '
            f"got {array.shape}"
        )
    if name == "running_var" and (array < 0).any():
        raise ValueError(f'bn_param["{name}"] must not be negative, got {array.min()}')
    return array


def batchnorm_backward(dout: Array, cache: functional.Cache) -> tuple[Array, Array, Array]:
    """Gradients of `batchnorm_forward`.

    Parameters
    ----------
    dout : array of shape (N, D)
        The gradient with respect to the forward's result.
    cache : Cache
        From `batchnorm_forward`.

    Returns
    -------
    dx : array of shape (N, D)
        The gradient with respect to x.
    dgamma, dbeta : array of shape (D,)
        Those with respect to scale and shift.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    dx, dgamma, dbeta = functional.batchnorm_backward(dout, cache)
    return dx, dgamma, dbeta


def batchnorm_backward_alt(dout: Array, cache: functional.Cache) -> tuple[Array, Array, Array]:
    """`batchnorm_backward` under the name of the course's second exercise, the one line.

    The course compares the two for speed. The loops are those of the one line anyway, so that here
    both take the same time and give the same bits.

    Parameters
    ----------
    dout, cache
        As in `batchnorm_backward`.

    Returns
    -------
    dx, dgamma, dbeta
        As from `batchnorm_backward`.
    """
    return batchnorm_backward(dout, cache)
