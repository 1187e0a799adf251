"""`SyncBatchNorm` on processes, under mpiexec."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")
PROGRAM = Path(__file__).with_name("program.py")
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_distributed.py"
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
    from thread_comm import on_threads

    seed = int(rng.integers(2**32))
    assert run(2, PROGRAM, seed)[1:] == on_threads(2, shards.digest, seed)


def test_the_page_runs_on_two_ranks(tmp_path):
    page = (PROGRAM.parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert any("SyncBatchNorm" in block for block in blocks)
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks))
    run(2, program)


# examples/train_distributed.py


@pytest.fixture
def example():
    for module in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(module)
    return EXAMPLE


def test_the_example_prints_a_table_and_draws(example, tmp_path):
    picture = tmp_path / "picture.png"
    words = run(3, example, "--steps", 3, "--seeds", 1, "--quiet", "--output", picture)
    table = " ".join(words)
    for name, images in [("local", 4), ("ghost", 8), ("synchronized", 12)]:
        assert table.count(f"{name} {images} ") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_with_synchronized_statistics_the_example_trains_as_one_rank_does(example, tmp_path):
    """The network of three ranks is, to rounding, that of one with all of the images."""
    program = tmp_path / "program.py"
    program.write_text(f"""\
import sys
sys.path.insert(0, {str(example.parent)!r})
import numpy as np
import train_digits as digits
import train_distributed as distributed
from mlp import SGD, SoftmaxCrossEntropy
from mpi4py import MPI

def trained(comm, x, labels):
    network = distributed.build_network(1, comm)
    optimizer = SGD(network, 0.1)
    for _ in range(4):
        distributed.train_step(network, SoftmaxCrossEntropy(), optimizer, comm, x, labels)
    return [parameter for layer in network.layers for parameter in layer.params.values()]

comm = MPI.COMM_WORLD
x, _, labels, _ = digits.load_data()
whole = np.arange(4 * comm.Get_size())
own = distributed.own_part(whole, labels, comm, True)
parts = trained(comm, x[own], labels[own])
expected = trained(MPI.COMM_SELF, x[whole], labels[whole])
assert len(parts) == len(expected) == 11
for part, one in zip(parts, expected):
    np.testing.assert_allclose(part, one, rtol=0, atol=1e-5 * np.abs(one).max())
if comm.Get_rank() == 0:
    print("done")
""")
    assert run(3, program) == ["done"]


def test_bad_arguments_of_the_example_are_said_once(example):
    arguments = [sys.executable, str(example), "--steps", "0"]
    done = subprocess.run(
        [mpiexec(), "-n", "2", *arguments], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 2
    assert done.stderr.count("--steps: expected a whole number") == 1
