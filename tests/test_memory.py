"""What a call leaves behind: no references, no memory; and inputs that cannot be written."""

import gc
import sys
import types
import weakref
from pathlib import Path

import exact
import numpy as np
import pytest
from builds import optimized
from exact import error

from bn_cy import (
    BatchNorm,
    MicroBatch,
    batchnorm_backward,
    batchnorm_forward,
    frozen_forward,
    gradient_sums,
    input_gradient,
    moments,
    normalize,
)

on_linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


# References


def draw(rng, shape, dtype=np.float32):
    """Return all that the functions take, by name."""
    drawn = types.SimpleNamespace()
    drawn.x, drawn.dout, drawn.residual = rng.standard_normal((3, *shape)).astype(dtype)
    drawn.gamma, drawn.beta = exact.parameters(rng, shape[1], dtype)
    drawn.count, drawn.mean, drawn.var = moments(drawn.x)
    drawn.sum_dout, drawn.sum_dout_xhat = gradient_sums(drawn.dout, drawn.x, drawn.mean, drawn.var)
    drawn.out = np.empty_like(drawn.x)
    return drawn


def forward_and_backward(a, **more):
    y, cache = batchnorm_forward(a.x, a.gamma, a.beta, **more)
    return [y, *batchnorm_backward(a.dout, cache)]


def frozen(a):
    y, cache = frozen_forward(a.x, a.mean, a.var, a.gamma, a.beta, relu=True)
    return [y, *batchnorm_backward(a.dout, cache, out=a.out)]


def layer_step(a, size=None, **more):
    layer = BatchNorm(len(a.mean), relu=True, ghost_batch_size=size)
    layer.gamma = a.gamma
    dx = None
    for training in (True, False):
        layer.train(training)
        y = layer(a.x, **more)
        dx = layer.backward(a.dout)
    return [y, *(dx if isinstance(dx, tuple) else [dx]), *layer.grads.values()]


def micro_step(a):
    micro = MicroBatch(BatchNorm(len(a.mean), relu=True))
    ys = micro.forward([a.x, a.x], residuals=[a.residual, a.residual])
    dxs, dresiduals = micro.backward([a.dout, a.dout])
    return [*ys, *dxs, *dresiduals, *micro.layer.grads.values()]


def gradient(a, **more):
    sums = a.sum_dout, a.sum_dout_xhat
    return [input_gradient(a.dout, a.x, a.mean, a.var, a.gamma, 1e-5, *sums, a.count, **more)]


CALLS = {
    "forward": forward_and_backward,
    "forward, out": lambda a: forward_and_backward(a, out=a.out),
    "forward, residual": lambda a: forward_and_backward(a, relu=True, residual=a.residual),
    "frozen": frozen,
    "moments": lambda a: moments(a.x)[1:],
    "normalize": lambda a: [normalize(a.x, a.mean, a.var, a.gamma, a.beta, residual=a.residual)],
    "normalize, in place": lambda a: [normalize(a.x, a.mean, a.var, a.gamma, out=a.x)],
    "normalize, onto the residual": lambda a: [
        normalize(a.x, a.mean, a.var, residual=a.residual, out=a.residual)
    ],
    "gradient_sums": lambda a: gradient_sums(a.dout, a.x, a.mean, a.var),
    "input_gradient": gradient,
    "input_gradient, in place": lambda a: gradient(a, out=a.dout),
    "layer": layer_step,
    "layer, residual": lambda a: layer_step(a, residual=a.residual),
    "layer, groups": lambda a: layer_step(a, size=2, residual=a.residual),
    "parts": micro_step,
}


UNCHANGING = [name for name in CALLS if "in place" not in name and "onto" not in name]


def references(a):
    """Return how many references there are to each array."""
    return {name: sys.getrefcount(array) for name, array in vars(a).items()}


@pytest.fixture
def no_collector():
    """What is let go dies at once, or in a cycle never."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("shape", [(30, 7), (3, 7, 5, 4), (2000, 65)])
@pytest.mark.parametrize("order", ["C", "F", "strided"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_keeps_no_reference(rng, no_collector, name, order, shape):
    """Of small arrays, of those that are copied first, and of results in recycled memory."""
    a = draw(rng, shape)
    for key in ("x", "dout", "residual"):
        array = getattr(a, key)
        setattr(
            a, key, exact.LAYOUTS["strided"](array) if order == "strided" else array.copy(order)
        )
    before = references(a)
    results = CALLS[name](a)
    given = {id(array) for array in vars(a).values()}
    alive = [weakref.ref(array) for array in results if id(array) not in given]
    assert all(reference() is not None for reference in alive)
    del results
    assert not any(reference() is not None for reference in alive)
    assert references(a) == before


UNFIT = {
    "shape": lambda array: array[..., :-1] if array.ndim > 1 else array[:-1],
    "dtype": lambda array: array.astype(complex),
    "none": lambda array: object(),
}


@pytest.mark.parametrize("unfit", UNFIT)
@pytest.mark.parametrize("name", CALLS)
def test_a_refused_call_keeps_no_reference(rng, no_collector, name, unfit):
    """Whichever argument it was that did not fit."""
    whole = draw(rng, (30, 7))
    refused = 0
    for key in vars(whole):
        a = types.SimpleNamespace(**vars(whole))
        if key != "count":
            setattr(a, key, UNFIT[unfit](getattr(whole, key)))
        before = references(a)
        try:
            CALLS[name](a)
        except (TypeError, ValueError):
            refused += 1
        assert references(a) == before, key
    assert refused or (name, unfit) == ("moments", "shape")  # which takes any


@pytest.mark.parametrize("name", CALLS)
def test_calls_leave_no_objects(rng, name):
    """Not of types and dtypes either: counted over many calls."""
    a = draw(rng, (30, 7))
    for _ in range(10):
        CALLS[name](a)
    gc.collect()
    before, dtype = sys.getallocatedblocks(), sys.getrefcount(a.x.dtype)
    for _ in range(300):
        CALLS[name](a)
    gc.collect()
    assert sys.getallocatedblocks() - before < 100
    assert sys.getrefcount(a.x.dtype) - dtype < 100


# Memory


@optimized
@on_linux
def test_changing_shapes_do_not_grow(run):
    """100,000 steps: small ones, and now and then one whose results have recycled memory."""
    run("""
        import gc, resource, sys
        from pathlib import Path
        import numpy as np
        import bn_cy

        layer = bn_cy.BatchNorm(16)
        x = np.random.default_rng(0).standard_normal((20000, 16)).astype(np.float32)


        def steps(begin, end):
            for i in range(begin, end):
                rows = 5000 + 97 * i % 15000 if i % 200 == 0 else 2 + i % 37
                layer(x[:rows])
                layer.backward(x[:rows])
            bn_cy.clear_buffers()
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * resource.getpagesize(), sys.getallocatedblocks()


        memory, objects = steps(0, 10_000)
        more_memory, more_objects = steps(10_000, 110_000)
        assert more_memory - memory < 4 << 20, (memory, more_memory)
        assert more_objects - objects < 1000, (objects, more_objects)
        print("done")
    """)


@optimized
@on_linux
def test_cleared_buffers_go_back_to_the_system(run):
    run("""
        import resource
        from pathlib import Path
        import numpy as np
        import bn_cy


        def resident():
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * resource.getpagesize() >> 20


        x = np.ones((1 << 18, 64), np.float32)  # 64 MB
        before = resident()
        y, cache = bn_cy.batchnorm_forward(x)
        dx = bn_cy.batchnorm_backward(x, cache)[0]
        del y
        assert resident() - before > 120  # y waits, dx is held
        bn_cy.clear_buffers()
        assert 56 < resident() - before < 72
        assert not dx.any()
        del dx
        bn_cy.clear_buffers()
        assert resident() - before < 8
        print("done")
    """)


# Arrays that cannot be written, and arrays in files


def mapped(folder, array, mode):
    file = np.memmap(folder / f"{id(array)}", array.dtype, "w+", shape=array.shape)
    file[...] = array
    file.flush()
    return np.memmap(file.filename, array.dtype, mode, shape=array.shape)


def locked(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("kind", ["memmap", "private memmap", "read-only"])
@pytest.mark.parametrize("shape", [(33, 7), (3000, 65), (4, 6, 20, 20)])
@pytest.mark.parametrize("name", UNCHANGING)
def test_no_input_needs_to_be_writable(rng, tmp_path, name, shape, kind):
    """Every input from a file that is mapped for reading or for itself alone, or locked."""
    plain = draw(rng, shape)
    a = types.SimpleNamespace(**vars(plain))
    kept = {}
    for key, array in vars(plain).items():
        if key not in ("count", "out"):
            mode = "c" if kind == "private memmap" else "r"
            given = locked(array) if kind == "read-only" else mapped(tmp_path, array, mode)
            setattr(a, key, given)
            kept[key] = given, array.copy()
    results = [np.array(array) for array in CALLS[name](a)]
    for given, before in kept.values():
        np.testing.assert_array_equal(given, before)
    for result, expected in zip(results, CALLS[name](plain), strict=True):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("shape", [(33, 7), (3000, 65), (4, 6, 20, 20)])
def test_results_in_a_memory_map(rng, tmp_path, shape):
    """What is written is in the file, too."""
    a = draw(rng, shape)
    out = mapped(tmp_path, a.out, "r+")
    y, cache = batchnorm_forward(a.x, a.gamma, a.beta, out=out)
    assert y is out
    out.flush()
    stored = np.fromfile(out.filename, out.dtype).reshape(shape)
    assert error(stored, exact.forward(a.x, a.gamma, a.beta)) <= 5e-7
    dx, _, _ = batchnorm_backward(a.dout, cache, out=out)
    assert dx is out
    out.flush()
    stored = np.fromfile(out.filename, out.dtype).reshape(shape)
    assert error(stored, exact.backward(a.dout, a.x, a.gamma)[0]) <= 5e-7


def test_the_command_for_large_batches(rng, python):
    """Small ones: more than 2^31 values take up to an hour and 18 GB."""
    command = Path(__file__).parent / "tools" / "large.py"
    result = python(command, "--elements", 200_000, "--seed", int(rng.integers(2**32)))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("values: mean") == 4
    assert result.stdout.endswith("all promises kept\n")
