"""A checkout: what Python imports that starts in its root, and stale modules, which are noticed.

Checkouts are made of the package under test: its Python, with or without its compiled modules, and
the name of a source.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bn_cy

PACKAGE = Path(bn_cy.__file__).parent
NOW = time.time()
EDITABLE = (PACKAGE / "functional.pyx").exists()  # nothing to find for another checkout


@pytest.fixture
def checkout(tmp_path):
    """Return a function that makes a checkout; all its files are of one moment."""

    def make(*, built):
        root = tmp_path / "checkout"
        unbuilt = () if built else ("*.so", "*.pyd")
        shutil.copytree(PACKAGE, root / "bn_cy", ignore=shutil.ignore_patterns(*unbuilt))
        for source in ("functional.pyx", "kernels/sums.pxi"):
            (root / "bn_cy" / source).touch()
        date(root.rglob("*.*"), NOW - 60)
        return root

    return make


def date(paths, moment):
    for path in paths:
        os.utime(path, (moment, moment))


def start(folder, code, *options):
    """Run code by `python -c`, which looks for modules in its folder first."""
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def imported(folder):
    """Return where `bn_cy` and `bn_cy.layer` come from; there is no warning."""
    done = start(
        folder, "import bn_cy, bn_cy.layer as l; print(bn_cy.__file__, l.__file__)", "-Werror"
    )
    assert done.returncode == 0, done.stderr
    return [Path(word).parent for word in done.stdout.split()]


@pytest.mark.skipif(EDITABLE, reason="the package is not installed by itself")
def test_in_the_root_of_a_checkout_the_installed_package_is_imported(checkout, tmp_path):
    root = checkout(built=False)
    date(root.rglob("*.*"), 0)  # older than what is installed
    assert imported(root) == imported(tmp_path) == [PACKAGE, PACKAGE]


def test_a_checkout_that_was_built_in_place_is_the_package(checkout):
    root = checkout(built=True)
    assert imported(root) == [root / "bn_cy"] * 2


def test_a_checkout_without_anything_built_or_installed_says_what_to_do(checkout):
    root = checkout(built=False)
    done = start(root, "import numpy, sys; sys.path[1:] = []; import bn_cy")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: bn_cy is imported from its source folder")
    assert last.endswith(f'run `pip install -e ".[dev]"` in {root}')


@pytest.mark.parametrize(
    ("built", "source", "command"),
    [
        (True, "functional.pyx", "python setup.py build_ext --inplace"),
        (True, "kernels/sums.pxi", "python setup.py build_ext --inplace"),
        (True, "kernels/__init__.pxd", "python setup.py build_ext --inplace"),
        (False, "kernels/sums.pxi", 'pip install -e ".[dev]"'),
        (False, "layer.py", 'pip install -e ".[dev]"'),
    ],
)
def test_a_source_that_is_newer_than_what_was_built_is_a_warning(checkout, built, source, command):
    if EDITABLE and not built:
        pytest.skip("the package is not installed by itself")
    root = checkout(built=built)
    date([root / "bn_cy" / source], NOW + 60)
    done = start(root, "import bn_cy")
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert f"run `{command}` in {root}" in warning
    assert warning.startswith("<string>:1: RuntimeWarning: ")  # the line that imports


def test_python_that_was_changed_in_a_built_checkout_needs_no_build(checkout):
    root = checkout(built=True)
    date([root / "bn_cy" / "layer.py"], NOW + 60)
    assert imported(root) == [root / "bn_cy"] * 2


def test_an_installed_package_looks_for_no_sources(tmp_path):
    done = start(tmp_path, "import sys, bn_cy; print('bn_cy._checkout' in sys.modules)")
    assert done.stdout.split() == [str(EDITABLE)]
