"""A process for one library: it is told what to bind and time, one JSON line at a time.

Run as ``python worker.py NAME THREADS``; `client.Worker` is the other end.
"""

import gc
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

SAMPLE_SECONDS = 100e-6  # calls shorter than this are timed several at once


class Absent(Exception):
    """A library that is not installed."""


class WrongResult(Exception):
    """A library whose result is not the reference's."""


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
    # A process group of its own: the system wakes and ends a stopped worker whose caller has died.
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
        from networks import NETWORKS

        return NETWORKS[name](threads)
    from peers import LIBRARIES

    return LIBRARIES[name](threads)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
