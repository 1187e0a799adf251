"""What every test shares: the check of what is under test, and seeded random numbers."""

import importlib.util
import json
import secrets
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


def refuse_source_folder():
    """Stop unless the bn_cy that tests import is one that pip installed."""
    package = find_package()
    if package is None:
        raise pytest.UsageError('bn_cy is not installed: run pip install ".[test]" first')
    if package == CHECKOUT / "bn_cy" and not installed_editable():
        raise pytest.UsageError(
            f"the tests would import the source folder {package}, not the installed bn_cy: "
            "run plain `pytest` (`python -m pytest` and PYTHONPATH put the checkout on sys.path)"
        )


def find_package():
    spec = importlib.util.find_spec("bn_cy")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def installed_editable():
    try:
        origin = distribution("bn_cy").read_text("direct_url.json")
    except PackageNotFoundError:
        return False
    return json.loads(origin or "{}").get("dir_info", {}).get("editable", False)
