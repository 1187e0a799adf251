"""`MicroBatch` against one layer, and against 80-bit arithmetic, on the whole batch."""

import copy
import pickle
from pathlib import Path

import exact
import numpy as np
import pytest
from exact import error
from test_layer import assert_same_state, snapshot, trained

from bn_cy import BatchNorm, MicroBatch, SyncBatchNorm, _micro_batch
from bn_cy._parts import PartCache

FORMS = [  # of the whole batch, the feature axis, the axis that is cut, where
    ((23, 5), 1, 0, [7, 7, 8]),  # an empty part, and one of a single value
    ((5, 23), 0, 1, [1, 20]),
    ((9, 5, 3, 2), 1, 0, [4, 8]),
    ((2, 11, 5), -1, 1, [0, 5]),
    ((9, 5), 1, 0, [1, 2, 3]),  # of fewer rows, dx is a small remainder of large terms
]
LIMITS = {"float32": 2e-7, "float64": 1e-12}  # of y and dx; dgamma and dbeta twice that
MODES = ["train", "eval", "freeze"]


def drawn(rng, form, dtype, offset=0.0):
    """Return x, a residual and dout of the whole, and a function that cuts them into parts."""
    shape, axis, cut, places = form
    x = exact.ordinary(rng, shape, axis, dtype) + np.asarray(offset, dtype)
    residual, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    return x, residual, dout, lambda array: np.split(array, places, axis=cut)


def twins(rng, dtype, axis=1, **options):
    """Return two layers that are alike."""
    one, other = (BatchNorm(5, dtype=dtype, axis=axis, **options) for _ in range(2))
    exact.trained(rng, one)
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_parts_are_the_whole(rng, form, adds, relu, mode, dtype):
    """y, dx, dresidual, gradients, running statistics and count of three steps."""
    _, axis, cut, _ = form
    layer, whole = twins(rng, dtype, axis, relu=relu, momentum=rng.choice([None, 0.3]))
    for each in (layer, whole):
        getattr(each, mode)()
    micro, limit = MicroBatch(layer), LIMITS[dtype]
    for _ in range(3):
        x, residual, dout, parts = drawn(rng, form, dtype)
        y = whole(x, residual=residual if adds else None)
        gradients = whole.backward(dout)
        ys = micro.forward(parts(x), residuals=parts(residual) if adds else None)
        found = micro.backward(parts(dout))
        pairs = [(ys, y)]
        pairs += [*zip(found, gradients, strict=True)] if adds else [(found, gradients)]
        for pieces, expected in pairs:
            assert [piece.shape for piece in pieces] == [part.shape for part in parts(expected)]
            assert {piece.dtype.name for piece in pieces} == {dtype}
            assert error(np.concatenate(pieces, cut), np.longdouble(expected)) <= 2 * limit
        scale = exact.norm(dout) + exact.norm(x)
        for name in ("gamma", "beta"):
            assert layer.grads[name].dtype == whole.grads[name].dtype
            assert error(layer.grads[name], np.longdouble(whole.grads[name]), scale) <= 2 * limit
        assert layer.num_batches_tracked == whole.num_batches_tracked
        np.testing.assert_allclose(layer.running_mean, whole.running_mean, rtol=limit, atol=limit)
        np.testing.assert_allclose(layer.running_var, whole.running_var, rtol=limit)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_float32_keeps_the_contract(rng, offset):
    x, _, dout, parts = drawn(rng, ((203, 5), 1, 0, [50, 100, 150, 202]), "float32", offset)
    layer, _ = twins(rng, np.float32)
    micro = MicroBatch(layer)
    y, dx = np.concatenate(micro(parts(x))), np.concatenate(micro.backward(parts(dout)))
    expected = exact.forward(x, layer.gamma, layer.beta)
    assert error(y, expected) <= 2e-7
    expected, dgamma, dbeta = exact.backward(dout, x, layer.gamma)
    _, mean, var = exact.statistics(x)
    assert error(dx, expected, exact.norm(exact.frozen_gradient(dout, x, var, layer.gamma))) <= 2e-7
    scales = exact.sum_scales(dout, x, mean, var)
    assert error(layer.dbeta, dbeta, scales[0]) <= 4e-7
    assert error(layer.dgamma, dgamma, scales[1]) <= 4e-7


def test_a_network_of_two_layers(rng):
    """Layer by layer, all parts through one before the first goes on; against finite
    differences of the whole network."""
    x, W = rng.standard_normal((13, 4)), rng.standard_normal((4, 5))
    dout = rng.standard_normal((13, 5))
    layers = [BatchNorm(n, dtype=np.float64) for n in (4, 5)]

    def loss(array):
        return np.sum(dout * layers[1].forward(layers[0].forward(array, update=False) @ W))

    first, second = map(MicroBatch, layers)
    cut = [3, 4, 9]
    ys = second([y @ W for y in first(np.split(x, cut))])
    assert sum(np.sum(d * y) for d, y in zip(np.split(dout, cut), ys, strict=True)) == (
        pytest.approx(loss(x), rel=1e-12)
    )
    dxs = first.backward([d @ W.T for d in second.backward(np.split(dout, cut))])
    expected = exact.finite_differences(loss, x, 2e-4)
    assert error(np.concatenate(dxs), expected) <= 1e-9


def test_parts_may_differ_in_shape(rng):
    """Sequences of several lengths, each unpadded: a batch of all their steps."""
    parts = [rng.standard_normal((1, 5, steps)) for steps in (3, 8, 2)]
    douts = [rng.standard_normal(part.shape) for part in parts]
    layer, whole = twins(rng, np.float64)
    micro = MicroBatch(layer)
    for found, expected in [
        (micro(iter(parts)), whole(np.concatenate(parts, axis=2))),
        (micro.backward(iter(douts)), whole.backward(np.concatenate(douts, axis=2))),
    ]:
        assert error(np.concatenate(found, axis=2), np.longdouble(expected)) <= 1e-12


@pytest.mark.parametrize("axis", [1, -1])
def test_rows_that_count_of_a_padded_part(rng, axis):
    """Beside a part that is not padded; a batch of all with a mask."""
    mask = rng.random((6, 4)) < 0.7
    mask[3:] = True
    steps_last, dout = rng.standard_normal((2, 6, 5, 4))
    x, dout = (np.moveaxis(array, 1, axis) for array in (steps_last, dout))
    layer, whole = twins(rng, np.float64, axis)
    micro = MicroBatch(layer)
    for step, expected in [(micro, whole(x, mask=mask)), (micro.backward, whole.backward(dout))]:
        given = x if step is micro else dout
        rows, rest = step([np.moveaxis(given, axis, -1)[:3][mask[:3]], given[3:]])
        wanted = np.moveaxis(expected, axis, -1)[:3][mask[:3]]
        np.testing.assert_allclose(rows, wanted, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(rest, expected[3:], rtol=1e-12, atol=1e-12)


def test_nothing_of_the_size_of_a_part_is_kept(rng):
    parts = [rng.standard_normal((200, 5)) for _ in range(3)]
    micro = MicroBatch(BatchNorm(5))
    ys = micro(parts)
    kept = {id(array): array for array in exact.arrays_within(vars(micro)["_caches"])}
    large = [array for array in kept.values() if array.size > 10]
    assert {id(array) for array in large} == {id(part) for part in parts}
    del large, kept, ys
    micro.backward(parts)
    assert micro._caches is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_step_with_given_outputs_takes_no_memory(run):
    """Four parts of 16 MB: the peak does not rise by one of them."""
    run("""
        from pathlib import Path
        import numpy as np
        from bn_cy import BatchNorm, MicroBatch

        rng = np.random.default_rng(0)
        parts, out, douts = (
            [rng.random((1 << 16, 64), np.float32) for _ in range(4)] for _ in range(3)
        )
        micro = MicroBatch(BatchNorm(64, relu=True))


        def peak():  # not by getrusage, which counts the memory of the parent before exec
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024


        micro.forward([part[:4096] for part in parts])  # starts threads
        before = peak()
        micro.forward(parts, out=out)
        micro.backward(douts, out=douts)
        assert peak() - before < parts[0].nbytes, peak() - before
        micro.forward(parts)
        assert peak() - before > parts[0].nbytes  # so the peak shows what is new
        print("done")
    """)


@pytest.mark.parametrize("adds", [False, True])
def test_given_outputs(rng, adds):
    x, residual, dout, parts = drawn(rng, FORMS[2], "float32")
    layer, other = twins(rng, np.float32, relu=True)
    residuals = parts(residual.copy()) if adds else None
    expected = MicroBatch(other)
    ys = expected(parts(x), residuals=residuals)
    wanted = expected.backward(parts(dout))
    micro = MicroBatch(layer)
    out = residuals if adds else [np.empty_like(part) for part in parts(x)]
    results = micro(parts(x), residuals=residuals, out=out)
    assert all(y is o for y, o in zip(results, out, strict=True))
    assert all(np.array_equal(y, o) for y, o in zip(ys, out, strict=True))
    douts = parts(dout)
    found = micro.backward(douts, out=douts)
    for mine, theirs in zip(found, wanted, strict=True) if adds else [(found, wanted)]:
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(dx is d for dx, d in zip(found[0] if adds else found, douts, strict=True))


# What is counted


def test_without_an_update_nothing_is_counted(rng):
    layer, _ = twins(rng, np.float32)
    before = snapshot(layer)
    MicroBatch(layer).forward([rng.standard_normal((3, 5))], update=False)
    assert_same_state(snapshot(layer), before)


def test_a_part_that_is_not_finite(rng):
    parts = [rng.standard_normal((4, 5)) for _ in range(3)]
    parts[1][2, 3] = rng.choice([np.nan, np.inf])
    layer, _ = twins(rng, np.float32)
    micro, before, out = MicroBatch(layer), snapshot(layer), [np.zeros((4, 5)) for _ in range(3)]
    micro(parts[::2], update=False)
    with pytest.raises(FloatingPointError, match=r"x has NaN .* at 1 of the features: 3; the"):
        micro(parts, out=out)
    assert not np.any(out)
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        micro.backward(parts)
    layer.on_nonfinite = "skip"
    ys = np.concatenate(micro(parts))
    assert np.isfinite(ys).all(axis=0).tolist() == [True, True, True, False, True]
    layer.on_nonfinite = "raise"
    micro(parts, update=False)
    assert_same_state(snapshot(layer), before)
    layer.on_nonfinite = "update"
    micro(parts)
    assert np.isfinite(layer.running_var).tolist() == [True, True, True, False, True]
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


@pytest.mark.parametrize("parts", [[], [np.empty((0, 5))], [np.empty((0, 5, 3), np.float32)] * 2])
def test_an_empty_whole(rng, parts):
    layer, _ = twins(rng, np.float32)
    before = layer.state_dict()
    layer.grads["gamma"] = None
    micro = MicroBatch(layer)
    assert [y.shape for y in micro(parts)] == [part.shape for part in parts]
    assert [dx.shape for dx in micro.backward(parts)] == [part.shape for part in parts]
    assert not layer.dgamma.any() and not layer.dbeta.any()
    assert_same_state(layer.state_dict(), before)


def test_a_layer_without_parameters_and_statistics(rng):
    x, _, dout, parts = drawn(rng, FORMS[0], "float64")
    given = {"scale": False, "shift": False, "track_running_stats": False}
    layer, whole = BatchNorm(5, **given), BatchNorm(5, **given)
    for each in (layer, whole):
        each.eval()
    micro = MicroBatch(layer)
    assert error(np.concatenate(micro(parts(x))), np.longdouble(whole(x))) <= 1e-12
    found, expected = micro.backward(parts(dout)), whole.backward(dout)
    assert error(np.concatenate(found), np.longdouble(expected)) <= 1e-12
    assert layer.grads == {}


# Errors


X = np.random.default_rng(0).standard_normal((3, 4, 5))
NARROW, BASE = X[1][:, 1:], np.zeros((9, 5))


def parts_with(part):
    return [X[0], part, X[2]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"parts": parts_with(NARROW)}, ValueError, "part 1: x must have 5 features"),
        ({"parts": parts_with(X[1].astype(int))}, TypeError, "part 1: x must be .*float32 or"),
        ({"parts": parts_with(None)}, TypeError, "part 1: x must be an array"),
        ({"parts": parts_with(X[1, 0])}, ValueError, "part 1: x must have two dimensions"),
        ({"parts": parts_with(np.ma.array(X[1]))}, TypeError, "part 1: x must have no mask"),
        ({"update": "no"}, TypeError, "update must be True or False, got 'no'"),
        ({"parts": 3}, TypeError, "parts must be several arrays, such as a list, got int"),
        ({"residuals": X[:2]}, ValueError, "residuals must have an array for each of the 3"),
        ({"residuals": parts_with(NARROW)}, ValueError, "part 1: residual must have the shape"),
        ({"residuals": parts_with(np.float32(X[1]))}, ValueError, "part 1: residual must have"),
        ({"out": X[:2].copy()}, ValueError, "out must have an array for each of the 3"),
        ({"out": parts_with(X[1])}, ValueError, "part 0: out may not share memory with x"),
        ({"out": [*X[:2].copy(), X[0]]}, ValueError, "out of part 2 .* the x of part 0"),
        ({"out": [*BASE[None, :4], BASE[2:6], X[0].copy()]}, ValueError, "out of part 0 .* out of"),
        (
            {"out": [BASE[5:], *X[:2].copy()], "residuals": [X[0], BASE[5:], X[0]]},
            ValueError,
            "out of part 0 may not share memory with the residual of part 1",
        ),
        (
            {"out": [BASE[:4], BASE[5:], None], "residuals": [None, BASE[4:8], None]},
            ValueError,
            "^part 1: out may be residual itself, but may not overlap it otherwise",
        ),
        (
            {"out": [BASE[:4], np.zeros(X[1].shape, X.dtype.newbyteorder()), None]},
            ValueError,
            "^part 1: out must have .* dtype float64 of x, got .* >f8",
        ),
    ],
)
def test_a_refused_forward_changes_nothing(rng, arguments, kind, message, mode):
    layer = getattr(trained(rng), mode)()
    micro = MicroBatch(layer)
    micro(X)
    before, caches, zeros = snapshot(layer), micro._caches, BASE.copy()
    with pytest.raises(kind, match=message):
        micro.forward(**{"parts": X, **arguments})
    assert_same_state(snapshot(layer), before)
    assert micro._caches is caches
    assert np.array_equal(BASE, zeros)


@pytest.mark.parametrize(
    ("douts", "out", "kind", "message"),
    [
        (X[:2], None, ValueError, "douts must have an array for each of the 3 parts, got 2"),
        (parts_with(NARROW), None, ValueError, r"part 1: dout must have the shape \(4, 5\)"),
        (parts_with(X[1].astype(int)), None, TypeError, "part 1: dout must be"),
        (parts_with(None), None, TypeError, "part 1: dout must be an array"),
        (X, [NARROW] * 3, ValueError, "part 0: out must have the shape"),
        (X, X, ValueError, "part 0: out may not share memory with x"),
        ([BASE[:4]] * 3, [BASE[:4], BASE[5:], X[0] + 1], ValueError, "out of part 0 .* the dout"),
        (
            [X[0], BASE[4:8], X[0]],
            [BASE[:4], BASE[5:], None],
            ValueError,
            "^part 1: out may be dout",
        ),
        (X, [X[1], BASE[:4], BASE[5:]], ValueError, "out of part 0 .* the x of part 1"),
        (X, [BASE[:4]] * 3, ValueError, "out of part 0 .* the out of part 1"),
    ],
)
def test_a_refused_backward_changes_nothing(rng, douts, out, kind, message):
    layer = trained(rng)
    micro = MicroBatch(layer)
    micro(X)
    before, caches, zeros = snapshot(layer), micro._caches, BASE.copy()
    with pytest.raises(kind, match=message):
        micro.backward(douts, out=out)
    assert_same_state(snapshot(layer), before)
    assert np.array_equal(BASE, zeros)
    assert micro._caches is caches
    micro.backward(X)


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
@pytest.mark.parametrize("mode", MODES)
def test_an_output_in_the_memory_of_the_layer_is_refused(rng, mode, name):
    layer = getattr(trained(rng, dtype=np.float64), mode)()
    before, base = snapshot(layer), BASE.copy()
    out = [BASE[:4], exact.over(getattr(layer, name), X[1]), None]
    what = "gamma or beta" if name in layer.params else "the running statistics"
    with pytest.raises(ValueError, match=f"^part 1: out may not share memory with {what}"):
        MicroBatch(layer)(X, out=out)
    assert_same_state(snapshot(layer), before)
    micro = MicroBatch(layer)
    micro.forward(X, update=False)
    with pytest.raises(ValueError, match=f"^part 1: out may not share memory with {what}"):
        micro.backward(X, out=out)
    assert_same_state(snapshot(layer), before)
    assert np.array_equal(BASE, base)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_part_that_was_changed_is_noticed(rng, training, adds):
    xs = rng.standard_normal(X.shape)
    layer = trained(rng).train(training)
    micro = MicroBatch(layer)
    micro.forward(xs, residuals=X if adds else None)
    before, kept = snapshot(layer), xs[1].copy()
    xs[1] += 1
    with pytest.raises(RuntimeError, match="part 1: x was changed after the forward"):
        micro.backward(X)
    assert_same_state(snapshot(layer), before)
    xs[1] = kept
    micro.backward(X)


@pytest.mark.parametrize("parts", [X[:1, :1], [X[0, :1], X[0, :0]]])
def test_a_single_value_altogether_has_no_variance(rng, parts):
    layer = trained(rng)
    before = snapshot(layer)
    with pytest.raises(ValueError, match="parts must have two values per feature or more"):
        MicroBatch(layer)(parts)
    assert_same_state(snapshot(layer), before)
    assert len(MicroBatch(layer.eval())(parts)) == len(parts)


def test_a_backward_needs_a_forward_in_the_same_mode(rng):
    layer = trained(rng)
    micro = MicroBatch(layer)
    with pytest.raises(RuntimeError, match=r"needs a forward before it.* make a MicroBatch for"):
        micro.backward(X)
    micro(X)
    layer.eval()
    with pytest.raises(RuntimeError, match="the last forward was in training mode"):
        micro.backward(X)
    layer.train()
    micro.backward(X)
    with pytest.raises(RuntimeError, match="each forward serves one backward"):
        micro.backward(X)


def test_what_is_no_layer_of_this_process_is_refused():
    class Alone:
        Get_rank = Get_size = Allgather = Alltoall = Bcast = print

    for layer in (None, BatchNorm, SyncBatchNorm(5, comm=Alone())):
        with pytest.raises(TypeError, match=r"layer must be a BatchNorm.* got"):
            MicroBatch(layer)


def test_memory_that_ends_leaves_the_layer_unchanged(rng, monkeypatch):
    layer = trained(rng)
    before = snapshot(layer)

    class Full(PartCache):
        calls = 0

        @classmethod
        def forward(cls, *arguments):
            cls.calls += 1
            if cls.calls == 3:
                raise MemoryError
            return super().forward(*arguments)

    monkeypatch.setattr(_micro_batch, "PartCache", Full)
    with pytest.raises(MemoryError):
        MicroBatch(layer)(X)
    assert_same_state(snapshot(layer), before)


@pytest.mark.parametrize(
    "twin_of", [copy.copy, copy.deepcopy, lambda micro: pickle.loads(pickle.dumps(micro))]
)
def test_copies_and_pickles_leave_the_parts_out(rng, twin_of):
    micro = MicroBatch(trained(rng))
    micro(X)
    twin = twin_of(micro)
    with pytest.raises(RuntimeError, match="backward needs a forward before it"):
        twin.backward(X)
    assert_same_state(snapshot(twin.layer), snapshot(micro.layer))
    micro.backward(X)
    assert np.array_equal(twin(X, update=False), micro(X, update=False))


def test_parts_in_another_byte_order(rng):
    layer, other = twins(rng, np.float64)
    micro, swapped = MicroBatch(layer), X.astype(X.dtype.newbyteorder())
    expected, out = MicroBatch(other), np.empty_like(X)
    micro(swapped, out=out)
    assert np.array_equal(out, expected(X))
    assert np.array_equal(micro.backward(swapped), expected.backward(X))


def test_repr_is_the_expression_that_makes_it():
    micro = MicroBatch(BatchNorm(5, relu=True))
    again = eval(repr(micro), {"BatchNorm": BatchNorm, "MicroBatch": MicroBatch})
    assert repr(again) == repr(micro)
    assert again.layer.relu
