"""Calls with one argument spoilt: refused by name, and nothing is changed."""

import re

import numpy as np

import bn_cy
from fuzzing import memory

ERRORS = (TypeError, ValueError)


def other_dtype(array):
    return array.astype("f4" if array.dtype.itemsize == 8 else "f8")


def no_floats(source, array, name="x"):
    """The same numbers as what is no array of float32 or float64; a dout may be of other floats."""
    kinds = ("i4", "c8", "?", "O")
    kind = source.pick(kinds if name == "dout" else (*kinds, "f2", "g"))
    return array.astype(kind) if kind in "gO" else np.zeros(array.shape, kind)


def misfit(source, name, array):
    """What has another shape, or another dtype; a dout of other floats would be rounded."""
    ways = ("longer", "axes", "no floats", "mask")
    way = source.pick(ways if name == "dout" else ("dtype", *ways))
    if way == "dtype":
        return other_dtype(array)
    if way == "longer":
        return np.concatenate([array, array, array[:1]]) if len(array) else np.zeros((1,), "f4")
    if way == "axes":
        return array[None]
    if way == "mask":
        return np.ma.masked_array(array)
    return no_floats(source, array, name)


def spoil_x(call, source):
    x = call.x
    way = source.pick(("dtype", "dimensions", "mask", "text"))
    call.x = {
        "dtype": lambda: no_floats(source, x),
        "dimensions": lambda: np.zeros(source.pick((0, 3)), x.dtype),
        "mask": lambda: np.ma.masked_array(x),
        "text": lambda: "abc",
    }[way]()


def spoil_axis(call, source):
    ndim = len(call.problem.shape)
    call.problem.axis = source.pick((ndim, -ndim - 1, 99, 0.5, None, "1"))


def spoil_eps(call, source):
    call.problem.eps = source.pick((-1e-5, np.nan, np.inf, -np.inf, "small", None, 1j))


def spoil_parameter(name):
    def spoil(call, source):
        features = call.problem.features
        wrong = (
            np.ones(features + 1),
            np.ones((features, 2)),
            np.ones(features, complex),
            np.float32(1),
            "abc",
            [None] * features,
            np.ma.masked_array(np.ones(features)),
        )
        setattr(call, name, source.pick(wrong))

    return spoil


def spoil_var(call, source):
    var = np.ones(call.problem.features)
    var[source.integer(0, len(var) - 1)] = source.pick((-1.0, -1e-30, -np.inf))
    call.var = var


def spoil_like_x(name):
    def spoil(call, source):
        array = getattr(call, name)
        setattr(call, name, misfit(source, name, call.x if array is None else array))

    return spoil


def spoil_count(call, source):
    call.count = source.pick((0, -1, np.nan, -np.inf, "all", None))


def spoil_sums(call, source):
    call.sums = "other"
    call.others[source.integer(0, 1)] = np.ones(call.problem.features + 1)


def spoil_out(name):
    def spoil(call, source):
        p = call.problem
        good = memory.poisoned(p.shape, p.dtype)
        way = source.pick(("dtype", "axes", "longer", "read-only", "swapped", "list"))
        array = {
            "dtype": lambda: other_dtype(good),
            "axes": lambda: good[None],
            "longer": lambda: memory.poisoned((p.shape[0] + 1, *p.shape[1:]), p.dtype),
            "read-only": lambda: good,
            "swapped": lambda: good.view(good.dtype.newbyteorder()),
            "list": lambda: good.tolist(),
        }[way]()
        if way == "read-only":
            array.flags.writeable = False
        setattr(call, name, array if way == "list" else p.hold("spoilt", array))
        if way == "read-only":
            getattr(call, name).flags.writeable = False

    return spoil


def spoil_overlap(name, other):
    """The output and something that is read lie in one memory, a row apart."""

    def spoil(call, source):
        p = call.problem
        values = np.array(getattr(call, other), p.dtype)
        both = p.hold("both", np.concatenate([values, values[:1]]))
        first, second = both[:-1], both[1:]
        if source.chance(50):
            first, second = second, first
        setattr(call, other, first)
        setattr(call, name, second)

    return spoil


def spoil_shared(name):
    """gamma or beta lies within the output."""

    def spoil(call, source):
        p = call.problem
        out = p.hold("shared", memory.poisoned(p.shape, p.dtype))
        flat = out.reshape(-1)
        flat[:] = 1
        p.held["shared"].before[:] = p.held["shared"].raw
        setattr(call, name, flat[: p.features])
        call.out = out

    return spoil


def spoil_cache(call, source):
    call.cache = source.pick((None, 3, "cache"))


def without_output(spoil):
    """For what the backward refuses: its forward then writes nothing that was given."""

    def spoilt(call, source):
        call.out = None
        spoil(call, source)

    return spoilt


def ways_of(call):
    """Return (argument, way to spoil it) for a call: those that are certain to be refused."""
    ways = [("x", spoil_x), ("axis", spoil_axis)]
    has = vars(call).keys()
    overlaps = call.problem.shape[0] > 1 and call.problem.size
    if "gamma" in has:
        ways += [("eps", spoil_eps)]
        ways += [(name, spoil_parameter(name)) for name in ("gamma", "beta")]
    if "mean" in has:
        ways += [(name, spoil_parameter(name)) for name in ("mean", "var")] + [("var", spoil_var)]
    if "count" in has:
        ways += [("count", spoil_count), ("sum_", spoil_sums)] if call.problem.size else []
    if "residual" in has:
        ways += [("residual", spoil_like_x("residual"))]
        if call.residual is not None and overlaps:
            ways += [("out", spoil_overlap("out", "residual"))]
        ways += [("out", spoil_shared(name)) for name in ("gamma", "beta")] if overlaps else []
    if "out" in has:
        ways += [("out", spoil_out("out"))]
        ways += [("out", spoil_overlap("out", "x"))] if overlaps else []
    if "dx_out" in has:
        spoilers = [("dout", spoil_like_x("dout")), ("out", spoil_out("dx_out"))]
        spoilers += [("out", spoil_overlap("dx_out", "dout"))] if overlaps else []
        ways += [(name, without_output(spoil)) for name, spoil in spoilers]
    elif "dout" in has:
        ways += [("dout", spoil_like_x("dout"))]
        ways += [("out", spoil_overlap("out", "dout"))] if overlaps else []
    return ways


def refused(make, name, report):
    """Make a call that must be refused with an error that names an argument."""
    try:
        make()
    except ERRORS as error:
        named = re.search(rf"\b{name}" + ("" if name.endswith("_") else r"\b"), str(error))
        report.exactly(f"{name} is named in {str(error)!r}", bool(named), True)
        report.refused += 1
    else:
        report.fault(f"a wrong {name} was not refused")


def spoil_layer(layer, x, source):
    """Return (argument, call) of a layer that has seen a batch x: it must be refused."""
    features = layer.num_features
    other = np.zeros((4, features + 1), x.dtype)
    cache = bn_cy.batchnorm_forward(other)[1]
    ways = [
        ("x", lambda: layer(other.T if layer.axis in (0, -2) else other)),
        ("x", lambda: layer(no_floats(source, x))),
        ("residual", lambda: layer(x, residual=other_dtype(x))),
        ("out", lambda: layer(x, out=x if x.size else other)),
        ("out", lambda: layer(x, out=other_dtype(x))),
        ("dout", lambda: layer.backward(misfit(source, "dout", x))),
        ("cache", lambda: layer.backward(x, cache=source.pick((cache, 3)))),
    ]
    wrong = {
        "eps": -1,
        "momentum": source.pick((-0.1, 2, np.nan, "a")),
        "num_batches_tracked": source.pick((-1, 0.5, 2**63)),
        "gamma": np.ones(features + 1),
        "running_mean": np.full(features, np.nan),
        "running_var": np.full(features, -1.0),
    }
    wrong = {name: value for name, value in wrong.items() if getattr(layer, name) is not None}
    state = layer.state_dict()
    loaded = {name: np.full(features, 7.0) for name in state}
    ways += [(name, lambda n=name, v=value: setattr(layer, n, v)) for name, value in wrong.items()]
    ways += [
        (name, lambda n=name, v=value: layer.load_state_dict({**loaded, n: v}))
        for name, value in wrong.items()
        if name in state
    ]
    return source.pick(ways)
