"""Limits of the system: little memory, no more threads, small stacks."""

import os
import subprocess
import sys
import textwrap

import pytest

from bn_cy import show_config

needs_openmp = pytest.mark.skipif(
    not show_config(mode="dicts")["openmp"], reason="this build is serial"
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")

LIMIT = """
import resource
import numpy as np
import bn_cy

def limit_address_space(room):
    with open("/proc/self/statm") as sizes:
        pages = int(sizes.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, -1))

"""


@pytest.fixture
def python(tmp_path):
    """Return a function that runs a program, after LIMIT, in a process of its own."""

    def run(program, **environment):
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", LIMIT + textwrap.dedent(program)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )

    return run


@needs_linux
def test_without_memory_a_layer_raises_and_then_goes_on(rng, python):
    program = f"""
        rng = np.random.default_rng({int(rng.integers(2**32))})
        x, out = rng.standard_normal((2, 1 << 17, 64)).astype(np.float32)
        layer = bn_cy.BatchNorm(64)
        layer(x, out=out)
        expected = layer.backward(x, cache=layer.cache)
        state = layer.state_dict()
        bn_cy.set_num_threads(1)
        limit_address_space(16 << 20)  # an array has 32 MB
        for call in (layer, layer.backward, bn_cy.batchnorm_forward, lambda x: layer.eval()(x)):
            try:
                call(x)
            except MemoryError:
                print("MemoryError")
        layer.train().backward(x, out=out)
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_equal(layer.state_dict(), state)
        layer.backward(layer(x))
        print("done")
    """
    result = python(program)
    assert result.stdout.split() == ["MemoryError"] * 4 + ["done"], result.stderr


ONE_CALL = """
    bn_cy.set_num_threads({threads})
    limit_address_space(256 << 20)
    bn_cy.batchnorm_forward(np.ones((20_000, 64)))
    print("done")
"""


@needs_linux
@needs_openmp
def test_where_no_thread_can_be_made_one_is_enough(python):
    result = python(ONE_CALL.format(threads=1), OMP_STACKSIZE="1G")
    assert result.stdout.split() == ["done"], result.stderr


@needs_linux
@needs_openmp
def test_where_no_thread_can_be_made_openmp_ends_the_process(python):
    """As the docs say: the runtime gives nobody a chance to ask for fewer."""
    result = python(ONE_CALL.format(threads=2), OMP_STACKSIZE="1G")
    assert result.returncode > 0
    assert result.stdout == ""
    assert "hread" in result.stderr
