"""Memory that fails at the n-th allocation, for every n, in every public call.

    python tests/tools/faults.py [--seed SEED] [WORD ...]

compiles `failing_malloc.c`, which lies beside this file, and runs itself under it, so that every
allocation of Python, NumPy and bn_cy goes through it. Each call that `calls` names, or those whose
names have all the words, is made with its first allocation failing, then with its second, and so
on, until it wants no more; and again with a hundred in a row failing from there on.

A call that fails does so by MemoryError, leaves everything as it was but an `out`, and gives the
right bits the next time. One that finds a way gives the right bits at once. No destructor
complains, and a call that goes through all this again and again leaves no block of memory.

What the OpenMP runtime wants for itself is spared: it ends the process where there is none. Calls
with a mask are left out: NumPy's boolean indexing fails with a SystemError, or ends the process.
"""

import argparse
import copy
import ctypes
import functools
import gc
import itertools
import json
import os
import pickle
import re
import secrets
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from bn_cy._buffers import POOL, Buffer

import bn_cy

SOURCE = Path(__file__).with_name("failing_malloc.c")
# (how many allocations in a row fail, whether the pool of buffers is full, threads)
SITUATIONS = (1, False, 1), (100, False, 2), (1, True, 2)
SWEEPS = 10  # in which a call has to reach one that leaves nothing

# (shape, axis, dtype): by blocks and by cells, columns and runs; below and above what the pool
# recycles. No allocation asks for the dtype.
BATCHES = {
    "small": ((33, 130), 1, np.float32),
    "small double": ((130, 33), 0, np.float64),
    "rows": ((900, 300), 1, np.float32),
    "narrow": ((20_000, 4), 1, np.float64),
    "images": ((6, 40, 20, 20), 1, np.float32),
    "last": ((4, 20, 10, 130), -1, np.float64),
    "runs": ((1, 3, 40_000), 1, np.float32),
}


# What is allocated, and what is watched


class Heap:
    """The allocator of `failing_malloc.c`."""

    def __init__(self):
        library = ctypes.CDLL(None)
        self.countdown, self.length, self.injected, self.blocks = (
            ctypes.c_long.in_dll(library, f"fault_{name}")
            for name in ("countdown", "length", "injected", "blocks")
        )


class Complaints(list):
    """Of destructors: what goes to `sys.unraisablehook`."""

    def __call__(self, unraisable):
        self.append(repr(unraisable.exc_value))


def bits(value):
    """Return what compares bit for bit."""
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, bn_cy.Cache):
        return "Cache", value.count, bits(value.mean), bits(value.var)
    if isinstance(value, bn_cy.BatchNorm):
        return repr(value), bits(value.state_dict()), bits(value.grads), bits(value.cache)
    if isinstance(value, dict):
        return [(key, bits(value[key])) for key in value]
    if isinstance(value, list | tuple):
        return [bits(one) for one in value]
    return value


# The arguments of calls


class Data:
    """Arrays of a shape, the same whenever they are asked for."""

    def __init__(self, rng, shape, axis, dtype):
        self.axis, self.dtype, self.features = axis, dtype, shape[axis]
        self.arrays = rng.standard_normal((3, *shape)).astype(dtype)
        self.rows = rng.uniform(0.5, 2, (2, self.features))

    def batches(self, form="plain"):
        """x, dout and a residual."""
        return [FORMS[form](array, self.axis) for array in self.arrays]

    def parameters(self, dtype=None):
        return list(self.rows.astype(dtype or self.dtype))

    def layer(self, **options):
        """A layer with a step behind it, and a forward."""
        layer = bn_cy.BatchNorm(self.features, axis=self.axis, dtype=self.dtype, **options)
        _, earlier, dout = self.batches()
        layer(earlier)
        layer.backward(dout)
        layer(earlier)
        return layer


def strided(array, axis=None):
    """Return the values as every second one of an array."""
    larger = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    larger[..., ::2] = array
    return larger[..., ::2]


def rescued(array, axis):
    """Return the values with constant features and with outliers, whose sums are made again."""
    features = np.moveaxis(array.copy(), axis, 0)
    features[::3] = 7
    features[1::3].reshape(-1)[:1] = 1e9
    return np.ascontiguousarray(np.moveaxis(features, 0, axis))


FORMS = {
    "plain": lambda array, axis: array.copy(),
    "strided": strided,
    "Fortran": lambda array, axis: np.asfortranarray(array),
    "swapped": lambda array, axis: array.astype(array.dtype.newbyteorder()),
    "rescued": rescued,
}
OUTS = {
    "new": lambda x: None,
    "out": lambda x: np.zeros_like(x, dtype=x.dtype.newbyteorder("=")),
    "other out": lambda x: strided(np.zeros(x.shape, x.dtype.newbyteorder("="))),
}
THEN = {  # (relu, whether there is a residual)
    "": (False, False),
    " relu": (True, False),
    " residual": (False, True),
    " relu residual": (True, True),
}


def following(then, residual):
    relu, added = THEN[then]
    return {"relu": relu, "residual": residual if added else None}


# The public calls. Each function returns a call with fresh arguments, and all that it could change.


def forward(data, form, out, then):
    x, _, residual = data.batches(form)
    gamma, beta = data.parameters()
    more = following(then, residual) | {"axis": data.axis, "out": OUTS[out](x)}
    return lambda: bn_cy.batchnorm_forward(x, gamma, beta, **more), [x, residual, gamma, beta]


def frozen(data, function, form, out, then):
    x, _, residual = data.batches(form)
    mean, var = data.parameters(np.float32)
    gamma, beta = map(list, data.parameters())
    given = [x, mean, var, gamma, beta]
    more = following(then, residual) | {"axis": data.axis, "out": OUTS[out](x)}
    return lambda: function(*given, **more), [given, residual]


def backward(data, form, out, then):
    x, dout, residual = data.batches(form)
    gamma, beta = data.parameters()
    more = following(then, residual)
    _, cache = bn_cy.batchnorm_forward(x, gamma, beta, axis=data.axis, **more)
    if form == "rescued":
        dout.reshape(-1)[0] = np.inf
    target = OUTS[out](dout)
    return lambda: bn_cy.batchnorm_backward(dout, cache, out=target), [x, dout, cache]


def in_place(data):
    x, _, _ = data.batches()
    mean, var = data.parameters()
    return lambda: bn_cy.normalize(x, mean, var, axis=data.axis, out=x), [mean, var]


def moments(data, form):
    x, _, _ = data.batches(form)
    return lambda: bn_cy.moments(x, axis=data.axis), [x]


def gradient_sums(data, form):
    x, dout, _ = data.batches(form)
    mean, var = data.parameters()
    gamma, beta = data.parameters()
    more = {"axis": data.axis, "relu": True, "gamma": gamma, "beta": beta}
    given = [dout, x, mean, var]
    return lambda: bn_cy.gradient_sums(*given, **more), [given, more]


def input_gradient(data, form, out):
    x, dout, _ = data.batches(form)
    mean, var = data.parameters()
    given = [dout, x, mean, var, mean, 1e-5, mean, var, 1000]
    target = OUTS[out](x)
    return lambda: bn_cy.input_gradient(*given, axis=data.axis, out=target), given


def statistics(data):
    x, _, _ = data.batches()
    _, cache = bn_cy.batchnorm_forward(x, axis=data.axis)
    return lambda: (cache.mean, cache.var, cache.count, cache.num_features), [cache]


MODES = {
    "train": lambda layer: layer.train(),
    "eval": lambda layer: layer.eval(),
    "freeze": lambda layer: layer.freeze(),
}


def layer_forward(data, mode, out, then, **options):
    x, _, residual = data.batches()
    more = following(then, residual) | {"out": OUTS[out](x)}
    layer = MODES[mode](data.layer(relu=more.pop("relu"), **options))
    return lambda: (layer(x, **more), layer), [x, residual, layer]


def layer_backward(data, mode, out, then, **options):
    x, dout, residual = data.batches()
    more = following(then, residual)
    layer = MODES[mode](data.layer(relu=more.pop("relu"), **options))
    layer(x, **more)
    target = OUTS[out](x)
    return lambda: (layer.backward(dout, out=target), layer), [x, dout, layer]


def parted(data, array):
    """Return two parts of a batch, along an axis that is not the features'."""
    return [part.copy() for part in np.array_split(array, 2, axis=int(data.axis == 0))]


def micro_forward(data, then):
    """In eval mode: of training NumPy makes the moments, and its `errstate` ends the process where
    it finds no memory."""
    x, _, residual = map(functools.partial(parted, data), data.batches())
    more = following(then, residual)
    layer = data.layer(relu=more.pop("relu")).eval()
    micro = bn_cy.MicroBatch(layer)
    return lambda: (micro(x, residuals=more["residual"]), layer), [x, residual, layer]


def micro_backward(data, then):
    x, dout, residual = map(functools.partial(parted, data), data.batches())
    more = following(then, residual)
    layer = data.layer(relu=more.pop("relu")).eval()
    micro = bn_cy.MicroBatch(layer)
    micro(x, residuals=more["residual"])
    return lambda: (micro.backward(dout), layer), [x, dout, layer]


def nonfinite(data, policy):
    x, dout, _ = data.batches()
    x.reshape(-1)[0] = np.nan
    layer = data.layer(on_nonfinite=policy)
    layer.backward(dout)  # its cache would go anyway

    def act():
        try:
            return layer(x), layer
        except FloatingPointError as error:
            return str(error), layer

    return act, [x, layer]


def of_layer(data, function):
    """A call that changes the layer or copies it."""
    layer, other = data.layer(), data.layer()
    x, dout, _ = data.batches()
    other(x)
    other.backward(dout)
    other.gamma[:] = data.rows[0]
    state = other.state_dict()
    return lambda: function(layer, state), [layer, state]


def assign(layer, state):
    layer.gamma = state["weight"].tolist()


def assign_parameters(layer, state):
    layer.params.update(gamma=state["weight"] + 1, beta=state["bias"] + 1)


def assign_statistics(layer, state):
    layer.running_var = state["running_var"].astype(np.float32)


OF_LAYER = {
    "state_dict": lambda layer, state: layer.state_dict(),
    "load_state_dict": lambda layer, state: layer.load_state_dict(state),
    "load_state_dict prefix": lambda layer, state: layer.load_state_dict(
        {f"a.{key}": state[key] for key in state}, prefix="a."
    ),
    "pickle": lambda layer, state: pickle.loads(pickle.dumps(layer)),
    "copy": lambda layer, state: copy.copy(layer),
    "deepcopy": lambda layer, state: copy.deepcopy(layer),
    "repr": lambda layer, state: repr(layer),
    "reset": lambda layer, state: layer.reset_running_stats(),
    "train": lambda layer, state: layer.train(False),
    "eval": lambda layer, state: layer.eval(),
    "freeze": lambda layer, state: layer.freeze(),
    "unfreeze": lambda layer, state: layer.unfreeze(),
    "assign": assign,
    "params.update": assign_parameters,
    "assign a statistic": assign_statistics,
    "new": lambda layer, state: bn_cy.BatchNorm(layer.num_features, dtype=layer.dtype),
}


def of_package(function):
    return function, []


OF_PACKAGE = {
    "set_num_threads": lambda: bn_cy.set_num_threads(bn_cy.get_num_threads()),
    "show_config": lambda: bn_cy.show_config(mode="dicts"),
    "clear_buffers": bn_cy.clear_buffers,
}


def calls(rng):
    """Yield (name, function that prepares the call)."""
    for name, function in OF_PACKAGE.items():
        yield name, functools.partial(of_package, function)
    for batch, shape_axis_dtype in BATCHES.items():
        data = Data(rng, *shape_axis_dtype)
        for function, *options in (*functions(), *methods()):
            words = [getattr(option, "__name__", option) for option in options]
            name = " ".join(filter(None, [function.__name__, *words, batch]))
            yield name, functools.partial(function, data, *options)
        for name, function in OF_LAYER.items():
            yield f"{name} {batch}", functools.partial(of_layer, data, function)


def functions():
    """Yield (function of this file, its options)."""
    for then, form, out in itertools.product(THEN, FORMS, OUTS):
        if form in ("plain", "rescued") or then == " relu residual":
            yield forward, form, out, then
            yield backward, form, out, then
    for then, out in itertools.product(THEN, OUTS):
        yield frozen, bn_cy.normalize, "strided", out, then
        yield frozen, bn_cy.frozen_forward, "plain", out, then
    for form in FORMS:
        yield moments, form
        yield gradient_sums, form
        yield from ((input_gradient, form, out) for out in OUTS)
    yield (in_place,)
    yield (statistics,)


def methods():
    for mode, then, out in itertools.product(MODES, THEN, OUTS):
        yield layer_forward, mode, out, then
        yield layer_backward, mode, out, then
    yield from ((nonfinite, policy) for policy in ("raise", "skip", "update"))
    for then in THEN:
        yield micro_forward, then
        yield micro_backward, then


# The proof


FAILED = object()

# What must have failed: the words of the package, for its own allocations.
SITES = "partial sums of a forward", "partial sums of a backward", "no memory for"

# Python 3.11 leaves the arguments of a function behind for whose closure it finds no memory: these
# calls have such functions, in the package, in `copy` or in `pickle`.
CLOSURES = "load_state_dict", "pickle", "copy", "deepcopy", "micro_"

# What Python and NumPy raise in the place of a MemoryError: of a lock, where pickle imports, and
# where one exception is lost over another.
OF_OTHERS = RuntimeError, pickle.PicklingError, SystemError
WORDS_OF_OTHERS = re.compile(
    "can't allocate lock|Can't pickle|exception set|without setting an exc"
)


def attempt(heap, act, n, length, counts):
    """Return what a call gives, or FAILED; and how many faults it met."""
    before = heap.injected.value
    result = FAILED
    heap.length.value, heap.countdown.value = length, n
    try:
        result = act()
    except MemoryError as error:
        heap.countdown.value = 0
        counts.update(site for site in SITES if site in str(error))
    except OF_OTHERS as error:
        if not WORDS_OF_OTHERS.search(str(error)):
            raise
    finally:
        heap.countdown.value = 0
    return result, heap.injected.value - before


def fill_pool(full):
    """Empty the pool of buffers; fill it with blocks that are of no use to any call."""
    POOL.clear()
    if full:
        del [Buffer(size) for size in (100, 3 << 20, 5 << 20)][:]


def sweep(heap, prepare, length, full, counts):
    """Make a call with every n; return how many blocks of memory that left."""
    act, watched = prepare()
    expected = bits(act()), bits(watched)
    gc.collect()
    before = heap.blocks.value
    for n in itertools.count(1):
        act, watched = prepare()
        unchanged = bits(watched)
        fill_pool(full)
        result, faults = attempt(heap, act, n, length, counts)
        counts["allocations failed"] += faults
        counts["calls failed" if result is FAILED else "found a way" if faults else "sweeps"] += 1
        if result is FAILED:
            assert faults, "a MemoryError without a fault"
            assert bits(watched) == unchanged, f"changed by a call that failed at allocation {n}"
            result = act()
        assert (bits(result), bits(watched)) == expected, f"wrong after a fault at allocation {n}"
        if not faults:
            break
    del act, watched, unchanged, result
    gc.collect()
    return heap.blocks.value - before


def check(heap, name, prepare, counts):
    """Sweep until nothing is left: what Python and NumPy keep for later has an end."""
    for length, full, threads in SITUATIONS:
        bn_cy.set_num_threads(threads)
        left = [sweep(heap, prepare, length, full, counts)]
        while left[-1] > 0 and len(left) < SWEEPS and not name.startswith(CLOSURES):
            left.append(sweep(heap, prepare, length, full, counts))
        assert left[-1] <= 0 or name.startswith(CLOSURES), f"blocks left by each sweep: {left}"


def prove(seed, words, part, parts):
    """Check every call of a part; return what it took."""
    heap, counts = Heap(), Counter()
    gc.disable()
    sys.unraisablehook = complaints = Complaints()
    named = [
        call for call in calls(np.random.default_rng(seed)) if all(w in call[0] for w in words)
    ]
    for name, prepare in named[part::parts]:
        try:
            check(heap, name, prepare, counts)
            assert not complaints, complaints
        except Exception as error:
            counts["wrong"] += 1
            print(f"{name}: {error!r}", flush=True)
    return counts


def start(library, arguments):
    """Start this file under the allocator."""
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Return what a part took. A word on stderr is wrong: of a destructor that could not complain
    otherwise, as all allocations failed."""
    output, errors = process.communicate()
    *lines, counts = output.splitlines() or ["{}"]
    print(*lines, errors, sep="\n", end="")
    return Counter(json.loads(counts)) + Counter(wrong=bool(errors) or process.returncode != 0)


def prove_in_parts(seed, words):
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "failing_malloc.so")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
        parts = os.cpu_count()
        arguments = [[f"--seed={seed}", "--part", part, parts, *words] for part in range(parts)]
        processes = [start(library, one) for one in arguments]
        counts = sum(map(finish, processes), Counter())
    print(f"seed {seed}: {', '.join(f'{name} {counts[name]}' for name in sorted(counts))}")
    missing = [] if words else [site for site in SITES if not counts[site]]
    assert counts["sweeps"], "no call has such a name"
    assert not missing, f"never seen to fail: {missing}"
    return counts["wrong"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of the names of the calls that are meant")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--part", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(prove(options.seed, options.words, *options.part)))
    else:
        sys.exit(prove_in_parts(options.seed, options.words) > 0)


if __name__ == "__main__":
    main()
