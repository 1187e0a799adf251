"""`recalibrate`: running statistics that are those of a data set."""

import numpy as np

from bn_cy._arguments import as_plain
from bn_cy._attributes import places
from bn_cy._checks import check_several, naming
from bn_cy._layout import copy_all
from bn_cy._moments import Moments
from bn_cy._parts import tracked_var
from bn_cy.functional import moments
from bn_cy.layer import BatchNorm

__all__ = ["recalibrate"]


def recalibrate(layer, batches):
    """Set a layer's running statistics to the exact ones of a data set that comes in batches.

    In training they are averages over batches, in which recent ones weigh most, a small last one
    weighs as much as any, and the spread of the means of the batches is missing. Here the mean
    and the variance are those of all values together.

    Parameters
    ----------
    layer : BatchNorm
        Its mode does not matter.
    batches : iterable of arrays
        What the layer gets as `x`, of any sizes; looked at once, one after the other. Empty ones
        and those of a single value are welcome.

    Raises
    ------
    FloatingPointError
        If a batch has NaN or infinity, or a variance that overflows, and the layer's
        `on_nonfinite` is "raise"; "skip" leaves it out, "update" counts it. Also if that of all
        batches together overflows.
    RuntimeError
        If the layer has no running statistics.
    TypeError, ValueError
        If the layer is no `BatchNorm`, if a batch does not fit, as in `BatchNorm.forward`, or if
        all of them hold less than two values per feature.

    Notes
    -----
    Whatever is raised, by the iterable, too, the layer is unchanged. `num_batches_tracked` becomes
    the number of batches that were counted, so that with ``momentum=None`` a training that goes on
    weighs them as if it had seen them. The running variance is divided by n - 1, n being the number
    of all values, or by n, as the layer's `unbiased` says.

    In a network with several such layers, recalibrate them from the first to the last: the input
    of a layer depends on those below it.

    Everything in a batch counts. Of a padded one pass what counts, as a batch of rows:
    ``np.moveaxis(x, layer.axis, -1)[mask]``, where the layer's `axis` is 1 or -1.

    A `SyncBatchNorm` is recalibrated on each rank alone, by the batches it is given there: give all
    ranks the same ones.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> layer = bn_cy.BatchNorm(1, unbiased=False)
    >>> bn_cy.recalibrate(layer, [np.array([[1.0], [2.0], [6.0]]), np.array([[7.0]])])
    >>> layer.running_mean, layer.running_var, layer.num_batches_tracked
    (array([4.]), array([6.5]), 2)
    """
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"layer must be a BatchNorm, got {type(layer).__name__}")
    if not layer.track_running_stats:
        raise RuntimeError("this layer has no running statistics that could be set")
    check_several("batches", batches)
    sizes = []
    whole = Moments.sum(_measured(layer, batches, sizes))
    if whole.count < 2:
        raise ValueError(f"batches must hold two values per feature or more, got {whole.count}")
    var = tracked_var(layer, whole)
    if layer.on_nonfinite != "update":  # finite parts may be too far from one another
        _check_finite("the whole of the batches", var)
    found = [whole.mean, var, np.array(len(sizes), np.int64)]
    with layer._lock:
        copy_all(found, [layer.running_mean, layer.running_var, layer._tracked])


def _measured(layer, batches, sizes):
    """Yield the moments of the batches that count, and note their sizes."""
    yield Moments(0, np.zeros(layer.num_features), np.zeros(layer.num_features))
    for number, batch in enumerate(batches):
        with naming(f"batch {number}"):
            x = as_plain("x", batch)
            layer._check_features(x)
            part = moments(x, axis=layer.axis)
        if layer.on_nonfinite == "raise":
            _check_finite(f"batch {number}", part.var)
        counts = layer.on_nonfinite == "update" or np.isfinite(part.var).all()
        if part.count and counts:
            sizes.append(part.count)
            yield part


def _check_finite(what, var):
    wrong = np.flatnonzero(~np.isfinite(var))
    if wrong.size:
        raise FloatingPointError(
            f"{what} has NaN or infinity, or a variance that overflows, {places(wrong)}"
        )
