"""A part of a batch that is normalized by the statistics of the whole.

The parts may be on several ranks, or come one after the other. Either way a part is measured
(`moments`), the parts are pooled, and every part is normalized by the result; in the backward the
same happens to the two sums (`gradient_sums`), between the pass that makes them and the one that
needs them (`input_gradient`).
"""

from dataclasses import dataclass

import numpy as np

from bn_cy import functional
from bn_cy._layout import as_float_dtype, as_output, axis_of, copy_all
from bn_cy._masks import Kept
from bn_cy._moments import Moments

MOST_TRACKED = 2**63 - 1


@dataclass(frozen=True, eq=False)
class PartCache:
    """What the forward of a part leaves for its backward: x by reference, and O(features) numbers.

    Attributes
    ----------
    x : array
        This part of the batch, or what counts of it.
    moments : Moments
        Those of the whole batch.
    gamma, beta : array or None
        Copies of the parameters.
    eps, axis, relu, residual
        Those of the forward; whether there was a residual.
    local : Cache
        What `frozen_forward` left: it keeps the signs of y.
    kept : Kept or None
        Which positions count, with a mask.
    """

    x: np.ndarray
    moments: Moments
    gamma: np.ndarray | None
    beta: np.ndarray | None
    eps: float
    axis: int
    relu: bool
    residual: bool
    local: functional.Cache
    kept: Kept | None = None

    @property
    def count(self):
        """Values per feature in the whole."""
        return self.moments.count

    @property
    def mean(self):
        """A copy of the means."""
        return self.moments.mean.copy()

    @property
    def var(self):
        """A copy of the variances."""
        return self.moments.var.copy()

    @classmethod
    def forward(cls, layer, x, moments, target, residual, kept=None):
        """Normalize x by the moments of the whole; return y and the cache."""
        gamma, beta = (None if row is None else row.copy() for row in (layer.gamma, layer.beta))
        then = {"axis": layer.axis, "relu": layer.relu}
        out = target if kept is None else None
        y, local = functional.frozen_forward(
            x, *moments[1:], gamma, beta, layer.eps, out=out, residual=residual, **then
        )
        added = residual is not None
        cache = cls(
            x, moments, gamma, beta, layer.eps, **then, residual=added, local=local, kept=kept
        )
        return cache.whole(y, target), cache

    def whole(self, rows, target):
        """Return a result of the shape of the batch: with a mask, 0 where nothing counts."""
        return rows if self.kept is None else self.kept.scatter(rows, target)

    def target(self, out):
        """Return what a backward writes; None without a mask and an `out`."""
        return checked_target(out, self.x) if self.kept is None else self.kept.target(out)

    def gate(self, dout):
        """Return what of dout counts, and passes the ReLU behind a residual.

        Behind a residual it is returned twice: it is dresidual, too.
        """
        if self.kept is not None:
            dout = self.kept.gather("dout", dout)
        if not self.residual:
            return (dout,)
        *_, dresidual = functional.batchnorm_backward(dout, self.local)
        return dresidual, dresidual

    def gradient_sums(self, dout):
        """Return sum(dout) and sum(dout*xhat) over this part."""
        mean, var = self.moments[1:]
        return functional.gradient_sums(
            dout, self.x, mean, var, self.eps, gamma=self.gamma, **self._then
        )

    def input_gradient(self, dout, sums, target):
        """Return dx, given the sums over the whole."""
        count, mean, var = self.moments
        out = target if self.kept is None else None
        dx = functional.input_gradient(
            dout, self.x, mean, var, self.gamma, self.eps, *sums, count, out=out, **self._then
        )
        return self.whole(dx, target)

    @property
    def _then(self):
        """What follows, for the verbs; behind a residual `gate` has seen to the ReLU."""
        relu = self.relu and not self.residual
        return {"axis": self.axis, "relu": relu, "beta": self.beta}


# Running statistics


def is_counted(layer, moments, update):
    """Tell whether a batch goes into a layer's running statistics; refuse one that must not."""
    finite = np.isfinite(moments.var).all()
    tracks = update and layer.track_running_stats and moments.count > 0
    if tracks and not finite and layer.on_nonfinite == "raise":
        layer._refuse_batch(moments.var)
    return tracks and (finite or layer.on_nonfinite == "update")


def count_batches(layer, batches):
    """Take batches, given by their moments, into the running statistics, as the kernels do."""
    with layer._lock:
        mean, var, tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
        for n, batch_mean, batch_var in batches:
            tracked += 1
            weight = 1 / tracked if layer.momentum is None else layer.momentum
            mean = averaged(mean, batch_mean, weight)
            var = averaged(var, batch_var * (n / (n - 1)) if layer.unbiased else batch_var, weight)
        new = [mean, var, np.array(min(tracked, MOST_TRACKED), np.int64)]
        copy_all(new, [layer.running_mean, layer.running_var, layer._tracked])


def averaged(running, batch, weight):
    """Return a running statistic after a batch; its twin is `average` in kernels/moments.pxi."""
    if weight == 0:
        return running.copy()
    if weight == 1:
        return batch.copy()
    with np.errstate(invalid="ignore"):
        return running + weight * (batch - running)


# Checks, made of all parts before anything is written


def check_batch(x, axis):
    """Refuse an array that is no batch of float32 or float64 with such an axis."""
    axis_of(x, axis)
    as_float_dtype("x", x.dtype.newbyteorder("="))


def check_like(name, array, x):
    """Refuse an array of another shape or dtype than x."""
    if array.shape != x.shape or array.dtype.char != x.dtype.char:
        raise ValueError(
            f"{name} must have the shape {x.shape} and dtype {x.dtype} of x, "
            f"got {array.shape} and {array.dtype}"
        )


def checked_target(out, x):
    """Return the memory of an `out`, which can be written beside x; None for none."""
    if out is None:
        return None
    array = as_output(out)
    check_like("out", array, x)
    if not array.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    if np.shares_memory(array, x):
        raise ValueError("out may not share memory with x")
    return array
