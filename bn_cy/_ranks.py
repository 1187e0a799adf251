"""`Ranks`: the processes that share a batch, and how their numbers are put together.

MPI's own sum over ranks would not do. It promises no order, so neither the same bits in the next
run nor on all ranks; and a sum of squares loses the digits where a mean is large.
"""

import numpy as np

from bn_cy._moments import Moments, pooled

METHODS = ("Get_rank", "Get_size", "Allgather", "Alltoall", "Bcast")  # that a communicator needs
FAILED = -1  # in place of a count
ERRORS = (TypeError, ValueError, FloatingPointError, MemoryError, RuntimeError)  # the last: others
ERROR_BYTES = 2000  # of an error's message that other ranks get


class Ranks:
    """The processes that share a batch, and how rows of one number a feature are put together.

    Every rank does so for a share of the features: an Alltoall brings it their numbers from all
    ranks, it combines them in rank order, and an Allgather gives all ranks the results. So every
    rank has the same bits, whatever order MPI sends messages in; and a rank sends and receives as
    much as there are features, not times the number of ranks, as with an Allgather alone.
    """

    def __init__(self, comm, features):
        missing = [name for name in METHODS if not callable(getattr(comm, name, None))]
        if missing:
            raise TypeError(
                f"comm must be a communicator with mpi4py's methods {', '.join(METHODS)}, "
                f"got {type(comm).__name__}, which has no {', '.join(missing)}"
            )
        self.comm = comm
        self.features = features
        self.agreed = False

    def __deepcopy__(self, memo):
        """Share it: a communicator cannot be copied by one rank alone."""
        return self

    def __reduce__(self):
        """Be None in a pickle: a communicator means nothing in another process."""
        return type(None), ()

    def pool_moments(self, part, failure):
        """Return the moments of all ranks; raise on all of them where one has failed."""
        count, rows = (0, None) if part is None else (part.count, part[1:])
        counts, (mean, var) = self._combine(count, rows, pool, failure)
        return Moments(int(sum(counts)), mean, var)

    def add(self, rows, failure):
        """Return the sums of two rows over all ranks; raise on all of them where one failed."""
        _, sums = self._combine(0, rows, lambda _, parts: parts.sum(axis=0), failure)
        return sums

    def _combine(self, count, rows, combine, failure):
        """Return the counts of all ranks, and what `combine` makes of two rows of each.

        `combine` gets the counts and an array of (ranks, 2, share of the features).
        """
        self._agree()
        size = self.comm.Get_size()
        share = -(-self.features // size)
        padded = np.zeros((2, size * share))
        if failure is None:
            padded[:, : self.features] = rows
        sent = np.empty((size, 1 + 2 * share))
        sent[:, 0] = count if failure is None else FAILED
        sent[:, 1:] = padded.reshape(2, size, share).swapaxes(0, 1).reshape(size, -1)
        received = np.empty_like(sent)
        self.comm.Alltoall(sent, received)
        counts = [int(number) for number in received[:, 0]]
        if FAILED in counts:
            self._raise_alike(counts.index(FAILED), failure)
        combined = np.ascontiguousarray(combine(counts, received[:, 1:].reshape(size, 2, share)))
        shares = np.empty((size, 2, share))
        self.comm.Allgather(combined, shares)
        return counts, shares.swapaxes(0, 1).reshape(2, -1)[:, : self.features].copy()

    def _agree(self):
        """Refuse, once, layers of different widths: the messages of one would not fit another."""
        if self.agreed:
            return
        widths = np.empty(self.comm.Get_size(), np.int64)
        self.comm.Allgather(np.array([self.features], np.int64), widths)
        if (widths != self.features).any():
            raise ValueError(
                f"num_features must be the same on all ranks, got {sorted(set(widths.tolist()))}"
            )
        self.agreed = True

    def _raise_alike(self, rank, failure):
        """Raise the error of a rank on all of them."""
        text = np.zeros(ERROR_BYTES, np.uint8)
        if rank == self.comm.Get_rank():
            kind = next((i for i, kind in enumerate(ERRORS) if isinstance(failure, kind)), -1)
            words = f"{kind} rank {rank}: {failure}".encode()[:ERROR_BYTES]
            text[: len(words)] = np.frombuffer(words, np.uint8)
        self.comm.Bcast(text, root=rank)
        kind, _, message = text.tobytes().rstrip(b"\0").decode(errors="ignore").partition(" ")
        raise ERRORS[int(kind)](message) from failure


def pool(counts, parts):
    """Return the means and variances of the whole; parts: (ranks, mean and var, features)."""
    mean, _, var = pooled(counts, parts[:, 0], np.zeros_like(parts[:, 0]), parts[:, 1])
    return np.array([mean, var])
