"""Threads and instruction sets: the same bits, the GIL, limits, stacks."""

import platform
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import exact
import numpy as np
import pytest
from builds import optimized

from bn_cy import (
    BatchNorm,
    _digests,
    _dispatch,
    batchnorm_backward,
    batchnorm_forward,
    get_num_threads,
    set_num_threads,
    show_config,
)
from bn_cy._openmp import cpu

needs_openmp = pytest.mark.skipif(
    not show_config(mode="dicts")["openmp"], reason="this build is serial"
)

FLAGS = {
    "v2": {"sse4_2", "ssse3", "popcnt"},
    "v3": {"avx2", "fma", "bmi2", "f16c"},
    "v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


def offered_variants():
    """Return the instruction-set variants that this processor can run."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        return []
    lines = cpuinfo.read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    return [variant for variant, needed in FLAGS.items() if needed <= flags]


@pytest.fixture
def threads():
    """Leave the number of threads to OpenMP after the test."""
    yield
    set_num_threads(None)


# The same bits


def digests_of(python, seed, variant, **environment):
    """Return the lines of `_digests` for 1 to 16 threads, as computed by a variant."""
    if variant != "plain":
        environment["BN_CY_ISA"] = variant
    result = python("-m", "bn_cy._digests", seed, 1, 2, 3, 7, 16, 1, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("variant", cpu.BUILT)
def test_every_variant_has_the_committed_digests(python, variant):
    """Those of every variant, number of threads, compiler and processor that ever ran this."""
    if variant not in _dispatch.SUPPORTED:
        pytest.skip(f"the variant {variant} was built, and is not run on this processor")
    assert digests_of(python, 0, variant) == _digests.committed()


@needs_openmp
@pytest.mark.parametrize("limit", ["1", "2", "5"])
def test_same_bits_with_fewer_threads_than_were_asked_for(python, limit):
    variant = _dispatch.SUPPORTED[-1]
    assert digests_of(python, 0, variant, OMP_THREAD_LIMIT=limit) == _digests.committed()


def test_same_bits_for_every_variant_and_number_of_threads(rng, python):
    """On data drawn anew in each run."""
    seed = int(rng.integers(1, 2**20))
    first, *others = _dispatch.SUPPORTED
    expected = digests_of(python, seed, first)
    assert len(expected) == 2 * len(_digests.CASES) + 2  # else threads differ
    for variant in others:
        assert digests_of(python, seed, variant) == expected, f"seed {seed}"


@pytest.mark.parametrize("variant", offered_variants())
def test_a_variant_can_be_forced(python, variant):
    code = 'import bn_cy; print(bn_cy.show_config(mode="dicts")["variant"])'
    result = python("-c", code, BN_CY_ISA=variant)
    assert result.stdout.split() == [variant], result.stderr


@pytest.mark.parametrize("word", ["v5", "avx2", "V3", "native"])
def test_an_unknown_variant_is_an_error(python, word):
    result = python("-c", "import bn_cy", BN_CY_ISA=word)
    assert result.returncode != 0
    for expected in ("BN_CY_ISA", word, *offered_variants()):
        assert expected in result.stderr


def test_numbers_are_right_for_any_number_of_threads(rng, threads):
    x = exact.ordinary(rng, (5000, 3))
    dout = rng.standard_normal(x.shape).astype(np.float32)
    for count in (1, 2, 5):
        set_num_threads(count)
        y, cache = batchnorm_forward(x)
        dx, _, _ = batchnorm_backward(dout, cache)
        assert exact.error(y, exact.forward(x)) <= 5e-7
        assert exact.error(dx, exact.backward(dout, x)[0]) <= 5e-7


# The number of threads


@needs_openmp
def test_number_of_threads_is_what_was_set(threads):
    default = get_num_threads()
    for count in (1, 3, 2):
        set_num_threads(count)
        assert get_num_threads() == count
    set_num_threads(None)
    assert get_num_threads() == default


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_threads_below_one(threads, count):
    before = get_num_threads()
    with pytest.raises(ValueError, match=str(count)):
        set_num_threads(count)
    assert get_num_threads() == before


@pytest.mark.parametrize("count", [1.5, "2"])
def test_a_number_of_threads_that_is_no_integer(threads, count):
    before = get_num_threads()
    with pytest.raises(TypeError):
        set_num_threads(count)
    assert get_num_threads() == before


@needs_openmp
@pytest.mark.parametrize("count", ["1", "2", "5"])
def test_environment_sets_the_number_of_threads(python, count):
    code = "import bn_cy; print(bn_cy.get_num_threads())"
    result = python("-c", code, OMP_NUM_THREADS=count)
    assert result.stdout.split() == [count], result.stderr


@needs_openmp
def test_threadpoolctl_limits_the_number_of_threads(python):
    pytest.importorskip("threadpoolctl")
    code = """
import bn_cy, threadpoolctl
counts = [bn_cy.get_num_threads()]
with threadpoolctl.threadpool_limits(1):
    counts.append(bn_cy.get_num_threads())
counts.append(bn_cy.get_num_threads())
print(*counts)
"""
    result = python("-c", code, OMP_NUM_THREADS="3")
    assert result.stdout.split() == ["3", "1", "3"], result.stderr


# The threads that a call really uses

USED = """
import os, time
from pathlib import Path
import numpy as np
import bn_cy

rng = np.random.default_rng({seed})
x, dout = rng.standard_normal((2, 1024, 640)).astype(np.float32)
out = np.empty_like(x)
count, mean, var = bn_cy.moments(x)
_, cache = bn_cy.batchnorm_forward(x, np.ones(640), np.ones(640))
sums = bn_cy.gradient_sums(dout, x, mean, var)
layer = bn_cy.BatchNorm(640)
few = x[:10]
calls = [
    lambda: bn_cy.batchnorm_forward(x, out=out),
    lambda: bn_cy.batchnorm_backward(dout, cache, out=out),
    lambda: bn_cy.moments(x),
    lambda: bn_cy.normalize(x, mean, var, out=out),
    lambda: bn_cy.frozen_forward(x, mean, var, out=out),
    lambda: bn_cy.gradient_sums(dout, x, mean, var),
    lambda: bn_cy.input_gradient(dout, x, mean, var, None, 1e-5, *sums, count, out=out),
    lambda: layer(x, out=out),
    lambda: layer.backward(dout, cache=cache, out=out),
]


def worked():
    "Nanoseconds of a processor that each thread but this one has had, if it sleeps."
    return {{
        thread.name: int((thread / "schedstat").read_text().split()[0])
        for thread in Path("/proc/self/task").iterdir()
        if thread.name != str(os.getpid())
    }}


def helpers_during(function):
    before = worked()
    function()
    return sum(before.get(thread) != time for thread, time in worked().items())


def used(call):
    "How many threads worked while a call ran, the caller among them."
    while helpers_during(lambda: time.sleep(0.02)):
        pass  # a thread of an earlier call is still about to sleep
    return 1 + helpers_during(lambda: [call(), time.sleep(0.005)])


assert used(lambda: sum(range(100000))) == 1
for asked in {asked}:
    bn_cy.set_num_threads(asked)
    found = [used(call) for call in calls]
    assert found == [asked or bn_cy.get_num_threads()] * len(calls), (asked, found)
    assert used(lambda: bn_cy.batchnorm_forward(few)) == 1
print("done")
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's /proc")
@needs_openmp
@pytest.mark.parametrize("asked", [[1], [2, 1, 3, 1], [5, 2], [None]])
def test_a_call_uses_the_threads_that_were_asked_for(rng, python, asked):
    """Neither more nor fewer, and one where there is little to do."""
    code = USED.format(seed=int(rng.integers(2**32)), asked=asked)
    result = python("-c", code, OPENBLAS_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["done"]


@needs_openmp
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of a process")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("call", ["forward(x)", "backward(x, cache)"])
@pytest.mark.parametrize("shape", [(20_000, 16), (60, 4000)])  # which share rows, and features
def test_a_call_has_the_threads_that_it_was_given(python, shape, call, count):
    code = f"""
import os
import numpy as np
import bn_cy
x = np.arange(np.prod({shape}), dtype=np.float32).reshape{shape}
bn_cy.set_num_threads(1)
_, cache = bn_cy.batchnorm_forward(x)
before = len(os.listdir("/proc/self/task"))
bn_cy.set_num_threads({count})
bn_cy.batchnorm_{call}
print(len(os.listdir("/proc/self/task")) - before)
"""
    result = python("-c", code)
    assert result.stdout.split() == [str(count - 1)], result.stderr


# Python threads


class Counter(threading.Thread):
    """A thread that counts, giving the interpreter away after every count."""

    def __init__(self):
        super().__init__(daemon=True)
        self.count = 0
        self.stopped = False

    def run(self):
        while not self.stopped:
            self.count += 1
            time.sleep(0)


@pytest.fixture
def counter():
    """Return a running Counter, which counts only while others give the interpreter away."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = Counter()
    thread.start()
    yield thread
    thread.stopped = True
    sys.setswitchinterval(interval)
    thread.join()


def counts_during(counter, function, attempts=50):
    """Return whether the counter advances within one of the calls of the function."""
    for _ in range(attempts):
        before = counter.count
        function()
        if counter.count > before:
            return True
    return False


def test_counter_stands_still_while_the_interpreter_is_held(counter):
    assert not counts_during(counter, lambda: sum(range(100_000)))


@pytest.mark.parametrize("shape", [(200_000, 16), (8, 16, 160, 160), (32_000, 16, 7)])
def test_kernels_release_the_interpreter(rng, counter, shape):
    x = rng.standard_normal(shape, np.float32)
    out = np.empty_like(x)
    y, cache = batchnorm_forward(x)
    layer = BatchNorm(16).eval()
    assert counts_during(counter, lambda: batchnorm_forward(x, out=out))
    assert counts_during(counter, lambda: batchnorm_backward(y, cache, out=out))
    assert counts_during(counter, lambda: layer.forward(x, out=out))


def training_step(x, dout):
    """Return all that a training step of a new layer computes."""
    layer = BatchNorm(x.shape[1])
    y, dx = layer(x), layer.backward(dout)
    return y, dx, layer.dgamma, layer.dbeta, layer.running_mean, layer.running_var


@pytest.mark.parametrize("shape", [(64, 32), (3000, 65), (4, 8, 40, 40)])
def test_eight_threads_at_once(rng, shape):
    x = [exact.ordinary(rng, shape) for _ in range(8)]
    dout = [rng.standard_normal(shape, np.float32) for _ in range(8)]
    alone = [training_step(*batch) for batch in zip(x, dout, strict=True)]
    start = threading.Barrier(8)

    def work(i):
        start.wait(60)
        for _ in range(20):
            for actual, expected in zip(training_step(x[i], dout[i]), alone[i], strict=True):
                np.testing.assert_array_equal(actual, expected)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, i) for i in range(8)]:
            future.result(timeout=120)


@pytest.mark.parametrize("frozen", [False, True])
def test_threads_share_what_they_only_read(rng, frozen):
    """The same arrays, the same cache, and one layer whose running statistics are used."""
    x = exact.ordinary(rng, (3000, 65))
    layer = BatchNorm(65)
    layer(x)
    layer = layer.freeze() if frozen else layer.eval()
    _, cache = batchnorm_forward(x)

    def work(_=None):
        return [layer(x), batchnorm_forward(x)[0], *batchnorm_backward(x, cache)[:1]]

    alone, state = work(), layer.state_dict()
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(200), timeout=120):
            for actual, expected in zip(results, alone, strict=True):
                np.testing.assert_array_equal(actual, expected)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, state[name])


# Stacks

STACK = """
import threading
import numpy as np
import bn_cy

rng = np.random.default_rng({seed})
shapes = (2, 300000), (1000, 1100), (20, 30000), (128, 64, 7, 7), (4, 64, 99, 99)


def step(x, dout, beta, axis, residual):
    relu = beta is not None
    for threads in 1, 2:
        bn_cy.set_num_threads(threads)
        _, cache = bn_cy.batchnorm_forward(x, beta=beta, axis=axis, relu=relu, residual=residual)
        bn_cy.batchnorm_backward(dout, cache)


def work():
    for shape, axis in zip(shapes, (0, 1, 1, 1, 1)):
        for dtype in (np.float32, np.float64):
            x, dout = rng.standard_normal((2, *shape)).astype(dtype)
            for constant, gradient in (False, 1), (True, np.inf):  # the latter are summed again
                x[...] = 7 if constant else x
                dout.flat[0] = gradient
                ones = np.ones(shape[axis])
                for beta, residual in (None, None), (ones, None), (None, dout), (ones, dout):
                    step(x, dout, beta, axis, residual)
    print("done")


threading.stack_size({stack} << 10)
threading.Thread(target=work).start()
"""


@optimized
def test_the_small_stacks_of_musl_are_enough(rng, python):
    """For a thread that calls, and for those that OpenMP adds to it."""
    code = STACK.format(seed=int(rng.integers(2**32)), stack=128)
    result = python("-c", code, OMP_STACKSIZE="128K")
    assert result.stdout.split() == ["done"], result.stderr


def test_a_forked_child_has_one_thread(threads):
    """What `register_at_fork` calls in it: an OpenMP runtime does not survive a fork."""
    set_num_threads(5)
    before = cpu.is_serial()
    cpu.stay_serial()
    try:
        assert get_num_threads() == 1
    finally:
        cpu.stay_serial(before)
