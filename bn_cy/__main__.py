"""`python -m bn_cy`: the configuration, and a self-test of some seconds.

The last line is one to paste into a report. The exit status is 1 if a check fails.
"""

import argparse
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

import bn_cy
from bn_cy import _digests, reference

SHAPES = [((16, 3), 1), ((3, 4, 3, 2), 1), ((2, 2, 3, 4), -1)]  # rows, images, channels last
PRECISION = 1e-8  # of gradients of about 1; the differences themselves have 11 digits
PATIENCE = 30  # seconds for a child: one that waits for threads it lacks never ends


class Failure(Exception):
    """What a check found."""


def check_gradients() -> str:
    """Compare the backward with finite differences, for random upstream gradients."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    rng = np.random.default_rng(seed)
    worst = max(gradient_error(rng, shape, axis) for shape, axis in SHAPES)
    if not worst < PRECISION:
        raise Failure(f"{worst:.1e} from finite differences, seed {seed}")
    return f"within {worst:.1e} of finite differences, seed {seed}"


def gradient_error(rng: np.random.Generator, shape: tuple[int, ...], axis: int) -> float:
    """Return the largest error of dx, dgamma and dbeta."""
    x, dout = rng.standard_normal((2, *shape))
    gamma, beta = rng.standard_normal((2, shape[axis]))

    def y(x: Any, gamma: Any, beta: Any) -> Any:
        return bn_cy.batchnorm_forward(x, gamma, beta, axis=axis)[0]

    _, cache = bn_cy.batchnorm_forward(x, gamma, beta, axis=axis)
    dx, dgamma, dbeta = bn_cy.batchnorm_backward(dout, cache)
    errors = (
        reference.check_gradient(lambda x: y(x, gamma, beta), x, dout, dx),
        reference.check_gradient(lambda gamma: y(x, gamma, beta), gamma, dout, dgamma),
        reference.check_gradient(lambda beta: y(x, gamma, beta), beta, dout, dbeta),
    )
    return max(float(error.max()) for error in errors)


def check_digests() -> str:
    """Compare the bits of results with the committed ones, for one thread and for all."""
    expected = _digests.committed()
    counts = sorted({1, bn_cy.get_num_threads()})
    for threads in counts:
        lines = zip(_digests.lines_of(0, threads), expected, strict=True)
        differing = [line.partition("\t")[0] for line, right in lines if line != right]
        if differing:
            raise Failure(f"other bits with {threads} threads in {', '.join(differing)}")
    config = bn_cy.show_config(mode="dicts")
    others = [f"{name} not run" for name in config["built"] if name != config["variant"]]
    numbers = " and ".join(map(str, counts))
    done = f"{config['variant']} has the committed bits with {numbers} threads"
    return "; ".join([done, *others])


def check_fork() -> str:
    """Compute in a forked child, which an OpenMP runtime does not survive."""
    if not hasattr(os, "fork"):
        return "not run: the system has none"
    x = np.random.default_rng(0).standard_normal((20000, 64))
    expected = _digests.digest(*_digests.step(bn_cy.BatchNorm(64, dtype=np.float64), x, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork of a process with threads
        child = os.fork()
    if child == 0:
        same = False
        try:
            layer = bn_cy.BatchNorm(64, dtype=np.float64)
            same = _digests.digest(*_digests.step(layer, x, x)) == expected
        finally:
            os._exit(0 if same else 1)
    if status_of(child) != 0:
        raise Failure("a child computes something else, or hangs")
    return "a child has the same bits"


def status_of(child: int) -> int:
    """Return the status of a child, which is ended if it hangs."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


CHECKS: dict[str, Callable[[], str]] = {
    "gradients": check_gradients,
    "digests": check_digests,
    "fork": check_fork,
}


def failed_checks() -> list[str]:
    """Run the checks and print what they say; return the names of those that failed."""
    failed = []
    for name, check in CHECKS.items():
        try:
            said = check()
        except Exception as error:  # whatever it is belongs into the report
            failed.append(name)
            said = f"FAILED: {type(error).__name__}: {error}"
        print(f"{name:10} {said}", flush=True)
    return failed


def report(failed: list[str]) -> str:
    """Return the line for a report."""
    config = bn_cy.show_config(mode="dicts")
    runtime = os.path.basename(config["runtime"] or "OpenMP") if config["openmp"] else "no OpenMP"
    words = [
        f"bn_cy {config['version']}",
        f"NumPy {config['numpy']}",
        f"Python {config['python']}",
        config["platform"],
        config["compiler"],
        f"{config['variant']} of {' '.join(config['built'])}",
        f"{runtime}, {config['threads']} threads",
        f"self-test {'FAILED: ' + ', '.join(failed) if failed else 'passed'}",
    ]
    return " | ".join(words)


def main() -> int:
    """Print the configuration, run the checks, print the report; return the exit status."""
    argparse.ArgumentParser(prog="python -m bn_cy", description=__doc__).parse_args()
    bn_cy.show_config()
    print()
    failed = failed_checks()
    bn_cy.set_num_threads(None)
    print()
    print(report(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
