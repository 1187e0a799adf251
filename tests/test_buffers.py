"""The pool of output buffers: recycled as soon as nobody holds them, never before."""

import ctypes
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from bn_cy._buffers import POOL, Buffer, Pool, memory_limit, memory_of_machine, relieved
from builds import optimized

from bn_cy import (
    BatchNorm,
    batchnorm_forward,
    clear_buffers,
    frozen_forward,
    gradient_sums,
    input_gradient,
    moments,
    normalize,
)

SHAPE = (1024, 256)  # a megabyte of float32


def address(array):
    return array.__array_interface__["data"][0]


@pytest.fixture
def x(rng):
    return rng.standard_normal(SHAPE, np.float32)


def test_outputs_begin_on_a_cache_line(x):
    assert address(batchnorm_forward(x)[0]) % 64 == 0


def test_memory_that_nobody_holds_serves_the_next_output(x):
    y, _ = batchnorm_forward(x)
    first = address(y)
    del y
    assert address(batchnorm_forward(x)[0]) == first


class Interface:
    """Holds an array for what is made of its `__array_interface__`."""

    def __init__(self, array):
        self.array, self.__array_interface__ = array, array.__array_interface__


KEEPERS = {
    "array": lambda y: y,
    "view": lambda y: y[::2, 3],
    "view of a view": lambda y: y.T.reshape(-1)[5:].reshape(-1, 1),
    "memoryview": memoryview,
    "slice of a memoryview": lambda y: memoryview(y)[3:700:5],
    "cast memoryview": lambda y: memoryview(y).cast("B"),
    "other dtype": lambda y: y.view(np.uint32),
    "array interface": lambda y: np.asarray(Interface(y)),
    "dlpack": np.from_dlpack,
    "frombuffer": lambda y: np.frombuffer(y, np.uint8, 1000, 64),
    "ctypes": lambda y: (ctypes.c_float * y.size).from_buffer(y),
    "base": lambda y: memoryview(y.base),
    "iterator": lambda y: y.flat,
}


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS.keys())
def test_memory_that_somebody_holds_is_left_alone(x, keep):
    y, _ = batchnorm_forward(x)
    kept = keep(y)
    before = np.array(kept)
    del y
    others = [batchnorm_forward(x + 1)[0] for _ in range(3)]
    assert len({address(other) for other in others}) == 3
    np.testing.assert_array_equal(np.array(kept), before)


def test_results_that_anybody_holds_are_never_written_again(rng):
    """Of every call that returns a fresh array, held and let go at random."""
    x, dout, skip = rng.standard_normal((3, *SHAPE), np.float32)
    layer = BatchNorm(SHAPE[1], relu=True)
    _, mean, var = moments(x)
    sums = gradient_sums(dout, x, mean, var)

    def step(rows):
        y = layer(x[:rows], residual=skip[:rows])
        return [y, *layer.backward(dout[:rows])]

    calls = [
        step,
        lambda rows: [normalize(x[:rows], mean, var)],
        lambda rows: [frozen_forward(x[:rows], mean, var)[0]],
        lambda rows: [input_gradient(dout[:rows], x[:rows], mean, var, None, 0.1, *sums, rows)],
    ]
    kept = []
    reused = set()
    for _ in range(300):
        x += 1
        results = calls[rng.integers(len(calls))](int(rng.integers(800, SHAPE[0])))
        reused |= {address(result) for result in results}
        views = [result[rng.integers(7) :: 7] for result in results]
        kept += [(view, view.copy()) for view in views]
        kept = [(view, copy) for view, copy in kept if rng.random() < 0.7]
        for view, copy in kept:
            np.testing.assert_array_equal(view, copy)
    assert len(reused) < 100  # else this would hold whatever the pool did


def test_pool_takes_the_last_free_block_of_the_size():
    pool = Pool(limit=1 << 20)
    small, large = Buffer(100, pool), Buffer(200, pool)
    assert pool.free == []
    del small, large
    assert [block.size for block in pool.free] == [100, 200]
    again = Buffer(100, pool)
    assert [block.size for block in pool.free] == [200]
    assert memoryview(again).nbytes == 100


def test_pool_gives_a_block_that_is_little_larger():
    pool = Pool(limit=1 << 20)
    Buffer(100, pool)
    smaller = Buffer(80, pool)
    assert pool.free == []
    assert memoryview(smaller).nbytes == 80
    del smaller
    kept = Buffer(79, pool), Buffer(101, pool)
    assert [block.size for block in pool.free] == [100]
    assert [memoryview(buffer).nbytes for buffer in kept] == [79, 101]


def test_pool_keeps_few_blocks():
    pool = Pool(limit=1 << 20)
    for size in range(100, 10000, 200):
        Buffer(size, pool)
    assert len(pool.free) == 16
    assert pool.free[-1].size == 9900


def test_blocks_of_a_gigabyte_are_recycled_on_a_large_machine():
    pool = Pool(limit=4 << 30)
    buffers = [Buffer(1 << 30, pool) for _ in range(3)]  # never touched: address space alone
    starts = {np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers}
    del buffers[:]
    again = [Buffer(1 << 30, pool) for _ in range(3)]
    assert {np.frombuffer(buffer, np.uint8).ctypes.data for buffer in again} == starts


def test_varying_batches_leave_little_in_the_pool(rng):
    x = rng.standard_normal((1500, 64), np.float32)
    for rows in range(1100, 1500, 7):
        batchnorm_forward(x[:rows])
    assert len(POOL.free) <= 16


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_limit_of_a_container(tmp_path, name):
    whole = memory_limit(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    for text, expected in (("65536\n", 65536), ("max\n", whole), (f"{1 << 63}\n", whole)):
        file.write_text(text)
        assert memory_limit(tmp_path) == expected


def test_pool_lets_the_oldest_go_beyond_its_limit():
    pool = Pool(limit=250)
    buffers = [Buffer(size, pool) for size in (100, 110, 120)]
    while buffers:
        del buffers[0]
    assert [block.size for block in pool.free] == [110, 120]


def test_pool_keeps_as_much_as_its_limit():
    pool = Pool(limit=230)
    buffers = [Buffer(size, pool) for size in (110, 120)]
    del buffers[:]
    assert sorted(block.size for block in pool.free) == [110, 120]


def test_pool_keeps_nothing_larger_than_its_limit():
    pool = Pool(limit=250)
    Buffer(300, pool)
    assert pool.free == []


def test_cleared_buffers_are_given_back(x):
    y, _ = batchnorm_forward(x)
    kept = np.array(y)
    z, _ = batchnorm_forward(x + 1)
    del z
    assert POOL.free
    clear_buffers()
    assert POOL.free == []
    np.testing.assert_array_equal(y, kept)


def test_where_there_is_no_memory_the_pool_gives_up_its_own():
    pool = Pool(limit=1 << 20)
    Buffer(1000, pool)

    def wanting():
        if pool.free:
            raise MemoryError("none")
        return "found"

    def refuse():
        raise MemoryError("none")

    assert relieved(wanting, pool=pool) == "found"
    with pytest.raises(MemoryError, match="none"):
        relieved(refuse, pool=pool)


class Refusing(Pool):
    """One that finds no memory to keep a block."""

    def give(self, block):
        raise MemoryError("none")


def test_a_block_that_cannot_be_kept_goes_without_a_word():
    """An exception of a destructor is an error in these tests."""
    pool = Refusing(limit=1 << 20)
    Buffer(100, pool)
    assert pool.free == []


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
def test_a_call_finds_the_memory_that_the_pool_holds(tmp_path):
    """It holds 512 MB, in blocks of another size, and 64 MB more are all that is to be had."""
    program = """
        import resource
        import numpy as np
        import bn_cy

        x = np.ones((1 << 20, 64), np.float32)
        kept = [bn_cy.normalize(x, np.zeros(64), np.ones(64)) for _ in range(2)]
        del kept
        y = bn_cy.normalize(x[: 1 << 19], np.zeros(64), np.ones(64))
        words = open("/proc/self/statm").read().split()
        size = int(words[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
        z = bn_cy.normalize(x[: 3 << 18], np.zeros(64), np.ones(64))
        print(z.shape, float(z[-1, -1]), float(y[-1, -1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(786432, 64) 0.99999")


def given_statistics(function):
    """Return a call of a function with statistics that need no memory of their own."""

    def call(x):
        statistics = np.broadcast_to(np.float32(1), x.shape[1:])
        return function(x, statistics, statistics)

    return call


@optimized
@pytest.mark.parametrize(
    "function",
    [batchnorm_forward, moments, given_statistics(normalize), given_statistics(frozen_forward)],
)
@pytest.mark.parametrize(
    ("features", "message"),
    [(2**48, r"\d{17} bytes"), (2**48 + 1, "the statistics of"), (2**61 - 1, "the statistics of")],
)
def test_statistics_that_no_memory_holds(function, features, message):
    """Of an empty array: up to 2^48 features the system is asked, and their bytes do not wrap."""
    kept = Buffer(1 << 20)
    del kept
    with pytest.raises(MemoryError, match=f"no memory for {message}"):
        function(np.empty((0, features), np.float32))
    assert bool(POOL.free) == (features > 2**48)  # where it was asked, the pool gave all it had


@pytest.mark.parametrize("fault", [AttributeError, ValueError, OSError])
def test_memory_of_a_machine_that_does_not_tell(monkeypatch, fault):
    def sysconf(name):
        raise fault

    assert memory_of_machine() > 0
    monkeypatch.setattr("os.sysconf", sysconf, raising=False)
    assert memory_of_machine() == 4 << 30


@optimized
@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    ("call", "megabytes", "direction"),
    [("moments(x)", 15, "forward"), ("gradient_sums(x, x, mean, var)", 18, "backward")],
)
def test_no_memory_for_the_partial_sums(tmp_path, call, megabytes, direction, pooled):
    """There is some for the statistics and the sums, 9.6 and 3.2 MB, but not for 6.4 MB more,
    unless the pool gives up what it holds."""
    program = f"""
        import resource
        import numpy as np
        import bn_cy

        bn_cy.set_num_threads(1)
        x = np.arange(256 * 200_000, dtype=np.float32).reshape(256, 200_000) % 101
        mean, var = np.zeros(200_000), np.ones(200_000)
        kept = bn_cy.normalize(x[:64], mean, var)
        del kept
        if not {pooled}:
            bn_cy.clear_buffers()
        words = open("/proc/self/statm").read().split()
        size = int(words[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + ({megabytes} << 20), hard))
        try:
            got = bn_cy.{call}
        except MemoryError as error:
            print(error)
        else:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            expected = bn_cy.{call}
            assert all(np.array_equal(*pair) for pair in zip(got, expected, strict=True))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    message = "" if pooled else f"no memory for the partial sums of a {direction}\n"
    assert (done.returncode, done.stdout) == (0, message), done.stderr
