"""What every test shares: the check of what is under test, and seeded random numbers."""

import json
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import warnings
import zlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import hypothesis
import numpy as np
import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

# No deadline: a slow machine is no failure.
hypothesis.settings.register_profile("bn_cy", deadline=None, print_blob=True)
hypothesis.settings.load_profile("bn_cy")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="repeat the random numbers of an earlier run")


def pytest_configure(config):
    refuse_source_folder()
    if config.option.seed is None:
        config.option.seed = secrets.randbits(32)


def pytest_report_header(config):
    return f"bn_cy: {find_package()}\nrandom numbers: --seed={config.option.seed}"


@pytest.fixture
def rng(request):
    """Give a generator that depends on the seed of the run and the name of the test alone."""
    test = zlib.crc32(request.node.nodeid.encode())
    return np.random.default_rng([request.config.option.seed, test])


@pytest.fixture
def settings():
    """Leave the number of threads, and from when on outputs go past the cache, as they were."""
    from bn_cy import functional, set_num_threads  # once it is known to be the installed one

    before = functional._stream_from(0)
    functional._stream_from(before)
    yield
    functional._stream_from(before)
    set_num_threads(None)


@pytest.fixture
def python(tmp_path):
    """Return a function that runs Python code, or a file, in a process of its own."""

    def run(*arguments, **environment):
        inherited = {
            k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "BN_CY_ISA")
        }
        return subprocess.run(
            [sys.executable, "-W", "error", *map(str, arguments)],
            env={**inherited, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def run(rng, tmp_path):
    """Return a function that runs a program, in parts, in a process of its own.

    It must end well and say nothing but what is expected; all that it has started ends with it.
    """

    def run(program, *, start="", rest="", expected="done", **environment):
        file = tmp_path / "program.py"
        start = start.format(seed=int(rng.integers(2**32)))
        file.write_text(f"{start}\n{textwrap.dedent(program)}\n{textwrap.dedent(rest)}")
        inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        process = subprocess.Popen(
            [sys.executable, "-W", "error", file],
            env={**inherited, **environment},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"hangs; it said {out!r} and {err!r}")
        assert process.returncode == 0, err
        assert err == ""
        assert out.split() == expected.split()

    return run


def refuse_source_folder():
    """Stop unless the bn_cy that tests import is one that pip installed, and not a stale one."""
    package = find_package()
    if package is None:
        raise pytest.UsageError('bn_cy is not installed: run pip install ".[test]" first')
    if package == CHECKOUT / "bn_cy" and not installed_editable():
        raise pytest.UsageError(
            f"the tests would import the source folder {package}, not the installed bn_cy: "
            'remove its compiled modules, or make it the installed one by pip install -e ".[test]"'
        )


def find_package():
    """Return the folder that `import bn_cy` finds: in the root of a checkout, not the first one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            import bn_cy
    except ModuleNotFoundError:
        return None
    except (ImportError, RuntimeWarning) as error:
        raise pytest.UsageError(str(error)) from None
    return Path(bn_cy.__file__).resolve().parent


def installed_editable():
    try:
        origin = distribution("bn_cy").read_text("direct_url.json")
    except PackageNotFoundError:
        return False
    return json.loads(origin or "{}").get("dir_info", {}).get("editable", False)
