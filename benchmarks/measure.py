"""Times every library on every case, in alternating rounds."""

import contextlib
import statistics
import tempfile
from dataclasses import dataclass

from cases import ARRAYS, compulsory_reads
from client import Worker
from problem import create, save
from worker import Absent


@dataclass(frozen=True)
class Plan:
    """How long to measure: every verb of every library for `slot` seconds in each round."""

    slot: float = 0.12
    rounds: int = 5


QUICK = Plan(slot=0.02, rounds=3)


@contextlib.contextmanager
def workers(names, threads):
    """Start a worker for each library; yields them and what is absent, by name."""
    started, absent = {}, {}
    try:
        for name in names:
            try:
                started[name] = Worker(name, threads)
            except Absent as error:
                absent[name] = str(error)
        yield started, absent
    finally:
        for worker in started.values():
            worker.close()


@contextlib.contextmanager
def data(case, seed):
    """Yield a folder with the case's data and results, which all workers read."""
    with tempfile.TemporaryDirectory(prefix="bn_cy-bench-") as folder:
        save(create(case, seed), folder)
        yield folder


def measure(case, libraries, folder, plan):
    """Bind, check and time the workers on one case.

    Returns the median seconds and the errors, by library and then by verb and result.
    """
    errors, verbs = {}, {}
    for name, worker in libraries.items():
        with contextlib.suppress(NotImplementedError):  # a dtype that the library lacks
            errors[name] = worker.bind(case, folder)
            verbs[name] = worker.verbs()
    samples = {name: {verb: [] for verb in verbs[name]} for name in verbs}
    for _ in range(plan.rounds):
        for name, of_verb in samples.items():
            for verb, seconds in of_verb.items():
                seconds.append(libraries[name].time(verb, plan.slot))
    seconds = {
        name: {verb: statistics.median(rounds) for verb, rounds in of_verb.items()}
        for name, of_verb in samples.items()
    }
    return seconds, errors


def record(case, threads, seconds, errors, machine):
    """Put one case's figures together as they go into the results."""
    reads = {verb: compulsory_reads(case, verb, machine["l2_bytes"]) for verb in ARRAYS}
    return {
        "case": case.name,
        "group": case.group,
        "layout": case.layout,
        "bytes": case.nbytes,
        "threads": threads,
        "compulsory_reads": reads,
        "seconds": seconds,
        "errors": errors,
    }
