"""Processes: forks and other ways to start one, interrupts, the end of Python, subinterpreters.

Each test runs a program in a process of its own, and ends all that it has started if it hangs.
"""

import functools
import os
import sys

import beside
import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")

START = """
import os, signal, sys, threading, time, warnings
import numpy as np
import bn_cy

warnings.simplefilter("ignore", DeprecationWarning)  # of a fork of a process with threads
bn_cy.set_num_threads(2)
rng = np.random.default_rng({seed})


def exit_status(function):
    "What a forked child says: 0 if the function returned true."
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if function() else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


"""


@pytest.fixture
def run(run):
    """Return a function that runs a program after START, or after what is given."""
    return functools.partial(run, start=START)


# Forks


@needs_fork
def test_a_forked_child_computes_and_its_child_too(run):
    run("""
        bn_cy.functional._stream_from(0)  # past the cache, one thread walks wide rows by cells
        x = rng.standard_normal((1000, 1100)).astype(np.float32)


        def step():
            y, cache = bn_cy.batchnorm_forward(x, np.ones(1100), np.zeros(1100))
            dx, dgamma, dbeta = bn_cy.batchnorm_backward(x, cache)
            return np.concatenate([y.ravel(), dx.ravel(), dgamma, dbeta])


        def same():
            return np.array_equal(step(), expected)


        expected = step()
        assert exit_status(lambda: same() and exit_status(same) == 0) == 0
        assert same()
        print("done")
    """)


@needs_fork
def test_a_forked_child_is_serial_and_its_parent_is_not(run):
    run("""
        bn_cy.batchnorm_forward(np.ones((20000, 64)))
        before = bn_cy.get_num_threads()
        assert exit_status(lambda: bn_cy.get_num_threads() == 1) == 0
        bn_cy.set_num_threads(2)
        assert exit_status(lambda: bn_cy.set_num_threads(2) or bn_cy.get_num_threads() == 1) == 0
        assert bn_cy.get_num_threads() == before
        print("done")
    """)


@pytest.mark.parametrize(
    ("method", "preload", "serial"),
    [
        pytest.param("fork", "", True, marks=needs_fork),
        pytest.param("forkserver", "", False, marks=needs_fork),
        pytest.param("forkserver", "bn_cy", True, marks=needs_fork),
        ("spawn", "", False),
    ],
)
def test_every_way_to_start_a_process(run, method, preload, serial):
    """A child computes with our threads unless it is the fork of a process that had loaded us."""
    program = """
        import multiprocessing


        def step(task):
            "The layer comes in a pickle, and goes back in one."
            layer, x = task
            bn_cy.set_num_threads(2)
            y = layer(x)
            return layer, y, layer.backward(x), bn_cy.get_num_threads()


        def main():
            x = rng.standard_normal((20000, 64)).astype(np.float32)
            layer, y, dx, _ = step((bn_cy.BatchNorm(64), x))
            context = multiprocessing.get_context("METHOD")
            if "PRELOAD":
                context.set_forkserver_preload(["PRELOAD"])
            expected = 1 if SERIAL or not bn_cy.show_config(mode="dicts")["openmp"] else 2
            with context.Pool(2) as pool:
                for answer in pool.map(step, [(bn_cy.BatchNorm(64), x)] * 4):
                    assert np.array_equal(answer[0].running_mean, layer.running_mean)
                    assert np.array_equal(answer[1], y)
                    assert np.array_equal(answer[2], dx)
                    assert answer[3] == expected, answer[3]
            print("done")


        if __name__ == "__main__":
            main()
    """
    for name, value in (("METHOD", method), ("PRELOAD", preload), ("SERIAL", str(serial))):
        program = program.replace(name, value)
    run(program)


@needs_fork
def test_a_fork_while_other_threads_are_inside_calls(run):
    run("""
        x = rng.standard_normal((20000, 64)).astype(np.float32)
        layer = bn_cy.BatchNorm(64).eval()
        stopped = threading.Event()


        def step():
            y, cache = bn_cy.batchnorm_forward(x)
            return np.array([y, bn_cy.batchnorm_backward(x, cache)[0], layer(x)])


        def work():
            while not stopped.is_set():
                step()


        expected = step()
        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        try:
            for _ in range(20):
                assert exit_status(lambda: np.array_equal(step(), expected)) == 0
        finally:
            stopped.set()
        print("done")
    """)


# Batches whose statistics say which it was: mean k, variance k^2 over 2 of 2 values, in each of so
# many features that the update of the running ones is a good part of a step.
TRAINING = """
WIDTH = 1 << 18
batches = [k * np.repeat([[1], [3]], WIDTH, 1).astype(np.float32) / 2 for k in range(1, 5)]


def is_whole(layer):
    "Whether all features have seen the same batch, and it was counted."
    mean, var = layer.running_mean, layer.running_var
    return np.all(mean == mean[0]) and np.all(var == mean[0] ** 2 / 2)


def train():
    while not stopped.is_set():
        for x in batches:
            for layer in layers:
                layer(x)


def new_layer():
    layer = bn_cy.BatchNorm(WIDTH, momentum=1)
    layer(batches[0])
    assert is_whole(layer)
    return layer


stopped = threading.Event()
layers = [new_layer(), new_layer()]
worker = threading.Thread(target=train)
"""


@needs_fork
def test_a_fork_while_layers_are_trained(run):
    """The child has each layer as it was between two batches, and can use it."""
    run(
        """
        def use():
            whole = all(is_whole(layer) for layer in layers)
            for layer in layers:
                layer(batches[2])
                layer.reset_running_stats()
            thread = threading.Thread(target=layers[0], args=(batches[3],))
            thread.start()
            thread.join()
            grandchild = exit_status(lambda: layers[0](batches[1]).any())
            return whole and grandchild == 0


        worker.start()
        try:
            statuses = [exit_status(use) for _ in range(20)]
        finally:
            stopped.set()
        assert not any(statuses), statuses
        worker.join()
        counts = [layer.num_batches_tracked for layer in layers]
        layers[0](batches[0])
        assert layers[0].num_batches_tracked == counts[0] + 1
        print("done")
        """,
        start=START + TRAINING,
    )


@needs_fork
def test_forks_in_several_threads_at_once(run):
    run(
        """
        def fork():
            for _ in range(5):
                statuses.append(exit_status(lambda: layers[0](batches[2]).any()))


        statuses = []
        forks = [threading.Thread(target=fork) for _ in range(3)]
        worker.start()
        for thread in forks:
            thread.start()
        for thread in forks:
            thread.join()
        stopped.set()
        assert statuses == [0] * 15, statuses
        print("done")
        """,
        start=START + TRAINING,
    )


@needs_fork
def test_a_signal_handler_forks_while_its_thread_trains(run):
    """Wherever it comes in: the thread itself may have the layer's lock."""
    run(
        """
        def handle(*_):
            statuses.append(exit_status(lambda: layers[0](batches[2]).any()))
            signal.setitimer(signal.ITIMER_REAL, 0.01)


        statuses = []
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while len(statuses) < 20:
            layers[0](batches[1])
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        assert not any(statuses), statuses
        print("done")
        """,
        start=START + TRAINING,
    )


@needs_fork
def test_layers_that_are_gone_do_not_delay_a_fork(run):
    run("""
        from bn_cy import _forks

        layers = [bn_cy.BatchNorm(3) for _ in range(100)]
        assert len(_forks._layers) == 100
        del layers
        assert len(_forks._layers) == 0
        print("done")
    """)


def test_a_state_that_is_read_while_a_layer_is_trained(run):
    """state_dict, pickles and copies hold one state, not halves of two."""
    run(
        """
        import copy, pickle, types

        worker.start()
        try:
            for _ in range(100):
                state = layers[0].state_dict()
                assert is_whole(types.SimpleNamespace(**state))
            for _ in range(20):
                assert is_whole(copy.copy(layers[0]))
                assert is_whole(pickle.loads(pickle.dumps(layers[1])))
        finally:
            stopped.set()
        print("done")
        """,
        start=START + TRAINING,
    )


# Interrupts


INTERRUPT = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it


def interrupt():
    "Ctrl-C, a while after the start of the call that is under way."
    time.sleep(0.02)
    calls.append(done)
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(function):
    "Call the function until Ctrl-C ends that; return how many calls ended after it had been sent."
    global done
    done = 0
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        while True:
            function()
            done += 1
    except KeyboardInterrupt:
        pass
    thread.join()
    return done - calls.pop()


calls = []
"""


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
@pytest.mark.parametrize("rows", [1 << 19, 200])
def test_ctrl_c_ends_within_the_running_call(run, rows):
    """Calls of a tenth of a second, and short ones; a batch is counted in all or in nothing."""
    run(
        f"""
        bn_cy.set_num_threads(1)
        x = rng.standard_normal(({rows}, 64)).astype(np.float32)
        _, mean, var = bn_cy.moments(x)
        _, cache = bn_cy.batchnorm_forward(x)
        for _ in range(5):
            layer = bn_cy.BatchNorm(64, momentum=1e-3)
            assert interrupted(lambda: layer(x)) <= 1
            count = layer.num_batches_tracked
            assert count in (done, done + 1), (count, done)
            left = (1 - 1e-3) ** count  # of what a new layer has
            correction = {rows} / ({rows} - 1)
            assert np.allclose(layer.running_mean, (1 - left) * mean, rtol=1e-8, atol=0)
            assert np.allclose(layer.running_var, left + (1 - left) * correction * var, 1e-8, 0)
            y = layer(x)
            assert np.array_equal(y, bn_cy.batchnorm_forward(x, layer.gamma, layer.beta)[0])
            assert layer.num_batches_tracked == count + 1
            kept = layer.cache
            assert interrupted(lambda: layer.backward(x, cache=kept)) <= 1
            assert interrupted(lambda: bn_cy.batchnorm_forward(x)) <= 1
            assert interrupted(lambda: bn_cy.batchnorm_backward(x, cache)) <= 1
        print("done")
        """,
        start=START + INTERRUPT,
    )


# Another OpenMP runtime in the process: PyTorch's is in tests/peers


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_scikit_learn(run, ours_first):
    """It brings a runtime of its own: two of them compute in turn, and each keeps its settings."""
    pytest.importorskip("sklearn")
    run(
        """
        def theirs(x):
            clusters = KMeans(4, init=x[:4], n_init=1, max_iter=3, algorithm="lloyd")
            return clusters.fit(x).cluster_centers_
        """,
        start=beside.imports("from sklearn.cluster import KMeans", ours_first),
        rest=beside.IN_TURN,
    )


# The end of Python


@pytest.mark.parametrize("threads", [1, 2])
def test_python_ends_with_results_alive(run, threads):
    """In globals, in cycles, in an object that uses the layer as it goes, in what runs at exit."""
    run(f"""
        import atexit

        bn_cy.set_num_threads({threads})


        class Late:
            def __init__(self, layer, x):
                self.layer, self.x, self.y, self.cycle = layer, x, layer(x), self

            def __del__(self):
                assert self.layer(self.x).shape == self.y.shape
                self.layer.backward(self.x)


        x = rng.standard_normal((20000, 64)).astype(np.float32)
        layer = bn_cy.BatchNorm(64)
        late, cycle = Late(layer, x), [layer(x)]
        cycle.append(cycle)
        y, view, buffer = layer(x), layer(x)[::2, 3], memoryview(layer(x))
        atexit.register(lambda: layer(x))
        atexit.register(bn_cy.clear_buffers)
        atexit.register(lambda: layer.backward(layer(x)))
        sys.modules["late"] = late
        print("done")
    """)


def test_python_ends_while_daemon_threads_are_inside_calls(run):
    run("""
        def work():
            while True:
                layer(x)
                bn_cy.batchnorm_forward(x)


        x = rng.standard_normal((200000, 64)).astype(np.float32)
        layer = bn_cy.BatchNorm(64)
        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.3)
        print("done")
    """)


# Subinterpreters


SUBINTERPRETERS = """
import warnings

warnings.simplefilter("ignore")  # of NumPy, which does not support them
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

CODE = '''
import warnings

warnings.simplefilter("ignore")
try:
    import bn_cy
except ImportError:
    print("refused")
else:
    x = [[-1.0, 3.0], [1.0, 5.0]]
    y, cache = bn_cy.batchnorm_forward(x, eps=0)
    print("right" if y.tolist() == [[-1, -1], [1, 1]] else "wrong")
'''


def in_a_subinterpreter():
    number = interpreters.create()
    interpreters.run_string(number, CODE)


"""


def has_subinterpreters():
    names = "_interpreters", "_xxsubinterpreters"
    return any(name in sys.builtin_module_names or can_import(name) for name in names)


def can_import(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not has_subinterpreters(), reason="this Python has none")
def test_a_second_interpreter_is_refused(run):
    """NumPy refuses it, by ImportError, and the first goes on."""
    run(
        """
        import bn_cy

        in_a_subinterpreter()
        in_a_subinterpreter()
        exec(CODE)
        """,
        start=SUBINTERPRETERS,
        expected="refused refused right",
    )
