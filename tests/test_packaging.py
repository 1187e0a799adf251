"""What was installed: version, configuration, typing, docstrings, and what an import brings in."""

import contextlib
import importlib.metadata
import inspect
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest

import bn_cy

VARIANTS = {"v2", "v3", "v4", "plain"}


def run_python(code, folder):
    """Run code in a fresh interpreter, in a folder without a bn_cy; return the words it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_version_is_that_of_the_distribution():
    assert bn_cy.__version__ == importlib.metadata.version("bn_cy")


def test_wheel_ships_the_typing_marker_and_declarations():
    shipped = {path.name for path in Path(bn_cy.__file__).parent.iterdir()}
    assert {"py.typed", "__init__.pxd", "bn_cy.h", "capi.pxd", "digests.txt"} <= shipped


def test_description_has_no_link_that_leads_nowhere_on_a_package_index():
    description = importlib.metadata.metadata("bn_cy")["Description"]
    assert "BatchNorm(64)" in description
    assert re.findall(r"\]\((?!https?:)|<img", description) == []


@pytest.mark.parametrize("name", sorted(set(bn_cy.__all__) - {"__version__"}))
def test_public_name_is_documented(name):
    assert inspect.getdoc(getattr(bn_cy, name))


def test_configuration_has_every_fact():
    config = bn_cy.show_config(mode="dicts")
    assert config["variant"] in VARIANTS
    assert isinstance(config["openmp"], bool)
    assert config["threads"] == bn_cy.get_num_threads()
    assert config["flags"]
    assert config["version"] == bn_cy.__version__
    assert config["numpy"] == np.__version__
    assert config["python"] == platform.python_version()
    assert config["platform"] == platform.platform()
    assert set(config["supported"]) == set(config["built"]) & {*config["levels"], "plain"}
    assert config["compiler"].split()[0] in {"GCC", "Clang", "Apple", "Debian", "Ubuntu", "MSVC"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_configuration_names_the_runtime_that_is_loaded():
    loaded = {os.path.realpath(word) for word in Path("/proc/self/maps").read_text().split()}
    config = bn_cy.show_config(mode="dicts")
    assert (config["runtime"] is not None) == config["openmp"]
    assert not config["openmp"] or os.path.realpath(config["runtime"]) in loaded


def test_configuration_is_printed(capsys):
    config = bn_cy.show_config(mode="dicts")
    assert bn_cy.show_config() is None
    printed = capsys.readouterr().out
    for fact in (config["variant"], str(config["threads"]), config["flags"]):
        assert fact in printed


def test_a_configuration_of_no_known_mode_is_refused():
    with pytest.raises(ValueError, match=r"mode must be .*, got 'json'"):
        bn_cy.show_config(mode="json")


def test_flags_leave_floating_point_alone():
    flags = bn_cy.show_config(mode="dicts")["flags"].split()
    assert "-ffast-math" not in flags
    assert "-ffp-contract=off" in flags or "/fp:precise" in flags


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_configuration_says_truly_whether_openmp_is_in(tmp_path):
    code = "import bn_cy; print(*open('/proc/self/maps').read().split())"
    loaded = run_python(code, tmp_path)
    runtime = any("libgomp" in word or "libomp" in word for word in loaded)
    assert bn_cy.show_config(mode="dicts")["openmp"] == runtime


def test_import_is_light(tmp_path):
    code = "import sys, bn_cy; print(*sys.modules)"
    modules = run_python(code, tmp_path)
    loaded = {name.partition(".")[0] for name in modules}
    heavy = {"dask", "jax", "matplotlib", "mpi4py", "scipy", "sklearn", "torch", "tqdm", "Cython"}
    assert not loaded & heavy
    assert not {"importlib.metadata", "bn_cy.graph"} & set(modules)


def test_import_adds_no_pathlib_to_what_numpy_imports(tmp_path):
    code = "import sys, numpy; old = {*sys.modules}; import bn_cy; print(*{*sys.modules} - old)"
    added = set(run_python(code, tmp_path))
    assert "bn_cy.layer" in added
    assert not {"pathlib", "urllib.parse"} & added  # half the time of an import


def test_without_pytorch_its_module_says_what_to_install(tmp_path):
    code = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import bn_cy
try:
    bn_cy.torch
except ModuleNotFoundError as error:
    print(error)
"""
    assert " ".join(run_python(code, tmp_path)) == ("bn_cy.torch needs torch: pip install torch")


@pytest.mark.parametrize(
    ("place", "refused"),
    [("bn_cy", True), (".venv/lib/python3/site-packages/bn_cy", False)],
)
def test_tests_refuse_the_source_folder_alone(monkeypatch, place, refused):
    monkeypatch.setattr(conftest, "find_package", lambda: conftest.CHECKOUT / place)
    monkeypatch.setattr(conftest, "installed_editable", lambda: False)
    with pytest.raises(pytest.UsageError) if refused else contextlib.nullcontext():
        conftest.refuse_source_folder()
