"""Ranks that are threads: a communicator with the methods of mpi4py that `SyncBatchNorm` uses."""

import threading

import numpy as np

TIMEOUT = 120  # seconds after which a rank that waits for others has been left alone


class ThreadComm:
    """One rank of a group of threads; what it sends lies in `board`, which they share."""

    def __init__(self, rank, board, barrier):
        self._rank, self._board, self._barrier = rank, board, barrier

    def Get_rank(self):
        return self._rank

    def Get_size(self):
        return len(self._board)

    def Allgather(self, sent, received):
        parts = self._exchange(sent)
        received[...] = np.reshape(parts, received.shape)

    def Alltoall(self, sent, received):
        size, rank = self.Get_size(), self._rank
        parts = [part.reshape(size, -1)[rank] for part in self._exchange(sent)]
        received[...] = np.reshape(parts, received.shape)

    def Bcast(self, array, root=0):
        array[...] = self._exchange(array)[root]

    def _exchange(self, sent):
        """Return what every rank sends. All have one shape, as MPI wants it."""
        self._board[self._rank] = sent.copy()
        self._barrier.wait(TIMEOUT)
        parts = list(self._board)
        self._barrier.wait(TIMEOUT)
        assert len({part.shape for part in parts}) == 1
        return parts


def on_threads(size, program, *arguments):
    """Run ``program(comm, *arguments)`` on ranks that are threads; return what each returned.

    An exception of a rank is raised, the first of those that are no consequence of another.
    """
    board, barrier = [None] * size, threading.Barrier(size)
    returned, raised = [None] * size, []

    def run(rank):
        try:
            returned[rank] = program(ThreadComm(rank, board, barrier), *arguments)
        except BaseException as error:
            raised.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if raised:
        raise raised[0]
    return returned
