"""Calls of bn_cy drawn at random, each held against 80-bit arithmetic: see `fuzzing`.

    python tests/fuzz.py --calls 100000 [--seed S] [--jobs N]
    python tests/fuzz.py --seed S --only K

Prints for every fault the command that repeats this call alone, and ends with exit status 1 if
there was one, or if too many calls could not have failed whatever bn_cy had returned. Calls are
made in processes of their own, so that one that dies is a fault, too.
"""

import argparse
import collections
import contextlib
import faulthandler
import multiprocessing
import os
import secrets
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from fuzzing.source import Seeded
from fuzzing.trial import Trial
from tqdm import tqdm

CHUNK = 100  # calls that a process makes before it reports
SHOWN = 50  # faults that are printed
PATIENCE = 900  # seconds for a chunk: beyond, it hangs
FLOOR = 0.9  # of all calls, at the least, can fail
ENOUGH = 200  # calls from which on the floor is held

_current = None  # in a process that makes calls: the one it is in, of every chunk


@dataclass
class Tally:
    """What came of some calls."""

    names: collections.Counter = field(default_factory=collections.Counter)
    idle: int = 0
    failed: int = 0
    faults: list = field(default_factory=list)  # (call, its name, texts)
    shares: dict = field(default_factory=dict)  # the largest of a bound, by output

    @property
    def calls(self):
        return self.names.total()

    def count(self, call, trial):
        self.names[trial.name] += 1
        self.idle += trial.idle
        if trial.report.faults:
            self.fail(call, trial.name, trial.report.faults)
        self.compare(trial.report.shares)

    def fail(self, call, name, texts):
        self.failed += 1
        self.faults.append((call, name, texts))

    def compare(self, shares):
        for name, share in shares.items():
            self.shares[name] = max(share, self.shares.get(name, 0))

    def add(self, other):
        self.names += other.names
        self.idle += other.idle
        self.failed += other.failed
        self.faults += other.faults
        self.compare(other.shares)


def make_calls(seed, calls):
    """Make some calls; an exception is a fault."""
    tally = Tally()
    for call in calls:
        try:
            with lost_exceptions() as lost:
                trial = Trial(Seeded(seed, call))
            trial.report.faults += lost
            tally.count(call, trial)
        except Exception as error:
            tally.names["unexpected error"] += 1
            tally.fail(call, "unexpected error", [f"{type(error).__name__}: {error}"])
    return tally


@contextlib.contextmanager
def lost_exceptions():
    """Collect those that nobody can catch: of a kernel, in a build that checks indices."""
    lost, usual = [], sys.unraisablehook
    sys.unraisablehook = lambda what: lost.append(f"lost: {what.exc_value!r} in {what.object!r}")
    try:
        yield lost
    finally:
        sys.unraisablehook = usual


def attach(current):
    """Prepare a process: let it say which call it is in, and where it hangs or dies."""
    global _current
    _current = current
    faulthandler.enable()


def make_chunk(seed, chunk, calls):
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    tally = Tally()
    for call in calls:
        _current[chunk] = call
        tally.add(make_calls(seed, [call]))
    faulthandler.cancel_dump_traceback_later()
    return tally


def run(seed, calls, jobs):
    """Make so many calls in so many processes; return their tally."""
    chunks = [range(first, min(calls, first + CHUNK)) for first in range(0, calls, CHUNK)]
    context = multiprocessing.get_context("spawn")  # a forked child would have one thread
    current = context.Array("q", [-1] * len(chunks), lock=False)
    tally = Tally()
    with (
        tqdm(total=calls, unit="call", disable=None) as bar,
        ProcessPoolExecutor(jobs, context, attach, (current,)) as pool,
    ):
        futures = {pool.submit(make_chunk, seed, *chunk): chunk for chunk in enumerate(chunks)}
        for future in as_completed(futures):
            number, chunk = futures[future]
            part = result_of(future, current[number])
            show(seed, part, SHOWN - tally.failed)
            tally.add(part)
            bar.update(len(chunk))
    return tally


def result_of(future, call):
    """Return what a chunk came to; where a process died, a fault of the call that it was in."""
    try:
        return future.result()
    except BrokenProcessPool:
        tally = Tally()
        if call >= 0:
            tally.fail(call, "died", ["this call, or one beside it, ended a process"])
        return tally


def show(seed, tally, most=SHOWN):
    """Print faults, and how to see each again."""
    for call, name, texts in tally.faults[: max(0, most)]:
        lines = [f"call {call} ({name}): python tests/fuzz.py --seed {seed} --only {call}", *texts]
        tqdm.write("\n    ".join(lines))


def summary(seed, tally, seconds):
    counts = ", ".join(f"{name} {count}" for name, count in sorted(tally.names.items()))
    near = sorted(tally.shares.items(), key=lambda item: -item[1])
    return (
        f"largest shares of a bound: {', '.join(f'{name} {share:.2f}' for name, share in near)}\n"
        f"{tally.calls} calls of seed {seed} in {seconds:.0f} s ({counts}): "
        f"{tally.idle} could not have failed, {tally.failed} failed"
    )


def is_good(tally, calls):
    enough = tally.calls < ENOUGH or tally.idle <= (1 - FLOOR) * tally.calls
    if not enough:
        print(f"more than {1 - FLOOR:.0%} of the calls could not have failed")
    if tally.calls < calls:
        print(f"{calls - tally.calls} calls were not made")
    return enough and not tally.failed and tally.calls == calls


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="drawn if not given")
    parser.add_argument("--only", type=int, metavar="K", help="make call K alone, in this process")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        default=os.cpu_count(),
        help="processes that make calls; 0: this one, for tools that look into it",
    )
    args = parser.parse_args(arguments)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    start = time.monotonic()
    calls = range(args.calls) if args.only is None else [args.only]
    print(f"seed {seed}", flush=True)
    if args.only is None and args.jobs:
        tally = run(seed, args.calls, args.jobs)
    else:
        tally = make_calls(seed, calls)
        show(seed, tally)
    print(summary(seed, tally, time.monotonic() - start))
    return 0 if is_good(tally, len(calls)) else 1


if __name__ == "__main__":
    sys.exit(main())
