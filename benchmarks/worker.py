"""A process for one library: it is told what to bind and time, one JSON line at a time.

Run as ``python worker.py NAME THREADS``; `Worker` is the other end. While one worker is
timed the others are stopped by SIGSTOP, so that no idle thread pool spins on a CPU.
"""

import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_PROC_BIND")
SAMPLE_SECONDS = 100e-6  # calls shorter than this are timed several at once


class Absent(Exception):
    """A library that is not installed."""


class WrongResult(Exception):
    """A library whose result is not the reference's."""


class Worker:
    """The caller's handle of a library in a process of its own, stopped unless asked."""

    def __init__(self, name, threads):
        self.name, self.threads = name, threads
        unwanted = (*THREAD_VARIABLES, *WAIT_VARIABLES)
        environment = {k: v for k, v in os.environ.items() if k not in unwanted}
        environment.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            self._answer()
        except Exception:
            self.close()
            raise

    def bind(self, case, folder):
        """Bind the case whose data are in `folder`; return the errors of its results.

        Without a folder there are no data: streaming wants the size alone.
        """
        return self._ask(do="bind", case=case.name, folder=folder)["errors"]

    def verbs(self):
        return self._ask(do="verbs")["verbs"]

    def time(self, verb, seconds):
        """Return the median seconds of a call of `verb`, called for about `seconds`."""
        return self._ask(do="time", verb=verb, seconds=seconds)["seconds"]

    def value(self, verb):
        """Call `verb` once and return its result, a number."""
        return self._ask(do="value", verb=verb)["value"]

    def peak_bytes(self, case, folder):
        """Bind the case, call every verb, and return by how much that raised the peak memory.

        In a worker that has done nothing else: memory kept from earlier calls does not show.
        """
        return self._ask(do="peak", case=case.name, folder=folder)["bytes"]

    def close(self):
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _ask(self, **request):
        self._process.send_signal(signal.SIGCONT)
        # A worker that has died is noticed when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"{self.name}: the process ended with code {code}")
        self._process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        for kind in (Absent, WrongResult, NotImplementedError, RuntimeError):
            if kind.__name__ in answer:
                raise kind(f"{self.name}: {answer[kind.__name__]}")
        return answer


def seconds_per_call(function, seconds):
    """Time `function` for about `seconds`: the median of samples of one or more calls."""
    start = time.perf_counter()
    function()
    first = time.perf_counter() - start
    # The process was stopped until now: fill the caches and wake the threads.
    count, start = 1, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < 0.1 * seconds and first < seconds:
        function()
        count += 1
    repeats = max(1, int(SAMPLE_SECONDS * count / max(elapsed, first)))
    samples, deadline = [], time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while len(samples) < 3 or time.perf_counter() < deadline:
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            samples.append((time.perf_counter() - start) / repeats)
    finally:
        gc.enable()
    return statistics.median(samples)


def peak_growth(function):
    """Call `function` and return the growth of the peak resident memory, where Linux tells."""
    clear_refs = Path("/proc/self/clear_refs")
    if not clear_refs.exists():
        raise NotImplementedError("peak memory is read from Linux's /proc")
    clear_refs.write_text("5")  # the peak starts again from the present size
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise NotImplementedError(f"no {field} in /proc/self/status")


class Server:
    """The worker's side: one library and the verbs of the case it is bound to."""

    def __init__(self, library):
        self._library = library
        self._verbs = {}

    def bind(self, case, folder):
        from problem import relative_errors

        self._verbs = {}  # the last case's arrays go before this one's come
        problem = _load(case, folder)
        self._verbs = self._library.bind(problem)
        tolerance = self._library.tolerance
        if tolerance is None:
            return {"errors": {}}
        errors = relative_errors(problem.case, folder, self._library.results(self._verbs))
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        if wrong:
            told = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
            raise WrongResult(f"{case}: relative L2 error of {told}, allowed {tolerance}")
        return {"errors": errors}

    def verbs(self):
        return {"verbs": list(self._verbs)}

    def time(self, verb, seconds):
        return {"seconds": seconds_per_call(self._verbs[verb], seconds)}

    def value(self, verb):
        return {"value": float(self._verbs[verb]())}

    def peak(self, case, folder):
        problem, library = _load(case, folder), self._library
        return {"bytes": peak_growth(lambda: library.results(library.bind(problem)))}


def _load(case, folder):
    # Imported here, after the CPUs are chosen: this loads NumPy and the threads of its BLAS.
    from cases import parse_case
    from problem import load

    return load(parse_case(case), folder)


def serve(name, threads):
    # A process group of its own: Ctrl-C reaches the caller alone, and the system wakes and
    # ends a stopped worker whose caller has died.
    os.setpgrp()
    # Answers go where stdout went; whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content):
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        server = Server(_library(name, threads))
        answer({})
    except ImportError as error:
        answer({"Absent": str(error)})
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(getattr(server, request.pop("do"))(**request))
        except (WrongResult, NotImplementedError) as error:
            answer({type(error).__name__: str(error)})
        except Exception:
            answer({"RuntimeError": traceback.format_exc()})


def _library(name, threads):
    from machine import cpus_for

    # Before the library is imported: some take as many threads as they may use CPUs.
    os.sched_setaffinity(0, cpus_for(threads))
    if name.startswith("step "):
        from train import NETWORKS

        return NETWORKS[name](threads)
    from peers import LIBRARIES

    return LIBRARIES[name](threads)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
