"""The page's arithmetic in NumPy: the same operations in the same order, and so the same bits.

NumPy sums in an order of its own, and `bn_cy.reference` with it. The page, `arithmetic.js`, sums
from the first row to the last, and rounds after every operation when it computes in float32. So
does this module, in the dtype of what it is given, so that the page can be held to it bit by bit.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["steps", "variances"]

Array = NDArray[Any]


def _total(rows: Array) -> Array:
    """Sum over the rows, from the first to the last."""
    total: Array = np.zeros(rows.shape[1], rows.dtype)
    for row in rows:
        total = total + row
    return total


def steps(x: Array, gamma: Array, beta: Array, dout: Array, eps: float = 1e-5) -> dict[str, Array]:
    """Run the nine steps forward and backward, with sums in the order of the rows.

    Parameters
    ----------
    x, dout : ndarray, shape (n, features)
        The batch and the upstream gradient, of one dtype, which is that of every operation.
    gamma, beta : ndarray, shape (features,)
        Scale and shift, of the same dtype.
    eps : float, optional
        Added to the variance, after it was rounded to the dtype.

    Returns
    -------
    dict
        Every value and every gradient under its name in `bn_cy.reference.staged_forward` and
        `staged_backward`.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [5.0], [7.0]], np.float32)
    >>> dout = np.array([[0.0], [9.0], [0.0], [0.0]], np.float32)
    >>> results = steps(x, np.array([2], np.float32), np.array([1], np.float32), dout, eps=4.0)
    >>> results["dx"].dtype, results["var"].item(), results["divar"].item()
    (dtype('float32'), 5.0, -18.0)
    """
    real = x.dtype.type
    n, two = real(len(x)), real(2)
    mu = _total(x) / n
    xmu = x - mu
    sq = xmu * xmu
    var = _total(sq) / n
    sqrtvar = np.sqrt(var + real(eps))
    ivar = real(1) / sqrtvar
    xhat = xmu * ivar
    gammax = gamma * xhat
    out = gammax + beta

    dgammax = dout
    dbeta = _total(dout)
    dxhat = gamma * dgammax
    dgamma = _total(dgammax * xhat)
    dxmu1 = dxhat * ivar
    divar = _total(dxhat * xmu)
    dsqrtvar = -divar / (sqrtvar * sqrtvar)
    dvar = dsqrtvar / (two * sqrtvar)
    dsq = np.broadcast_to(dvar / n, x.shape)
    dxmu2 = two * xmu * dsq
    dxmu = dxmu1 + dxmu2
    dx1 = dxmu
    dmu = -_total(dxmu)
    dx2 = np.broadcast_to(dmu / n, x.shape)
    dx = dx1 + dx2
    return {name: value for name, value in locals().items() if isinstance(value, np.ndarray)}


def variances(x: Array) -> dict[str, Array]:
    """Compute the variance of every feature in three ways, with sums in the order of the rows.

    Parameters
    ----------
    x : ndarray, shape (n, features)
        The batch; its dtype is that of every operation.

    Returns
    -------
    dict
        "one_pass" E[x^2] - E[x]^2; "two_pass" the mean square of x - mean; "shifted"
        E[d^2] - E[d]^2 of d = x - x[0].

    Notes
    -----
    The first loses its digits to the square of the mean. The second keeps the square of the error
    of the mean, which is about u |mean| in a precision of u. The third subtracts values of about
    the same size, whose difference is exact.

    Examples
    --------
    >>> x = np.array([[10000.0], [10001.0], [10003.0]], np.float32)
    >>> {name: f"{var[0]:.3f}" for name, var in variances(x).items()}
    {'one_pass': '0.000', 'two_pass': '1.556', 'shifted': '1.556'}
    """
    n = x.dtype.type(len(x))

    def one_pass(values: Array) -> Array:
        mean = _total(values) / n
        var: Array = _total(values * values) / n - mean * mean
        return var

    xmu = x - _total(x) / n
    return {
        "one_pass": one_pass(x),
        "two_pass": _total(xmu * xmu) / n,
        "shifted": one_pass(x - x[0]),
    }
