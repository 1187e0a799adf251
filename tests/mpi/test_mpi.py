"""`SyncBatchNorm` on processes, under mpiexec."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")
PROGRAM = Path(__file__).with_name("program.py")
TIMEOUT = 120


def mpiexec():
    """Return the mpiexec beside this Python, as the wheel `mpich` brings it, or another one."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which("mpiexec", path=folders)
    if not found:
        pytest.skip("there is no mpiexec: pip install mpich")
    return found


def run(size, *arguments):
    """Run the program on so many ranks; return the words it prints. A hang is an error."""
    process = subprocess.Popen(
        # mpi4py ends all ranks with the first that has an exception.
        [mpiexec(), "-n", str(size), sys.executable, "-m", "mpi4py", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"hangs; it said {out!r} and {err!r}")
    assert process.returncode == 0, err + out
    return out.split()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_that_are_processes(rng, size):
    ranks, *digests = run(size, PROGRAM, rng.integers(2**32))
    assert int(ranks) == len(digests) == size


def test_a_run_repeats_bit_for_bit(rng):
    seed = rng.integers(2**32)
    assert run(2, PROGRAM, seed) == run(2, PROGRAM, seed)


def test_processes_have_the_bits_of_threads(rng):
    import shards
    from ranks import on_threads

    seed = int(rng.integers(2**32))
    assert run(2, PROGRAM, seed)[1:] == on_threads(2, shards.digest, seed)
