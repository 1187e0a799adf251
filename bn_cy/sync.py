"""`SyncBatchNorm`: batch normalization of a batch that is spread over processes.

Training statistics are those of all ranks together. What a rank does with its part of the batch is
in `_parts`; what is exchanged between ranks is in `_ranks`.
"""

from bn_cy import functional
from bn_cy._arguments import as_flag, as_plain
from bn_cy._attributes import checked
from bn_cy._calls import Cache
from bn_cy._checks import check_apart_from_layer, check_like, checked_target
from bn_cy._masks import kept_of
from bn_cy._parts import PartCache, count_batches, is_counted
from bn_cy._ranks import Ranks
from bn_cy.layer import BatchNorm

__all__ = ["SyncBatchNorm"]


def without_groups(size):
    """Refuse a ghost_batch_size."""
    if size is not None:
        raise ValueError(
            f"ghost_batch_size must be None where statistics are those of all ranks, got {size}"
        )


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
        As for `BatchNorm`, without ``ghost_batch_size``. They should be the same on all ranks.

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
    another shape, an `out` in memory that is still needed, a missing array. So it is with NaN and
    infinity, as ``on_nonfinite`` says, and with a batch of a single value on all ranks together.
    But a rank whose backward finds no forward raises alone, and the others wait.

    Running statistics are the same bits on all ranks, and a run with the same parts on the same
    number of ranks repeats bit for bit. ``dgamma`` and ``dbeta`` are of the rank's own part, as in
    PyTorch: add them up over the ranks, or average them, with the gradients of other layers.
    The means of float64 data are rounded to float64, as in eval mode.

    A pickle leaves out the communicator. Copies share it. `recalibrate` is local to each rank: give
    all ranks the same batches.

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

    _cache_types = (Cache, PartCache)
    ghost_batch_size = checked(
        "ghost_batch_size", without_groups, "None: the batch is one, that of all ranks."
    )

    def _arguments(self):
        return {"comm": self.comm, **super()._arguments()}

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
            update = as_flag("update", update)
            x, kept, target, residual = self._fitting(x, out, residual, mask, lengths)
            part = functional.moments(x, axis=self._axis)
        except Exception as error:  # the other ranks wait: they are told
            failure = error
        whole = self._need_ranks().pool_moments(part, failure)
        if whole.count == 1:
            raise ValueError(
                "x must have two values per feature or more on all ranks together to have a "
                "variance, got one"
            )
        counted = is_counted(self, whole, update)
        y, cache = PartCache.forward(self, x, whole, target, residual, kept)
        if counted:
            count_batches(self, [whole])
        self._cache, self._cached_mode = cache, True
        return y if out is None else out

    def _gradients(self, dout, cache, out):
        if not isinstance(cache, PartCache):
            return super()._gradients(dout, cache, out)
        sums = failure = None
        try:
            dout = as_plain("dout", dout)
            target = cache.target(out, dout)
            check_apart_from_layer(target, self)
            sums, upstream = cache.gradient_sums(dout)
        except Exception as error:
            failure = error
        whole = self._need_ranks().add(sums, failure)
        dbeta, dgamma = sums
        dx, *dresidual = cache.input_gradients(*upstream, whole, target)
        return dx if out is None else out, dgamma, dbeta, *dresidual

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
            target = checked_target(out, x, residual=residual)
        else:
            target = kept.target(out)
            x, _, residual = kept.gathered(x, residual)
        check_apart_from_layer(target, self)
        return x, kept, target, residual
