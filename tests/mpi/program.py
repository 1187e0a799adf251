"""Run the programs of shards.py on MPI's ranks, with the seed that is given; rank 0 prints the
digests of all ranks."""

import sys
from pathlib import Path

from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[1]))

import shards

comm, seed = MPI.COMM_WORLD, int(sys.argv[1])
for program in shards.PROGRAMS:
    found = program(comm, seed)
digests = comm.gather(found)
if comm.Get_rank() == 0:
    print(comm.Get_size(), *digests)
