"""`moments` and `normalize` for Dask arrays, which may be larger than memory; the extra ``dask``.

Both are lazy, as functions of Dask are. A chunk is measured by the compiled loops, and chunks are
put together by Dask's own tree reduction, so that no more of the array is in memory than the
chunks that are being worked on. Features may be in several chunks, too.

Dask works on several chunks at a time, each of which would use several threads: leave one to each,
by ``bn_cy.set_num_threads(1)``, unless chunks are few.
"""

import math
from functools import partial

import dask.array as da
import numpy as np

from bn_cy import functional
from bn_cy._arguments import as_flag
from bn_cy._checks import check_batch, native
from bn_cy._layout import axis_of
from bn_cy._moments import Moments

__all__ = ["moments", "normalize"]

MEASURED = np.dtype([("count", np.int64), ("mean", np.float64), ("var", np.float64)])


def moments(x, *, axis=1):
    """Count, mean and biased variance of every feature, in one pass over the chunks.

    Parameters
    ----------
    x : dask.array.Array of float32 or float64, two dimensions or more
        The batch, in chunks of any sizes, which need not be known.
    axis : int, optional
        The feature axis.

    Returns
    -------
    Moments
        `mean` and `var` are Dask arrays of shape (features,), and so is `count`, without
        dimensions, where the sizes of chunks are not known. ``dask.compute`` makes the numbers.

    Raises
    ------
    TypeError, ValueError
        If `x` is no Dask array of float32 or float64, or `axis` does not fit.

    Examples
    --------
    >>> import bn_cy.dask
    >>> import dask
    >>> import dask.array as da
    >>> x = da.arange(8, chunks=3).reshape(8, 1).astype(float)
    >>> (found,) = dask.compute(bn_cy.dask.moments(x))
    >>> found
    Moments(count=8, mean=array([3.5]), var=array([5.25]))
    """
    feature = _feature_axis(x, axis)
    found = da.reduction(
        x,
        partial(_measure, feature=feature),
        partial(_merge, feature=feature),
        axis=tuple(i for i in range(x.ndim) if i != feature),
        dtype=MEASURED,
        meta=np.empty(0, MEASURED),
    )
    others = math.prod(x.shape[:feature] + x.shape[feature + 1 :])
    count = found["count"][0] if math.isnan(others) else others
    return Moments(count, found["mean"], found["var"])


def normalize(x, mean, var, gamma=None, beta=None, eps=1e-5, *, axis=1, relu=False):
    """Normalize every feature by a given mean and variance, chunk by chunk.

    Parameters
    ----------
    x : dask.array.Array of float32 or float64, two dimensions or more
        The batch.
    mean, var : array or Dask array of shape (features,)
        The statistics, such as those of `moments`. Of an array that is larger than memory, compute
        them first: in one graph with the array, Dask would keep its chunks for the second pass.
    gamma, beta : array or Dask array of shape (features,), optional
        Scale and shift.
    eps, axis, relu
        As in `bn_cy.normalize`.

    Returns
    -------
    dask.array.Array of x's shape and dtype
        ``gamma*(x - mean)/sqrt(var + eps) + beta``, after a ReLU if there is one. In x's chunks;
        those of the features are cut where a row that is a Dask array has others.

    Raises
    ------
    TypeError, ValueError
        As `moments`, and if a row has another shape.

    Examples
    --------
    >>> import bn_cy.dask
    >>> import dask.array as da
    >>> x = da.from_array([[1.0], [5.0]], chunks=1)
    >>> _, mean, var = bn_cy.dask.moments(x)
    >>> bn_cy.dask.normalize(x, mean, var, eps=0).compute()
    array([[-1.],
           [ 1.]])
    """
    feature = _feature_axis(x, axis)
    rows = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
    present = {name: da.asarray(row) for name, row in rows.items() if row is not None}
    for name, row in present.items():
        if row.shape != (x.shape[feature],):
            raise ValueError(
                f"{name} must have shape ({x.shape[feature]},), one value per feature, "
                f"got {row.shape}"
            )
    axes = tuple(range(x.ndim))
    return da.blockwise(
        partial(_normalize, tuple(present), eps=eps, axis=feature, relu=as_flag("relu", relu)),
        axes,
        x,
        axes,
        *(argument for row in present.values() for argument in (row, (feature,))),
        dtype=native(x.dtype),
        meta=np.empty((0,) * x.ndim, native(x.dtype)),
    )


def _feature_axis(x, axis):
    if not isinstance(x, da.Array):
        raise TypeError(f"x must be a Dask array, got {type(x).__name__}")
    check_batch(x, axis)
    return axis_of(x, axis)


def _measure(x, axis, keepdims, *, feature):
    """Return the moments of a chunk as one record a feature, along its axis."""
    return _records(functional.moments(x, axis=feature), x.ndim, feature)


def _merge(records, axis, keepdims, *, feature):
    """Return the moments of several chunks together, from their records."""
    rows = np.moveaxis(records, feature, -1)
    parts = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    counts = parts["count"].max(axis=1, initial=0)  # that of every feature, if there is one
    whole = Moments.sum(
        Moments(int(n), p["mean"], p["var"]) for n, p in zip(counts, parts, strict=True)
    )
    merged = _records(whole, records.ndim, feature)
    return merged if keepdims else merged.reshape(-1)


def _records(found, ndim, feature):
    records = np.empty(len(found.mean), MEASURED)
    records["count"], records["mean"], records["var"] = found
    return records.reshape([-1 if i == feature else 1 for i in range(ndim)])


def _normalize(names, x, *rows, **options):
    return functional.normalize(x, **dict(zip(names, rows, strict=True)), **options)
