"""The C API: the bits of the functions of Python, its contract, its version, and its consumers."""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import table
from exact import parameters
from table import INVALID, MEAN, NO_MEMORY, OK, STATISTICS, VAR, Functions

import bn_cy
from bn_cy import capi

PACKAGE = Path(bn_cy.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "capi.md"
DTYPES = [np.float32, np.float64]
EPS = 1e-3

SHAPES = [  # (outer, features, inner), one for every way in which an array is walked
    (33, 70, 1),
    (5000, 37, 1),
    (4097, 1, 1),  # a single feature, whose values are one run
    (40, 700, 1),
    (28, 200, 1),
    (7, 20, 15),
    (1, 7, 5001),
    (2, 3, 9001),
    (33, 3, 196),
]

# What the numbers of the two ABIs stand for: a hash of the declarations without their comments. A
# change of these is a new number and a new line here.
DECLARED = {
    "bn_cy.h": {1: "e9a86f391377700a"},
    "kernels/__init__.pxd": {1: "71f307315bc71a5a", 2: "5c2281e116c9315a", 3: "4becf2211b9f9034"},
}


def draw(rng, shape, dtype):
    x, dout = (3 + rng.standard_normal((2, *shape))).astype(dtype)
    return x, dout, *parameters(rng, shape[1], dtype)


def unwritten(*shape, dtype=np.float64):
    return np.full(shape, np.nan, dtype)


def by_python(x, dout, gamma, beta):
    """Return the results of the four verbs, and then of both passes."""
    count, mean, var = bn_cy.moments(x)
    y = bn_cy.normalize(x, mean, var, gamma, beta, EPS)
    sums = bn_cy.gradient_sums(dout, x, mean, var, EPS)
    dx = bn_cy.input_gradient(dout, x, mean, var, gamma, EPS, *sums, count)
    whole, cache = bn_cy.batchnorm_forward(x, gamma, beta, EPS)
    passes = whole, cache.mean, cache.var, *bn_cy.batchnorm_backward(dout, cache)
    return [mean, var, y, *sums, dx, *(array for array in passes if array is not None)]


def by_table(x, dout, gamma, beta, threads):
    c, (outer, features, inner) = Functions(x.dtype), x.shape
    size = outer, features, inner, threads
    mean, var, sum_dout, sum_xhat = unwritten(4, features)
    y, dx, whole, dx_whole = unwritten(4, *x.shape, dtype=x.dtype)
    dgamma, dbeta = unwritten(2, features, dtype=x.dtype)
    saved = unwritten(STATISTICS, features)
    assert c.moments(mean, var, x, *size) == OK
    assert c.normalize(y, x, mean, var, gamma, beta, EPS, *size) == OK
    assert c.gradient_sums(sum_dout, sum_xhat, dout, x, mean, var, EPS, *size) == OK
    sums = sum_dout, sum_xhat, outer * inner
    assert c.input_gradient(dx, dout, x, mean, var, gamma, EPS, *sums, *size) == OK
    assert c.forward(whole, saved, x, gamma, beta, EPS, *size) == OK
    dgamma, dbeta = None if gamma is None else dgamma, None if beta is None else dbeta
    assert c.backward(dx_whole, dgamma, dbeta, dout, x, saved, *size) == OK
    passes = whole, saved[MEAN], saved[VAR], dx_whole, dgamma, dbeta
    return [
        mean, var, y, sum_dout, sum_xhat, dx, *(array for array in passes if array is not None)
    ]  # fmt: skip


def assert_same_bits(got, expected):
    assert [a.tobytes() for a in got] == [a.tobytes() for a in expected]


# The bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_python(rng, shape, dtype):
    x, dout, gamma, beta = draw(rng, shape, dtype)
    for parameters_of in ((gamma, beta), (gamma, None), (None, beta), (None, None)):
        expected = by_python(x, dout, *parameters_of)
        for threads in (1, 2, 5):
            assert_same_bits(by_table(x, dout, *parameters_of, threads), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_python_from_eight_threads_at_once(rng, dtype):
    cases = [draw(rng, shape, dtype) for shape in SHAPES]
    expected = [by_python(*case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for k, got in enumerate(pool.map(lambda k: by_table(*cases[k % len(cases)], 2), range(90))):
            assert_same_bits(got, expected[k % len(cases)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(rng, dtype):
    x, dout, gamma, beta = draw(rng, (300, 70, 1), dtype)
    mean, var, y, *_, whole, _, _, dx, _, _ = by_python(x, dout, gamma, beta)
    c, size, saved = Functions(dtype), (300, 70, 1, 2), unwritten(STATISTICS, 70)
    into = x.copy()
    assert c.normalize(into, into, mean, var, gamma, beta, EPS, *size) == OK
    assert_same_bits([into], [y])
    into = x.copy()
    assert c.forward(into, saved, into, gamma, beta, EPS, *size) == OK
    assert_same_bits([into], [whole])
    into = dout.copy()
    assert c.backward(into, None, None, into, x, saved, *size) == OK
    assert_same_bits([into], [dx])


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_statistics_have_an_infinite_count(rng, dtype):
    x, dout, gamma, _ = draw(rng, (50, 30, 4), dtype)
    mean, var, *sums = np.abs(rng.standard_normal((4, 30)))
    _, cache = bn_cy.frozen_forward(x, mean, var, gamma, eps=EPS)
    dx = unwritten(*x.shape, dtype=dtype)
    arguments = dx, dout, x, mean, var, gamma, EPS, *sums, np.inf, *x.shape, 2
    assert Functions(dtype).input_gradient(*arguments) == OK
    assert_same_bits([dx], [bn_cy.batchnorm_backward(dout, cache)[0]])


# The contract


@pytest.mark.parametrize("shape", [(0, 5, 1), (4, 5, 0), (4, 0, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_batch_has_sums_of_zero(shape, dtype):
    x = np.empty(shape, dtype)
    for array in by_table(x, x, *np.ones((2, shape[1]), dtype), 2):
        assert not array.any()


@pytest.mark.parametrize(
    "wrong",
    [(-1, 5, 1, 1), (4, -5, 1, 1), (4, 5, -1, 1), (4, 5, 1, 0), (4, 5, 1, -2)],
)
def test_sizes_and_threads_that_are_refused(wrong):
    c, x, row = Functions(np.float64), unwritten(4, 5), unwritten(6, 5)
    calls = {
        "moments": (row, row, x),
        "normalize": (x, x, row, row, None, None, EPS),
        "gradient_sums": (row, row, x, x, row, row, EPS),
        "input_gradient": (x, x, x, row, row, None, EPS, row, row, 4.0),
        "forward": (x, row, x, None, None, EPS),
        "backward": (x, row, row, x, x, row),
    }
    assert list(calls) == list(table.declared())
    for name, arguments in calls.items():
        assert getattr(c, name)(*arguments, *wrong) == INVALID, name
    assert np.isnan(x).all()
    assert np.isnan(row).all()


@pytest.mark.parametrize("eps", [-1e-9, np.inf, np.nan])
def test_an_eps_that_is_refused(eps):
    c, x, row, size = Functions(np.float64), np.ones((4, 5)), np.ones((6, 5)), (4, 5, 1, 1)
    assert c.normalize(x, x, row, row, None, None, eps, *size) == INVALID
    assert c.gradient_sums(row, row, x, x, row, row, eps, *size) == INVALID
    assert c.input_gradient(x, x, x, row, row, None, eps, row, row, 4.0, *size) == INVALID
    assert c.forward(x, row, x, None, None, eps, *size) == INVALID


@pytest.mark.parametrize("count", [0, -1, np.nan])
def test_a_count_that_is_refused(count):
    x, row = np.ones((4, 5)), np.ones((6, 5))
    arguments = x, x, x, row, row, None, EPS, row, row, count, 4, 5, 1, 1
    assert Functions(np.float64).input_gradient(*arguments) == INVALID


def test_without_memory_nothing_is_touched():
    """A scratch that no machine has, of a batch that is empty."""
    c, size = Functions(np.float32), (0, 1 << 54, 1, 1)
    assert c.moments(None, None, None, *size) == NO_MEMORY
    assert c.normalize(None, None, None, None, None, None, EPS, *size) == NO_MEMORY
    assert c.gradient_sums(None, None, None, None, None, None, EPS, *size) == NO_MEMORY


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no fork")
def test_a_forked_child_has_one_thread_whatever_it_asks_for(run):
    """With two it would wait without end for threads that it lacks."""
    run(
        """
        import test_capi

        case = test_capi.draw(rng, (20000, 64, 1), np.float32)
        expected = test_capi.by_table(*case, 2)
        child = os.fork()
        if child == 0:
            test_capi.assert_same_bits(test_capi.by_table(*case, 2), expected)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print("done")
        """,
        start=f"""
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork of a process with threads
sys.path.append({str(Path(__file__).parent)!r})
import numpy as np
rng = np.random.default_rng({{seed}})
""",
    )


# The version


def declarations(path):
    """Return the words of a file of declarations that are no comments."""
    text = re.sub(r"/\*.*?\*/", "", (PACKAGE / path).read_text(), flags=re.DOTALL)
    comment = r"#(?!define).*" if path.endswith(".pxd") else r"//.*"
    return re.sub(comment, "", text).split()


@pytest.mark.parametrize(
    ("path", "pattern"),
    [("bn_cy.h", r"BN_CY_ABI (\d+)"), ("kernels/__init__.pxd", r'"bn_cy\.kernels/(\d+)"')],
)
def test_a_change_of_what_is_declared_raises_the_number(path, pattern):
    words = declarations(path)
    number = int(re.search(pattern, " ".join(words))[1])
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
    assert DECLARED[path].get(number) == digest, f"raise the number, or add {number}: {digest!r}"


def test_the_capsule_has_the_number_in_its_name():
    number = re.search(r"BN_CY_ABI (\d+)", table.HEADER)[1]
    assert table.CAPSULE.decode() == f"bn_cy.capi.ABI_{number}"
    assert table.import_capsule(table.CAPSULE)


def test_who_was_compiled_against_another_number_is_refused():
    with pytest.raises(AttributeError, match="ABI_0"):
        table.import_capsule(b"bn_cy.capi.ABI_0")


def test_cython_and_c_have_the_same_declarations():
    declared = (PACKAGE / "capi.pxd").read_text()
    for_cython = re.findall(r"^cdef int (\w+)\((.*?)\) noexcept nogil", declared, re.M | re.S)
    for_c = re.findall(r"int \(\*(\w+)\)\((.*?)\);", table.HEADER.replace("\\\n", ""), re.S)
    assert [(name, re.sub(r"\bfloating\b", "T", text).split()) for name, text in for_cython] == [
        (name, text.split()) for name, text in for_c
    ]
    for name, value in re.findall(r"^    ([A-Z_]+) = (-?\d+)", declared, re.M):
        assert f"BN_CY_{name} = {value}" in table.HEADER


# Consumers, compiled against what is installed


def missing():
    """Return what is not here of all that a consumer needs to be compiled."""
    compiler = (sysconfig.get_config_var("CC") or "cl").split()[0]
    found = {
        "Cython": importlib.util.find_spec("Cython"),
        "setuptools": importlib.util.find_spec("setuptools"),
        f"a C compiler, {compiler}": shutil.which(compiler),
    }
    return [name for name, there in found.items() if not there]


@pytest.fixture(scope="module")
def consumers(tmp_path_factory):
    """Compile the files of the page, and return their two modules."""
    if lacking := missing():
        pytest.skip(f"consumers of the C API are not compiled: no {', no '.join(lacking)}")
    folder = tmp_path_factory.mktemp("consumers")
    blocks = re.findall(r"^```(?:cython|c|python)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    for block in blocks:
        name = re.match(r"(?:# |/\* )([\w.]+)", block)[1]
        (folder / name).write_text(block)
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "warning" not in result.stderr, result.stderr
    return [load(folder, name) for name in ("verbs", "passes")]


def load(folder, name):
    path = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_consumer_in_cython(rng, consumers, dtype):
    verbs, _ = consumers
    x, dout, gamma, _ = draw(rng, (1000, 70, 1), dtype)
    _, _, expected_y, _, _, expected_dx, *_ = by_python(x, dout, gamma, None)
    x, dout = x[..., 0], dout[..., 0]

    def step(threads):
        y, dx = unwritten(2, *x.shape, dtype=dtype)
        verbs.step(y, dx, x, dout, gamma, EPS, threads)
        return y, dx

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(step, [1, 2, 3] * 4):
            assert_same_bits(got, [expected_y, expected_dx])
    with pytest.raises(ValueError, match="threads"):
        step(0)


def test_the_consumer_in_c(rng, consumers):
    _, passes = consumers
    x, dout, gamma, beta = draw(rng, (1000, 70, 1), np.float32)
    *_, y, _, _, dx, dgamma, dbeta = by_python(x, dout, gamma, beta)

    def step(threads):
        got = [np.full_like(array, np.nan) for array in (y, dx, dgamma, dbeta)]
        passes.step(*got, x, dout, gamma, beta, EPS, threads)
        return got

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(step, [1, 2, 3] * 4):
            assert_same_bits(got, [y, dx, dgamma, dbeta])
    with pytest.raises(ValueError, match="threads"):
        step(0)


def test_the_folder_of_the_header():
    assert Path(capi.get_include(), "bn_cy.h").is_file()
