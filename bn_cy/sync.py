"""`SyncBatchNorm`: batch normalization of a batch that is spread over processes.

Training statistics are those of all ranks together. A rank measures its part (`moments`), the parts
are pooled, and every rank normalizes by the result; in the backward the same happens to the two
sums (`gradient_sums`), between the pass that makes them and the one that needs them
(`input_gradient`). What is exchanged between ranks is in `_ranks`.
"""

from dataclasses import dataclass

import numpy as np

from bn_cy import functional
from bn_cy._layout import as_output, as_plain, copy_all
from bn_cy._masks import Kept, kept_of
from bn_cy._moments import Moments
from bn_cy._ranks import Ranks
from bn_cy.layer import BatchNorm

__all__ = ["SyncBatchNorm"]

MOST_TRACKED = 2**63 - 1


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` whose training statistics are those of the batch on all ranks together.

    With a part of the batch on every rank it computes what one `BatchNorm` does with all of it.
    Parts may be of any sizes, and empty. In eval mode, and while it is frozen, it is a `BatchNorm`
    that needs no other rank.

    Parameters
    ----------
    num_features : int
        Length of the feature axis; the same on all ranks.
    comm : communicator of mpi4py, such as ``MPI.COMM_WORLD``
        The ranks that share the batch. Any object will do that has mpi4py's `Get_rank`,
        `Get_size`, `Allgather`, `Alltoall` and `Bcast` for NumPy arrays.
    **options
        As for `BatchNorm`. They should be the same on all ranks.

    Attributes
    ----------
    comm : communicator or None
        The same. Assign one to a layer that was unpickled.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    See Also
    --------
    BatchNorm : its methods and other attributes are those of this layer, too.

    Notes
    -----
    A forward and a backward in training are collective: all ranks call them, for the same layers in
    the same order, from one thread. Each is an all-reduce of 2C float64 numbers, C being the number
    of features, and a count, by an Alltoall and an Allgather: what a rank sends does not grow with
    the number of ranks, but for the count.

    Where a rank cannot go on, all ranks raise its error, with the number of the first such rank,
    and no layer has changed: a wrong number of features or dtype, an `out`, `residual` or `dout` of
    another shape, a missing array. So it is with NaN and infinity, as `on_nonfinite` says, and
    with a batch of a single value on all ranks together.

    Running statistics are the same bits on all ranks, and a run with the same parts on the same
    number of ranks repeats bit for bit. `dgamma` and `dbeta` are of the rank's own part, as in
    PyTorch: add them up over the ranks, or average them, with the gradients of other layers.
    The means of float64 data are rounded to float64, as in eval mode.

    A pickle leaves out the communicator. Copies share it.

    Examples
    --------
    Under ``mpiexec -n 4 python train.py``::

        from mpi4py import MPI
        layer = bn_cy.SyncBatchNorm(64, comm=MPI.COMM_WORLD)
        y = layer(x)  # x: this rank's part of the batch
        dx = layer.backward(dout)
    """

    def __init__(self, num_features, *, comm, **options):
        super().__init__(num_features, **options)
        self.comm = comm

    @property
    def comm(self):
        """The ranks that share the batch."""
        return None if self._ranks is None else self._ranks.comm

    @comm.setter
    def comm(self, comm):
        self._ranks = Ranks(comm, self._num_features)

    def forward(self, x, *, out=None, residual=None, update=True, mask=None, lengths=None):
        """Normalize this rank's part of a batch; in training, by the statistics of all ranks.

        Parameters
        ----------
        x, out, residual, update, mask, lengths
            As in `BatchNorm.forward`; `mask` and `lengths` are of this rank's part.

        Returns
        -------
        array of x's shape and dtype
            The result; `out`, if given.

        Raises
        ------
        FloatingPointError, TypeError, ValueError
            As `BatchNorm.forward`, on all ranks; `out` has not been written.
        RuntimeError
            In training, if the layer has no communicator.
        """
        if not self.training or self._frozen:
            given = {"out": out, "residual": residual, "update": update}
            return super().forward(x, **given, mask=mask, lengths=lengths)
        part = failure = None
        try:
            x, kept, target, residual = self._fitting(x, out, residual, mask, lengths)
            part = functional.moments(x, axis=self._axis)
        except Exception as error:  # the other ranks wait: they are told
            failure = error
        count, mean, var = self._need_ranks().pool_moments(part, failure)
        if count == 1:
            raise ValueError(
                "x must have two values per feature or more on all ranks together to have a "
                "variance, got one"
            )
        finite = np.isfinite(var).all()
        tracks = update and self.track_running_stats and count > 0
        if tracks and not finite and self._on_nonfinite == "raise":
            self._refuse_batch(var)
        y, cache = SyncCache.forward(self, x, Moments(count, mean, var), target, residual, kept)
        if tracks and (finite or self._on_nonfinite == "update"):
            self._count(count, mean, var)
        self._cache, self._cached_mode = cache, True
        return y if out is None else out

    __call__ = forward

    def _gradients(self, dout, cache, out):
        if not isinstance(cache, SyncCache):
            return super()._gradients(dout, cache, out)
        sums = failure = None
        try:
            target = cache.target(out)
            dout, *dresidual = cache.gate(dout)
            sums = cache.gradient_sums(dout)
        except Exception as error:
            failure = error
        whole = self._need_ranks().add(sums, failure)
        dbeta, dgamma = sums
        dx = cache.input_gradient(dout, whole, target)
        dresidual = [cache.whole(gradient, cache.target(None)) for gradient in dresidual]
        return dx if out is None else out, dgamma, dbeta, *dresidual

    def _check_cache(self, cache):
        super()._check_cache(cache.local if isinstance(cache, SyncCache) else cache)

    def _need_ranks(self):
        if self._ranks is None:
            raise RuntimeError(
                "this layer was unpickled and has no communicator: assign layer.comm, or use it "
                "in eval mode"
            )
        return self._ranks

    def _fitting(self, x, out, residual, mask, lengths):
        """Return what counts of x, its positions, what to write, and what counts of the residual.

        What `frozen_forward` would refuse is refused here, before other ranks have updated their
        running statistics.
        """
        x = as_plain("x", x)
        self._check_features(x)
        if residual is not None:
            residual = as_plain("residual", residual)
            check_like("residual", residual, x)
        kept = kept_of(x, self._axis, mask, lengths)
        if kept is None:
            return x, None, checked_target(out, x), residual
        rows, _, residual = kept.gathered(x, residual)
        return rows, kept, kept.target(out), residual

    def _count(self, count, mean, var):
        """Take a batch into the running statistics, as the kernels do."""
        if self.unbiased:
            var = var * (count / (count - 1))
        with self._lock:
            tracked = self.num_batches_tracked + 1
            weight = 1 / tracked if self._momentum is None else self._momentum
            new = [
                averaged(self.running_mean, mean, weight),
                averaged(self.running_var, var, weight),
                np.array(min(tracked, MOST_TRACKED), np.int64),
            ]
            copy_all(new, [self.running_mean, self.running_var, self._tracked])


def averaged(running, batch, weight):
    """Return a running statistic after a batch; its twin is `average` in kernels/moments.pxi."""
    if weight == 0:
        return running.copy()
    if weight == 1:
        return batch.copy()
    with np.errstate(invalid="ignore"):
        return running + weight * (batch - running)


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


@dataclass(frozen=True, eq=False)
class SyncCache:
    """What a forward over ranks leaves for its backward: x by reference, and O(features) numbers.

    Attributes
    ----------
    x : array
        This rank's part of the batch, or what counts of it.
    moments : Moments
        Those of the batch on all ranks.
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
    kept: Kept | None

    count = property(lambda cache: cache.moments.count, doc="Values per feature on all ranks.")
    mean = property(lambda cache: cache.moments.mean.copy(), doc="A copy of the means.")
    var = property(lambda cache: cache.moments.var.copy(), doc="A copy of the variances.")

    @classmethod
    def forward(cls, layer, x, moments, target, residual, kept):
        """Normalize x by the moments of all ranks; return y and the cache."""
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
        """Return sum(dout) and sum(dout*xhat) over this rank's part."""
        mean, var = self.moments[1:]
        return functional.gradient_sums(
            dout, self.x, mean, var, self.eps, gamma=self.gamma, **self._then
        )

    def input_gradient(self, dout, sums, target):
        """Return dx, given the sums over all ranks."""
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
