"""One rank of scaling.py: times a layer's step and its exchanges; rank 0 prints JSON.

mpiexec -n 2 python -m mpi4py benchmarks/ranks.py SECONDS
"""

import json
import sys
import time

import numpy as np
from mpi4py import MPI

import bn_cy

ROWS = 32  # on a rank
FEATURES = (64, 256, 1024, 4096, 16384)
ROUNDS = 20


class Timed:
    """A communicator that notes the seconds that its methods take; the layer asks for no more."""

    def __init__(self, comm):
        self.Get_rank, self.Get_size = comm.Get_rank, comm.Get_size
        self.Alltoall, self.Allgather, self.Bcast = map(
            self._timed, (comm.Alltoall, comm.Allgather, comm.Bcast)
        )
        self.spent = 0.0

    def _timed(self, method):
        def call(*arguments, **options):
            start = time.perf_counter()
            method(*arguments, **options)
            self.spent += time.perf_counter() - start

        return call


def least(comm, timed, verbs, seconds):
    """Return the seconds of a call in the fastest round, and those of them in MPI, for each verb.

    Verbs take turns. A round has as many calls on all ranks, and lasts as long as its slowest rank.
    What else a machine does can only make a round longer.
    """
    calls = {name: calls_in(comm, verb, seconds / ROUNDS) for name, verb in verbs.items()}
    rounds = {name: [] for name in verbs}
    for _ in range(ROUNDS):
        for name, verb in verbs.items():
            timed.spent = 0.0
            comm.Barrier()
            start = time.perf_counter()
            for _ in range(calls[name]):
                verb()
            spent = (time.perf_counter() - start, timed.spent)
            slowest = max(comm.allgather(spent))
            rounds[name].append([value / calls[name] for value in slowest])
    return {name: min(values) for name, values in rounds.items()}


def calls_in(comm, verb, seconds):
    """Return how many calls take about so long, the same number on all ranks."""
    verb()
    comm.Barrier()
    start = time.perf_counter()
    verb()
    spent = comm.allreduce(time.perf_counter() - start, op=MPI.MAX)
    return max(1, min(1000, int(seconds / max(spent, 1e-6))))


def measure(comm, features, seconds):
    """Time a training step of the layer, the same without other ranks, and the exchange alone."""
    rng = np.random.default_rng(comm.Get_rank())
    x, dout = rng.standard_normal((2, ROWS, features)).astype(np.float32)
    timed = Timed(comm)
    layer, alone = bn_cy.SyncBatchNorm(features, comm=timed), bn_cy.BatchNorm(features)
    share = -(-features // comm.Get_size())
    sent = np.zeros((comm.Get_size(), 1 + 2 * share))
    received, result = np.empty_like(sent), np.empty((comm.Get_size(), 2 * share))

    def step(one):
        one.forward(x)
        one.backward(dout)

    def exchange():
        for _ in range(2):  # of the forward and of the backward
            comm.Alltoall(sent, received)
            comm.Allgather(sent[0, 1:], result)

    verbs = {"step": lambda: step(layer), "alone": lambda: step(alone), "exchange": exchange}
    found = least(comm, timed, verbs, seconds)
    times = {name: whole for name, (whole, _) in found.items()}
    return {"ranks": comm.Get_size(), "features": features, "mpi": found["step"][1], **times}


def main():
    bn_cy.set_num_threads(1)
    comm, seconds = MPI.COMM_WORLD, float(sys.argv[1])
    records = [measure(comm, features, seconds) for features in FEATURES]
    if comm.Get_rank() == 0:
        print(json.dumps(records))


if __name__ == "__main__":
    main()
