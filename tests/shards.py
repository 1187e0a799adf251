"""What holds of `SyncBatchNorm` on any communicator: programs that every rank runs.

Each draws the whole batch from the seed, on every rank alike, takes the rank's part of it, and
asserts against one `BatchNorm` or 80-bit arithmetic on the whole. `test_sync.py` runs them on
threads, `mpi/` on processes.
"""

import copy
import hashlib
import itertools
import pickle

import exact
import numpy as np
import pytest
from exact import error

from bn_cy import BatchNorm, SyncBatchNorm

FEATURES = 5
FORMS = [  # of the whole batch, the feature axis, the axis that is cut
    ((23, FEATURES), 1, 0),
    ((FEATURES, 23), 0, 1),
    ((9, FEATURES, 3, 2), 1, 0),
    ((2, 11, FEATURES), -1, 1),
]
LIMITS = {"float32": 2e-7, "float64": 1e-12}  # of y and dx; dgamma and dbeta twice that


def drawn(rng, comm, form, dtype, offset=0.0):
    """Return the whole of x, residual and dout, and where this rank's part of them is."""
    shape, axis, cut = form
    length, size = shape[cut], comm.Get_size()
    x = exact.ordinary(rng, shape, axis, dtype) + np.asarray(offset, dtype)
    residual, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    stops = np.sort(rng.integers(0, length + 1, size - 1))
    if size > 2:
        stops[rng.integers(size - 2)] = stops[-1]
        stops.sort()  # at least one part is empty
    bounds = [0, *stops, length]
    own = slice(*bounds[comm.Get_rank() : comm.Get_rank() + 2])
    return x, residual, dout, (slice(None),) * cut + (own,)


def randomize(rng, *layers):
    """Give all layers the same random parameters."""
    for name in layers[0].params:
        values = rng.uniform(0.5, 2, FEATURES)
        for layer in layers:
            layer.params[name] = values


def state(layer):
    """Return copies of all that a user sees of a layer."""
    return {**layer.state_dict(), **{f"d{name}": grad for name, grad in layer.grads.items()}}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def assert_alike(comm, layer):
    """Assert that the running statistics are the same bits on all ranks."""
    mine = np.concatenate([layer.running_mean, layer.running_var, [layer.num_batches_tracked]])
    all_of_them = np.empty((comm.Get_size(), len(mine)))
    comm.Allgather(mine, all_of_them)
    assert all(np.array_equal(mine, other, equal_nan=True) for other in all_of_them)


# Against the whole


def is_the_whole(comm, seed):
    """Every form and option: y, dx, gradients and running statistics of three steps."""
    rng = np.random.default_rng(seed)
    options = itertools.product(
        FORMS, LIMITS, [False, True], [False, True], [None, 0.3], [True, False]
    )
    for form, dtype, relu, adds, momentum, unbiased in options:
        axis = form[1]
        given = {"axis": axis, "dtype": dtype, "relu": relu, "momentum": momentum}
        layer = SyncBatchNorm(FEATURES, comm=comm, unbiased=unbiased, **given)
        whole = BatchNorm(FEATURES, unbiased=unbiased, **given)
        randomize(rng, layer, whole)
        for _ in range(3):
            step_is_that_of_the_whole(rng, comm, layer, whole, form, dtype, adds)
        assert_alike(comm, layer)


def step_is_that_of_the_whole(rng, comm, layer, whole, form, dtype, adds):
    x, residual, dout, own = drawn(rng, comm, form, dtype)
    extra = {"residual": residual} if adds else {}
    expected = [whole(x, **extra), *as_list(whole.backward(dout))]
    own_extra = {"residual": residual[own]} if adds else {}
    actual = [layer(x[own], **own_extra), *as_list(layer.backward(dout[own]))]
    assert layer.cache is None
    limit = LIMITS[dtype]
    for mine, of_all in zip(actual, expected, strict=True):
        assert (mine.shape, mine.dtype) == (of_all[own].shape, of_all.dtype)
        # Relative to the whole array, as the contract is; a part may be one small value.
        assert error(mine, np.longdouble(of_all[own]), exact.norm(of_all)) <= 2 * limit
    assert_own_gradients(layer, x, dout, expected[0] > 0 if layer.relu else True, own, form[1])
    assert layer.num_batches_tracked == whole.num_batches_tracked
    np.testing.assert_allclose(layer.running_mean, whole.running_mean, rtol=limit, atol=limit)
    np.testing.assert_allclose(layer.running_var, whole.running_var, rtol=limit)


def as_list(gradients):
    return gradients if isinstance(gradients, tuple) else [gradients]


def assert_own_gradients(layer, x, dout, passed, own, axis):
    """Assert that dgamma and dbeta are the sums over the rank's own part."""
    _, mean, var = exact.statistics(x, axis)
    part = x[own], mean, var
    gated = np.where(passed, dout, 0)[own]
    scales = exact.sum_scales(dout, x, mean, var, layer.eps, axis)
    sums = exact.gradient_sums(gated, *part, layer.eps, axis)
    limit = 2 * LIMITS[x.dtype.name]
    assert error(layer.dbeta, sums[0], scales[0]) <= limit
    assert error(layer.dgamma, sums[1], scales[1]) <= limit


def keeps_the_contract(comm, seed):
    """float32 with means up to 1e6 deviations, against 80-bit arithmetic."""
    rng = np.random.default_rng(seed)
    for offset in (1e2, 1e4, 1e6):
        x, _, dout, own = drawn(rng, comm, ((200, FEATURES), 1, 0), np.float32, offset)
        layer = SyncBatchNorm(FEATURES, comm=comm, momentum=1.0, unbiased=False)
        randomize(rng, layer)
        y, dx = layer(x[own]), layer.backward(dout[own])
        _, mean, var = exact.statistics(x)
        assert np.max(np.abs(layer.running_mean - mean) / np.sqrt(var)) <= 2e-7
        assert np.max(np.abs(layer.running_var / var - 1)) <= 3e-7
        expected = exact.forward(x, layer.gamma, layer.beta)
        assert error(y, expected[own], exact.norm(expected)) <= 2e-7
        expected, *_ = exact.backward(dout, x, layer.gamma)
        scale = exact.norm(exact.frozen_gradient(dout, x, var, layer.gamma))
        assert error(dx, expected[own], scale) <= 2e-7


def one_value_on_each_rank(comm, seed):
    """Enough, as long as all ranks together have two."""
    rng = np.random.default_rng(seed)
    x, dout = rng.standard_normal((2, comm.Get_size(), FEATURES))
    own = slice(comm.Get_rank(), comm.Get_rank() + 1)
    layer, whole = SyncBatchNorm(FEATURES, comm=comm), BatchNorm(FEATURES)
    if comm.Get_size() == 1:
        with pytest.raises(ValueError, match="two values per feature or more on all ranks"):
            layer(x)
        return
    np.testing.assert_allclose(layer(x[own]), whole(x)[own], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        layer.backward(dout[own]), whole.backward(dout)[own], rtol=1e-12, atol=1e-12
    )


def one_value_on_all_ranks_together(comm, seed):
    """It has no variance, wherever it is."""
    rng = np.random.default_rng(seed)
    layer = SyncBatchNorm(FEATURES, comm=comm)
    before = state(layer)
    rows = 1 if comm.Get_rank() == comm.Get_size() - 1 else 0
    with pytest.raises(ValueError, match="two values per feature or more on all ranks"):
        layer(rng.standard_normal((rows, FEATURES)))
    assert_same(state(layer), before)


def an_empty_batch(comm, seed):
    """Nothing on any rank: empty results, zero gradients, no statistics."""
    layer = SyncBatchNorm(FEATURES, comm=comm)
    before = layer.state_dict()
    x = np.empty((0, FEATURES), np.float32)
    assert layer(x).shape == layer.backward(x).shape == x.shape
    np.testing.assert_array_equal(layer.dgamma, np.zeros(FEATURES))
    assert_same(layer.state_dict(), before)


def given_outputs_and_caches(comm, seed):
    """Two forwards before their backwards, twice backward, and out= that may be dout."""
    rng = np.random.default_rng(seed)
    layer, whole = (
        SyncBatchNorm(FEATURES, comm=comm, dtype=np.float64),
        BatchNorm(FEATURES, dtype=np.float64),
    )
    randomize(rng, layer, whole)
    steps, caches = [drawn(rng, comm, FORMS[2], np.float64) for _ in range(2)], []
    for x, _, _, own in steps:
        y = np.empty_like(x[own])
        assert layer.forward(x[own], out=y) is y
        np.testing.assert_allclose(y, whole(x)[own], rtol=1e-12, atol=1e-12)
        caches.append((layer.cache, whole.cache))
    layer.gamma *= 2  # changes no gradient: the caches have copies
    for (_, _, dout, own), (mine, of_all) in [*zip(steps, caches, strict=True)] * 2:
        assert mine.count == of_all.count
        np.testing.assert_allclose(mine.mean, of_all.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(mine.var, of_all.var, rtol=1e-12)
        dx = dout[own].copy()
        assert layer.backward(dx, out=dx, cache=mine) is dx
        expected = whole.backward(dout, cache=of_all)
        np.testing.assert_allclose(dx, expected[own], rtol=1e-12, atol=1e-12)


def with_a_mask(comm, seed):
    """What does not count is as if it were not there, on any rank; on one, nothing may count."""
    rng = np.random.default_rng(seed)
    for form, dtype in itertools.product(FORMS, LIMITS):
        x, residual, dout, own = drawn(rng, comm, form, dtype)
        axis = form[1]
        mask = rng.random(np.delete(x.shape, axis)) < 0.5
        rows = np.moveaxis(x, axis, -1)
        rows[~mask] = np.nan
        mine = np.moveaxis(np.broadcast_to(np.expand_dims(mask, axis), x.shape)[own], axis, -1)
        layer = SyncBatchNorm(FEATURES, comm=comm, axis=axis, dtype=dtype, relu=True)
        whole = BatchNorm(FEATURES, axis=axis, dtype=dtype, relu=True)
        randomize(rng, layer, whole)
        expected = [whole(x, residual=residual, mask=mask), *whole.backward(dout)]
        out = np.empty_like(x[own])
        y = layer(x[own], residual=residual[own], mask=mine[..., 0], out=out)
        assert y is out
        for found, of_all in zip([y, *layer.backward(dout[own])], expected, strict=True):
            scale = exact.norm(of_all)
            assert error(found, np.longdouble(of_all[own]), scale) <= 2 * LIMITS[dtype]
            assert not np.moveaxis(found, axis, -1)[~mine].any()
        assert_alike(comm, layer)


def no_lengths_of_an_empty_part(comm, seed):
    """The last rank has no sequences, and a list of no lengths."""
    rng = np.random.default_rng(seed)
    x, dout = rng.standard_normal((2, comm.Get_size() - 1, FEATURES, 4))
    lengths = rng.integers(2, 5, len(x)).tolist()
    own = slice(comm.Get_rank(), comm.Get_rank() + 1)
    layer, whole = SyncBatchNorm(FEATURES, comm=comm), BatchNorm(FEATURES)
    for found, expected in [
        (layer(x[own], lengths=lengths[own]), whole(x, lengths=lengths)),
        (layer.backward(dout[own]), whole.backward(dout)),
    ]:
        np.testing.assert_allclose(found, expected[own], rtol=1e-12, atol=1e-12)


# What is counted


def what_is_not_finite(comm, seed):
    """A bad batch on the last rank: each policy does on all ranks what it does on one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, FEATURES)).astype(np.float32)
    if comm.Get_rank() == comm.Get_size() - 1:
        x[1, 3] = rng.choice([np.nan, np.inf])
    layer = SyncBatchNorm(FEATURES, comm=comm)
    before = state(layer)
    with pytest.raises(FloatingPointError, match=r"x has NaN .* at 1 of the features: 3; the"):
        layer(x)
    assert layer.cache is None
    assert_same(state(layer), before)
    layer.on_nonfinite = "skip"
    assert np.isfinite(layer(x)).all(axis=0).tolist() == [True, True, True, False, True]
    assert_same(state(layer), before)
    layer.on_nonfinite = "raise"
    layer(x, update=False)
    assert_same(state(layer), before)
    layer.on_nonfinite = "update"
    layer(x)
    assert np.isfinite(layer.running_var).tolist() == [True, True, True, False, True]
    assert layer.num_batches_tracked == 1
    assert_alike(comm, layer)
    layer.momentum = 1.0  # forgets it
    layer(rng.standard_normal((4, FEATURES)))
    assert np.isfinite(layer.running_var).all()
    kept = state(layer)
    layer.momentum = 0.0
    layer(x)
    assert_same({**kept, "num_batches_tracked": np.int64(3)}, state(layer))


def modes(comm, seed):
    """Eval and frozen layers need no other rank; neither does a layer without statistics."""
    rng = np.random.default_rng(seed)
    x, dout = rng.standard_normal((2, 4, FEATURES))
    layer, plain = SyncBatchNorm(FEATURES, comm=comm), BatchNorm(FEATURES)
    layer(x)
    plain.load_state_dict(layer.state_dict())
    if comm.Get_rank() == 0:  # the others do nothing
        for prepare in (lambda one: one.freeze(), lambda one: one.unfreeze().eval()):
            prepare(layer)
            prepare(plain)
            np.testing.assert_array_equal(layer(x), plain(x))
            np.testing.assert_array_equal(layer.backward(dout), plain.backward(dout))
            assert_same(state(layer), state(plain))
        layer.train()
        free = {"track_running_stats": False}
        bare = SyncBatchNorm(FEATURES, comm=comm, **free).eval()
        np.testing.assert_array_equal(bare(x), BatchNorm(FEATURES, **free)(x))
    layer(x)
    layer.backward(dout)
    assert layer.num_batches_tracked == 2
    bare = SyncBatchNorm(FEATURES, comm=comm, track_running_stats=False)
    np.testing.assert_array_equal(bare(x), layer.forward(x, update=False))


def copies_and_pickles(comm, seed):
    """Copies share the communicator; pickles are without, and say so when they train."""
    x = np.random.default_rng(seed).standard_normal((4, FEATURES))
    layer = SyncBatchNorm(FEATURES, comm=comm, momentum=None)
    layer(x)
    for make in (copy.copy, copy.deepcopy):
        twin = make(layer)
        assert type(twin) is SyncBatchNorm
        assert twin.comm is comm
        assert twin.cache is None
        np.testing.assert_array_equal(twin(x), layer(x))
        assert_same(state(twin), state(layer))
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.comm is None
    np.testing.assert_array_equal(loaded.eval()(x), copy.deepcopy(layer).eval()(x))
    with pytest.raises(RuntimeError, match=r"no communicator: assign layer\.comm"):
        loaded.train()(x)
    loaded.comm = comm
    np.testing.assert_array_equal(loaded(x), layer(x))


# Errors


def wrong_forwards(x, layer):
    """Yield what a rank may do wrong, and the error that all ranks get."""
    narrow, other = x[:, 1:].copy(), x.astype(np.float64)
    swapped, long = np.zeros_like(x, x.dtype.newbyteorder()), np.zeros((5, FEATURES), x.dtype)
    yield (narrow,), {}, ValueError, "x must have 5 features"
    yield (x.astype(np.int64),), {}, TypeError, "x must be of float32 or float64"
    yield (None,), {}, TypeError, "x must be an array"
    yield (x[0],), {}, ValueError, "x must have two dimensions"
    yield (np.ma.masked_array(x),), {}, TypeError, "x must have no mask"
    yield (x,), {"out": narrow}, ValueError, r"out must have the shape \(4, 5\)"
    yield (x,), {"out": other}, ValueError, r"out must have .* dtype float32 of x, got .* float64"
    yield (x,), {"out": x}, ValueError, "out may not share memory with x"
    yield (x,), {"out": x.tolist()}, TypeError, "out must be an array, got list"
    yield (x,), {"out": read_only(x)}, ValueError, "out must be writable"
    yield (x,), {"out": swapped}, ValueError, "out must have .* dtype float32 of x, got .* >f4"
    yield (x,), {"out": exact.over(layer.gamma, x)}, ValueError, "out may not .* with gamma or"
    yield (x,), {"out": exact.over(layer.beta, x)}, ValueError, "out may not .* with gamma or"
    for array in (layer.running_mean, layer.running_var):
        given = {"out": exact.over(array, x)}
        yield (x,), given, ValueError, "out may not share memory with the running statistics"
        yield (x,), {**given, "mask": np.True_}, ValueError, "out may not .* the running statistics"
    given = {"out": long[1:], "residual": long[:-1]}
    yield (x,), given, ValueError, "out may be residual itself, but may not overlap it otherwise"
    yield (x,), {"residual": narrow}, ValueError, r"residual must have the shape \(4, 5\)"
    yield (x,), {"residual": other}, ValueError, "residual must have"
    yield (x,), {"update": "no"}, TypeError, "update must be True or False, got 'no'"
    yield (x,), {"mask": np.ones(3, bool)}, ValueError, r"mask must have the shape \(4,\)"


def wrong_backwards(dout, layer):
    yield (dout[:, 1:],), {}, ValueError, r"dout must have the shape \(4, 5\)"
    yield (dout.astype(np.int64),), {}, TypeError, "dout must be of floating-point numbers"
    yield (None,), {}, TypeError, "dout must be an array"
    yield (dout,), {"out": dout[1:]}, ValueError, "out must have the shape"
    long = np.zeros((5, FEATURES), dout.dtype)
    yield (long[:-1],), {"out": long[1:]}, ValueError, "out may be dout itself, but may not overlap"
    given = {"out": exact.over(layer.running_var, dout)}
    yield (dout,), given, ValueError, "out may not share memory with the running statistics"


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def errors_of_one_rank(comm, seed):
    """All ranks raise it, no layer has changed, and all go on together."""
    rng = np.random.default_rng(seed)
    x, dout = rng.standard_normal((2, 4, FEATURES)).astype(np.float32)
    layer = SyncBatchNorm(FEATURES, comm=comm)
    for method, wrong in [
        (layer.forward, wrong_forwards(x, layer)),
        (layer.backward, wrong_backwards(dout, layer)),
    ]:
        for arguments, options, kind, message in wrong:
            at_fault = int(rng.integers(comm.Get_size()))
            before, cache = state(layer), layer.cache
            if comm.Get_rank() != at_fault:
                arguments, options = (x,), {}
            with pytest.raises(kind, match=f"^rank {at_fault}: {message}"):
                method(*arguments, **options)
            assert_same(state(layer), before)
            assert layer.cache is cache
        layer(x)
    layer.backward(dout)
    assert_alike(comm, layer)


def a_part_that_changed(comm, seed):
    """x was changed on one rank between a forward and its backward: noticed on all."""
    rng = np.random.default_rng(seed)
    x, residual, dout = rng.standard_normal((3, 4, FEATURES))
    at_fault = int(rng.integers(comm.Get_size()))
    for extra in ({}, {"residual": residual}):
        layer = SyncBatchNorm(FEATURES, comm=comm, relu=True, dtype=np.float64)
        before = x.copy()
        layer(x, **extra)
        grads = {name: grad.copy() for name, grad in layer.grads.items()}
        if comm.Get_rank() == at_fault:
            x *= 2
        with pytest.raises(RuntimeError, match=f"^rank {at_fault}: x was changed after the forw"):
            layer.backward(dout)
        assert_same(layer.grads, grads)
        x[...] = before
        layer.backward(dout)


def several_errors_at_once(comm, seed):
    """The first rank's is everybody's."""
    layer = SyncBatchNorm(FEATURES, comm=comm)
    with pytest.raises(ValueError, match=r"^rank 0: x must have 5 features .* shape \(7, 2\)"):
        layer(np.zeros((7 + comm.Get_rank(), 2)))


def widths_that_differ(comm, seed):
    """Layers of other widths are refused on all ranks, before their messages meet."""
    last = comm.Get_size() - 1
    width = FEATURES + (comm.Get_rank() == last)
    layer = SyncBatchNorm(width, comm=comm)
    x = np.random.default_rng(seed).standard_normal((4, width))
    if last == 0:
        layer(x)
        return
    for _ in range(2):
        with pytest.raises(ValueError, match=r"num_features must be .* on all ranks, got \[5, 6\]"):
            layer(x)


# Bits


def digest(comm, seed):
    """Return a hash of all that a rank computes in three steps."""
    rng = np.random.default_rng(seed)
    found = hashlib.sha256()
    for form, dtype in itertools.product(FORMS, LIMITS):
        layer = SyncBatchNorm(FEATURES, comm=comm, axis=form[1], dtype=dtype, relu=True)
        for _ in range(3):
            x, residual, dout, own = drawn(rng, comm, form, dtype, offset=10.0)
            y = layer(x[own], residual=residual[own])
            for array in (y, *layer.backward(dout[own]), *state(layer).values()):
                found.update(np.ascontiguousarray(array))
    return found.hexdigest()


PROGRAMS = [
    is_the_whole,
    keeps_the_contract,
    one_value_on_each_rank,
    one_value_on_all_ranks_together,
    an_empty_batch,
    given_outputs_and_caches,
    with_a_mask,
    no_lengths_of_an_empty_part,
    what_is_not_finite,
    modes,
    copies_and_pickles,
    errors_of_one_rank,
    a_part_that_changed,
    several_errors_at_once,
    widths_that_differ,
    digest,
]
