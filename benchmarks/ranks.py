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


def least(comm, verbs, seconds):
    """Return the seconds of a call in the fastest round, for each verb; they take turns.

    A round has as many calls on all ranks, and lasts as long as its slowest rank. What else a
    machine does can only make a round longer.
    """
    calls = {name: calls_in(comm, verb, seconds / ROUNDS) for name, verb in verbs.items()}
    rounds = {name: [] for name in verbs}
    for _ in range(ROUNDS):
        for name, verb in verbs.items():
            comm.Barrier()
            start = time.perf_counter()
            for _ in range(calls[name]):
                verb()
            spent = comm.allreduce(time.perf_counter() - start, op=MPI.MAX)
            rounds[name].append(spent / calls[name])
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
    """Time a training step of the layer, the same without other ranks, and MPI's part of it."""
    rng = np.random.default_rng(comm.Get_rank())
    x, dout = rng.standard_normal((2, ROWS, features)).astype(np.float32)
    layer = bn_cy.SyncBatchNorm(features, comm=comm)
    alone = bn_cy.BatchNorm(features)
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
    return {"ranks": comm.Get_size(), "features": features, **least(comm, verbs, seconds)}


def main():
    bn_cy.set_num_threads(1)
    comm, seconds = MPI.COMM_WORLD, float(sys.argv[1])
    records = [measure(comm, features, seconds) for features in FEATURES]
    if comm.Get_rank() == 0:
        print(json.dumps(records))


if __name__ == "__main__":
    main()
