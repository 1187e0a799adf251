"""The caller's end of a worker: starts the process, asks it, and stops it while others are timed.

While one worker is timed the others are stopped by SIGSTOP, so that no idle thread pool spins on a
CPU.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys

import worker
from worker import Absent, WrongResult

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_PROC_BIND")


@contextlib.contextmanager
def interrupts_held():
    """Let Ctrl-C wait; a process that is started here never gets it."""
    waiting = []
    handler = signal.signal(signal.SIGINT, lambda *_: waiting.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a child inherits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if waiting:
        raise KeyboardInterrupt


class Worker:
    """The caller's handle of a library in a process of its own, stopped unless asked."""

    def __init__(self, name, threads):
        self.name, self.threads = name, threads
        unwanted = (*THREAD_VARIABLES, *WAIT_VARIABLES)
        environment = {k: v for k, v in os.environ.items() if k not in unwanted}
        environment.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
        self._process = None
        try:
            with interrupts_held():  # until there is a process to end
                self._process = subprocess.Popen(
                    [sys.executable, worker.__file__, name, str(threads)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            self._answer()
        except BaseException:  # Ctrl-C, too, which may come before there is a process
            if self._process is not None:
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
