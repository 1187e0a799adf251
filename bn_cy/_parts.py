"""A part of a batch that is normalized by the statistics of the whole.

The parts may be on several ranks, or come one after the other. Either way a part is measured
(`moments`), the parts are pooled, and every part is normalized by the result; in the backward the
same happens to the two sums, between the pass that makes them and the one that needs them. What
`gradient_sums` and `input_gradient` are told by their arguments, a `PartCache` knows from the
forward.
"""

from dataclasses import dataclass

import numpy as np

from bn_cy._calls import Cache, part_forward, part_gradient, part_sums
from bn_cy._checks import checked_target
from bn_cy._layout import copy_all
from bn_cy._masks import Kept
from bn_cy._moments import Moments
from bn_cy._running import take_in

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
    residual : bool
        Whether there was one.
    local : Cache
        What the forward left: it keeps the parameters and the signs of y.
    kept : Kept or None
        Which positions count, with a mask.
    """

    x: np.ndarray
    moments: Moments
    residual: bool
    local: Cache
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

    @property
    def num_features(self):
        """How many features the batch has."""
        return self.local.num_features

    @property
    def scaled(self):
        """Whether there was a gamma."""
        return self.local.scaled

    @property
    def shifted(self):
        """Whether there was a beta."""
        return self.local.shifted

    @property
    def empty(self):
        """Whether the whole has no values."""
        return self.count == 0

    @classmethod
    def forward(cls, layer, x, moments, target, residual, kept=None):
        """Normalize x by the moments of the whole; return y and the cache."""
        out = target if kept is None else None
        y, local = part_forward(
            x, *moments, layer.gamma, layer.beta, layer.eps, layer.axis, out, layer.relu, residual
        )
        cache = cls(x, moments, residual is not None, local, kept)
        return cache._whole(y, target), cache

    def target(self, out, dout=None):
        """Return what a backward writes; None without a mask and an `out`."""
        if self.kept is None:
            return checked_target(out, self.x, dout=dout)
        return self.kept.target(out)

    def gradient_sums(self, dout):
        """Return sum(dout) and sum(dout*xhat) over this part, and what `input_gradients` needs.

        That is what counts of dout, and memory for dresidual, None without a residual.
        """
        if self.kept is not None:
            dout = self.kept.gather("dout", dout)
        sums, dresidual = part_sums(self.local, dout)
        return sums, (dout, dresidual)

    def input_gradients(self, dout, dresidual, sums, target):
        """Return dx, given the sums over the whole, and dresidual if there was a residual."""
        out = target if self.kept is None else None
        dx = self._whole(part_gradient(self.local, dout, dresidual, sums, out), target)
        return (dx, self._whole(dresidual, self.target(None))) if self.residual else (dx,)

    def _whole(self, rows, target):
        """Return a result of the shape of the batch: with a mask, 0 where nothing counts."""
        return rows if self.kept is None else self.kept.scatter(rows, target)


# Running statistics


def tracked_var(layer, moments):
    """Return the variance that the running one gets: divided by n - 1, if the layer is unbiased."""
    n = moments.count
    if not layer.unbiased:
        return moments.var
    with np.errstate(over="ignore"):
        return moments.var * (n / (n - 1))


def is_counted(layer, moments, update):
    """Tell whether a batch goes into a layer's running statistics; refuse one that must not."""
    if not (update and layer.track_running_stats and moments.count > 0):
        return False
    var = tracked_var(layer, moments)
    finite = np.isfinite(var).all()
    if not finite and layer.on_nonfinite == "raise":
        layer._refuse_batch(var)
    return finite or layer.on_nonfinite == "update"


def count_batches(layer, batches):
    """Take batches, given by their moments, into the running statistics, as the kernels do."""
    with layer._lock:
        mean, var = layer.running_mean.copy(), layer.running_var.copy()
        tracked = layer.num_batches_tracked
        for moments in batches:
            tracked += 1
            weight = 1 / tracked if layer.momentum is None else layer.momentum
            take_in(mean, var, moments.mean, tracked_var(layer, moments), weight, 1)
        new = [mean, var, np.array(min(tracked, MOST_TRACKED), np.int64)]
        copy_all(new, [layer.running_mean, layer.running_var, layer._tracked])
