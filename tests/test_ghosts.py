"""Ghost batches: every group of a batch is as if it were a batch of its own."""

import pickle

import exact
import numpy as np
import pytest
from exact import error
from test_layer import assert_same_state, snapshot, trained

from bn_cy import BatchNorm, MicroBatch, SyncBatchNorm
from bn_cy._ghosts import places_of

FORMS = [  # shape, feature axis, axis of the examples, ghost_batch_size, sizes of the groups
    ((23, 5), 1, 0, 7, [7, 7, 7, 2]),
    ((22, 5), 1, 0, 7, [7, 7, 8]),  # a single value is left over
    ((5, 22), 0, 1, 7, [7, 7, 8]),
    ((5, 9, 3), 0, 1, 4, [4, 4, 1]),
    ((9, 5, 3, 2), 1, 0, 4, [4, 4, 1]),
    ((9, 3, 2, 5), -1, 0, 4, [4, 4, 1]),
    ((3, 5, 4), 1, 0, 1, [1, 1, 1]),
    ((6, 5), 1, 0, 3, [3, 3]),
    ((6, 5), 1, 0, 6, [6]),
    ((6, 5), 1, 0, 100, [6]),
    ((2000, 5, 10), 1, 0, 900, [900, 900, 200]),  # results in recycled memory
]


def cut(array, form):
    """Return the groups of an array."""
    _, _, along, _, sizes = form
    return np.split(array, np.cumsum(sizes)[:-1], axis=along)


def drawn(rng, form, dtype=np.float32):
    """Return x, a residual and dout."""
    shape, axis, *_ = form
    return exact.ordinary(rng, shape, axis, dtype), *rng.standard_normal((2, *shape)).astype(dtype)


def twins(rng, form, **options):
    """Return a layer with groups, and one without, that are alike otherwise."""
    layer, plain = (
        BatchNorm(5, axis=form[1], ghost_batch_size=size, **options) for size in (form[3], None)
    )
    exact.trained(rng, layer)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_groups(form):
    shape, axis, along, size, sizes = form
    places = places_of(np.empty(shape), axis, size)
    covered = [np.arange(shape[along])[place[along]] for place in places]
    assert [len(part) for part in covered] == sizes
    assert np.array_equal(np.concatenate(covered), np.arange(shape[along]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("momentum", [0.3, None, 1.0])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_group_is_a_batch_of_its_own(rng, form, adds, relu, momentum, dtype):
    """Bit for bit but for the sums of the groups' gradients, and running statistics."""
    along = form[2]
    layer, plain = twins(rng, form, relu=relu, momentum=momentum, dtype=dtype)
    x, residual, dout = drawn(rng, form, dtype)
    found = [layer(x, residual=residual if adds else None)]
    found += as_list(layer.backward(dout))
    expected, sums = [], {"gamma": 0, "beta": 0}
    for part, added, upstream in zip(*(cut(a, form) for a in (x, residual, dout)), strict=True):
        y = plain(part, residual=added if adds else None)
        expected.append([y, *as_list(plain.backward(upstream))])
        sums = {name: sums[name] + np.longdouble(plain.grads[name]) for name in sums}
    for whole, parts in zip(found, zip(*expected, strict=True), strict=True):
        assert whole.dtype == dtype
        assert np.array_equal(whole, np.concatenate(parts, axis=along))
    limit = np.finfo(dtype).eps
    for name, gradient in layer.grads.items():
        assert gradient.dtype == dtype
        assert error(gradient, sums[name], exact.norm(dout)) <= 4 * limit
    assert layer.num_batches_tracked == plain.num_batches_tracked == len(form[4])
    np.testing.assert_allclose(layer.running_mean, plain.running_mean, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(layer.running_var, plain.running_var, rtol=1e-13)


def as_list(gradients):
    return gradients if isinstance(gradients, tuple) else [gradients]


@pytest.mark.parametrize("form", [FORMS[1], FORMS[2], FORMS[4]], ids=str)
def test_gradients_against_finite_differences(rng, form):
    layer, _ = twins(rng, form, dtype=np.float64)
    x, _, dout = drawn(rng, form, np.float64)
    layer(x)
    dx = layer.backward(dout)

    def loss(array):
        return np.sum(dout * layer.forward(array, update=False))

    assert error(dx, exact.finite_differences(loss, x, 2e-4)) <= 1e-9
    gamma = layer.gamma.copy()

    def of_gamma(values):
        layer.gamma = values
        return loss(x)

    assert error(layer.dgamma, exact.finite_differences(of_gamma, gamma, 2e-4)) <= 1e-9


@pytest.mark.parametrize("prepare", ["eval", "freeze"])
def test_given_statistics_know_no_groups(rng, prepare):
    layer, plain = twins(rng, FORMS[0])
    x, residual, dout = drawn(rng, FORMS[0])
    mask = np.arange(len(x)) != 3
    for each in (layer, plain):
        getattr(each, prepare)()
    for options in ({}, {"residual": residual}, {"mask": mask}):
        assert np.array_equal(layer(x, **options), plain(x, **options))
        one, other = as_list(layer.backward(dout)), as_list(plain.backward(dout))
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        assert_same_state(snapshot(layer), snapshot(plain))


def test_eval_by_the_batch_knows_no_groups(rng):
    layer, plain = (BatchNorm(5, track_running_stats=False, ghost_batch_size=n) for n in (7, None))
    x, *_ = drawn(rng, FORMS[0])
    assert not np.array_equal(layer(x), plain(x))
    assert np.array_equal(layer.eval()(x), plain.eval()(x))


def test_the_cache_serves_any_number_of_backwards(rng):
    layer, _ = twins(rng, FORMS[0])
    steps, caches, expected = [drawn(rng, FORMS[0]) for _ in range(2)], [], []
    for x, _, dout in steps:
        layer(x)
        caches.append(layer.cache)
        expected.append((layer.backward(dout), dict(layer.grads)))
    layer.gamma *= 2  # changes no gradient: the caches have copies
    for (_, _, dout), cache, (dx, grads) in [*zip(steps, caches, expected, strict=True)] * 2:
        assert np.array_equal(layer.backward(dout, cache=cache), dx)
        assert all(np.array_equal(layer.grads[name], grads[name]) for name in grads)
    assert [len(cache.groups) for cache in caches] == [4, 4]
    with pytest.raises(RuntimeError, match="each forward serves one backward"):
        layer.backward(steps[0][2])
    with pytest.raises(ValueError, match="cache must be of a forward of this layer"):
        BatchNorm(5, scale=False).backward(steps[0][2], cache=caches[0])


def test_nothing_of_the_size_of_x_is_kept(rng):
    layer, _ = twins(rng, FORMS[0])
    x, *_ = drawn(rng, FORMS[0])
    layer(x)
    assert layer.cache.x is x
    for array in exact.arrays_within([vars(layer.cache)]):
        assert array.size <= 5 or np.shares_memory(array, x)


def test_a_layer_without_parameters(rng):
    layer, plain = (BatchNorm(5, scale=False, shift=False, ghost_batch_size=n) for n in (3, None))
    x, _, dout = drawn(rng, FORMS[7])
    y, dx = layer(x), layer.backward(dout)
    for part in np.split(np.arange(6), 2):
        assert np.array_equal(y[part], plain(x[part]))
        assert np.array_equal(dx[part], plain.backward(dout[part]))
    assert layer.grads == {}


@pytest.mark.parametrize("layout", exact.LAYOUTS)
@pytest.mark.parametrize("adds", [False, True])
def test_memory_orders_and_given_outputs(rng, layout, adds):
    form = FORMS[4]
    layer, plain = twins(rng, form, relu=True)
    arrays = drawn(rng, form)
    x, residual, dout = (exact.LAYOUTS[layout](array) for array in arrays)
    expected = []
    for options in ({}, {"out": np.empty_like(arrays[0])}):
        y = layer(x, residual=residual if adds else None, **options)
        assert options.get("out", y) is y
        if options:
            options = {"out": dout} if dout.flags.writeable else {}
        dx = as_list(layer.backward(dout, **options))
        assert options.get("out", dx[0]) is dx[0]
        expected.append([y, *dx])
    assert all(np.array_equal(a, b) for a, b in zip(*expected, strict=True))
    parts = zip(*(cut(array, form) for array in arrays[:2]), strict=True)
    wanted = [plain(part, residual=added if adds else None) for part, added in parts]
    assert error(expected[0][0], np.longdouble(np.concatenate(wanted))) <= 2e-7


def test_another_byte_order(rng):
    layer, _ = twins(rng, FORMS[0])
    x, *_ = drawn(rng, FORMS[0])
    y = layer(x)
    swapped = layer(x.astype(x.dtype.newbyteorder()))
    assert swapped.dtype.isnative and np.array_equal(swapped, y)


# What is counted


def test_a_group_that_is_not_finite(rng):
    form = FORMS[0]
    layer, plain = twins(rng, form)
    x, _, dout = drawn(rng, form)
    x[9, 3] = rng.choice([np.nan, np.inf])  # in the second of four groups
    before = snapshot(layer)
    with pytest.raises(FloatingPointError, match=r"x has NaN .* at 1 of the features: 3; the"):
        layer(x)
    assert layer.cache is None
    assert_same_state(snapshot(layer), before)
    layer(x, update=False)
    assert_same_state(snapshot(layer), before)
    for policy in ("skip", "update"):
        layer.on_nonfinite = plain.on_nonfinite = policy
        y = layer(x)
        wanted = np.concatenate([plain(part) for part in cut(x, form)])
        assert np.array_equal(y, wanted, equal_nan=True)
        assert layer.num_batches_tracked == plain.num_batches_tracked
        np.testing.assert_allclose(layer.running_mean, plain.running_mean, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(layer.running_var, plain.running_var, rtol=1e-13)
    assert layer.num_batches_tracked == 3 + 4
    assert np.isfinite(layer.backward(dout)[[0, -1]]).all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0)])
def test_an_empty_batch(rng, shape):
    layer, _ = twins(rng, FORMS[0])
    before = layer.state_dict()
    x = np.empty(shape, np.float32)
    assert layer(x).shape == layer.backward(x).shape == shape
    assert not layer.dgamma.any() and not layer.dbeta.any()
    assert_same_state(layer.state_dict(), before)


# Errors


X = np.random.default_rng(0).standard_normal((22, 5))
LONG = np.random.default_rng(1).standard_normal((29, 5))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"x": X[:, 1:]}, ValueError, "x must have 5 features"),
        ({"x": X.astype(int)}, TypeError, "x must be .*float32 or float64"),
        ({"x": X.astype(int), "out": X + 1}, TypeError, "x must be .*float32 or float64"),
        ({"x": X[0]}, ValueError, "x must have two dimensions"),
        ({"x": X[:1]}, ValueError, "x must have two values per feature or more"),
        ({"residual": X[:-1]}, ValueError, r"residual must have the shape \(22, 5\)"),
        ({"residual": np.tile(X, (2, 1))}, ValueError, r"residual must have the shape \(22, 5\)"),
        ({"residual": np.float32(X)}, ValueError, "residual must have .* dtype float64 of x"),
        ({"out": np.tile(X, (2, 1))}, ValueError, r"out must have the shape \(22, 5\)"),
        ({"out": X}, ValueError, "out may not share memory with x"),
        ({"out": LONG[7:], "residual": LONG[:-7]}, ValueError, "out may be residual itself, but"),
        ({"mask": np.ones(22, bool)}, ValueError, "mask and lengths do not go with ghost_batch"),
        ({"x": X[..., None], "lengths": [1] * 22}, ValueError, "mask and lengths do not go with"),
    ],
)
def test_a_refused_forward_changes_nothing(rng, arguments, kind, message):
    layer = trained(rng, ghost_batch_size=7)
    layer(X)
    before, cache, values = snapshot(layer), layer.cache, LONG.copy()
    with pytest.raises(kind, match=message):
        layer.forward(**{"x": X, **arguments})
    assert_same_state(snapshot(layer), before)
    assert layer.cache is cache
    assert np.array_equal(LONG, values)


@pytest.mark.parametrize(
    ("dout", "out", "kind", "message"),
    [
        (np.tile(X, (2, 1)), None, ValueError, r"dout must have the shape \(22, 5\)"),
        (X[:, 1:], None, ValueError, r"dout must have the shape \(22, 5\)"),
        (X.astype(int), None, TypeError, "dout must be"),
        (X, X[1:], ValueError, r"out must have the shape \(22, 5\)"),
        (X, X, ValueError, "out may not share memory with x"),
        (LONG[:-7], LONG[7:], ValueError, "out may be dout itself, but"),
    ],
)
def test_a_refused_backward_changes_nothing(rng, dout, out, kind, message):
    layer = trained(rng, ghost_batch_size=7)
    layer(X)
    before, cache, values = snapshot(layer), layer.cache, LONG.copy()
    with pytest.raises(kind, match=message):
        layer.backward(dout, out=out)
    assert_same_state(snapshot(layer), before)
    assert layer.cache is cache
    assert np.array_equal(LONG, values)


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_groups_of_a_single_value_are_refused(rows):
    layer = BatchNorm(5, ghost_batch_size=1)
    with pytest.raises(ValueError, match=r"ghost_batch_size must give .* got 1 for x of shape"):
        layer(X[:rows])
    assert layer.eval()(X[:rows]).shape == (rows, 5)


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
def test_an_output_in_the_memory_of_the_layer_is_refused(rng, name):
    layer, x = BatchNorm(5, dtype=np.float64, ghost_batch_size=4), rng.standard_normal((9, 5))
    before = layer.state_dict()
    what = "gamma or beta" if name in layer.params else "the running statistics"
    with pytest.raises(ValueError, match=f"out may not share memory with {what}"):
        layer(x, out=exact.over(getattr(layer, name), x))
    for key, array in layer.state_dict().items():
        assert np.array_equal(array, before[key]), key


def test_a_changed_batch_is_noticed(rng):
    layer, x = trained(rng, ghost_batch_size=7), X.copy()
    layer(x)
    x[-1] += 1  # in the last group: the first ones might have been written
    dout = X.copy()
    with pytest.raises(RuntimeError, match="x was changed after the forward"):
        layer.backward(dout, out=dout)
    np.testing.assert_array_equal(dout, X)


# The attribute


@pytest.mark.parametrize("value", [0, -3])
def test_a_size_below_one_is_refused(value):
    layer = BatchNorm(5, ghost_batch_size=4)
    for assign in (
        lambda: BatchNorm(5, ghost_batch_size=value),
        lambda: setattr(layer, "ghost_batch_size", value),
    ):
        with pytest.raises(ValueError, match=f"ghost_batch_size must be at least 1.*got {value}"):
            assign()
    assert layer.ghost_batch_size == 4


@pytest.mark.parametrize("value", [2.0, "4", [3]])
def test_a_size_that_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match="ghost_batch_size must be an integer"):
        BatchNorm(5, ghost_batch_size=value)


def test_the_size_may_change(rng):
    layer, plain = twins(rng, FORMS[0])
    x, *_ = drawn(rng, FORMS[0])
    layer.ghost_batch_size = None
    assert np.array_equal(layer(x), plain(x))
    plain.ghost_batch_size = np.int64(7)
    assert not np.array_equal(layer(x), plain(x))
    assert type(plain.ghost_batch_size) is int


def test_pickles_and_repr(rng):
    layer = trained(rng, ghost_batch_size=7)
    layer(X)
    again = pickle.loads(pickle.dumps(layer))
    assert again.ghost_batch_size == 7 and again.cache is None
    assert np.array_equal(again(X), layer(X))
    assert eval(repr(layer), {"BatchNorm": BatchNorm}).ghost_batch_size == 7


def test_a_pickle_from_before_ghost_batches_loads(rng):
    layer = trained(rng)
    state = layer.__getstate__() | {"version": 1}
    del state["_pickle_version"], state["_ghost_batch_size"]
    again = BatchNorm.__new__(BatchNorm)
    again.__setstate__(state)
    assert again.ghost_batch_size is None
    assert np.array_equal(again(X), layer(X))
    assert_same_state(snapshot(again), snapshot(layer))


def test_other_statistics_than_those_of_groups_are_refused(rng):
    class Alone:
        Get_rank = Get_size = Allgather = Alltoall = Bcast = print

    with pytest.raises(ValueError, match=r"ghost_batch_size must be None .*, got 4"):
        SyncBatchNorm(5, comm=Alone(), ghost_batch_size=4)
    layer = trained(rng, ghost_batch_size=7)
    before = snapshot(layer)
    with pytest.raises(ValueError, match="the layer has a ghost_batch_size, and a MicroBatch"):
        MicroBatch(layer)([X])
    assert_same_state(snapshot(layer), before)
    assert len(MicroBatch(layer.eval())([X])) == 1
