"""`bn_cy.dask` against the functions on arrays in memory, and an array larger than memory."""

from pathlib import Path

import exact
import numpy as np
import pytest
from exact import error

import bn_cy

da = pytest.importorskip("dask.array")
dask = pytest.importorskip("dask")

FORMS = [  # shape, feature axis, chunks
    ((200, 5), 1, (33, 5)),
    ((200, 5), -1, (7, 2)),  # more chunks than a level of the tree takes, features in three
    ((5, 200), 0, (3, 50)),
    ((30, 5, 4, 3), 1, (4, 2, 3, 2)),
    ((30, 4, 5), 2, (30, 4, 5)),
    ((4, 5), 1, (1, 1)),
]


@pytest.fixture(params=FORMS, ids=str)
def form(request):
    return request.param


def drawn(rng, form, dtype, offset=0.0):
    shape, axis, chunks = form
    x = exact.ordinary(rng, shape, axis, dtype) + np.asarray(offset, dtype)
    return x, da.from_array(x, chunks=chunks)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_moments(rng, form, dtype, offset):
    x, lazy = drawn(rng, form, dtype, offset)
    (found,) = dask.compute(bn_cy.dask.moments(lazy, axis=form[1]))
    n, mean, var = exact.statistics(x, form[1])
    assert type(found) is bn_cy.Moments and type(found.count) is int
    assert found.count == n
    assert found.mean.shape == found.var.shape == (5,)
    assert np.max(np.abs(found.mean - mean) / np.sqrt(var)) <= 2e-7
    assert np.max(np.abs(found.var / var - 1)) <= 3e-7
    if dtype is np.float64 and not offset:
        np.testing.assert_allclose(found.mean, np.float64(mean), rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(found.var, np.float64(var), rtol=1e-14)


def test_it_is_lazy_and_a_tree():
    """Nothing is read before it is computed, then each chunk once; no step takes all chunks."""
    read, merged = [], []

    def block(block_info):
        read.append(block_info[None]["chunk-location"])
        return np.ones((10, 5))

    x = da.map_blocks(block, chunks=((10,) * 64, (5,)), dtype=float, meta=np.empty((0, 0)))
    lazy = bn_cy.dask.moments(x)
    assert read == []
    with pytest.MonkeyPatch.context() as patch:
        real = bn_cy.Moments.sum
        patch.setattr(
            bn_cy.Moments, "sum", lambda parts: real(merged.append(len(p := list(parts))) or p)
        )
        (found,) = dask.compute(lazy, scheduler="synchronous")
    assert sorted(read) == [(i, 0) for i in range(64)]
    assert found.count == 640 and len(merged) > 4
    assert max(merged) <= 16


def test_chunks_of_unknown_sizes(rng):
    x, lazy = drawn(rng, FORMS[0], np.float64)
    few = lazy[lazy[:, 0] > 0]
    (found,) = dask.compute(bn_cy.dask.moments(few))
    expected = bn_cy.moments(x[x[:, 0] > 0])
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(found.var, expected.var, rtol=1e-14)
    assert bn_cy.Moments.sum([found, expected]).count == 2 * expected.count


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_another_byte_order(rng, form, dtype):
    x, lazy = drawn(rng, form, dtype)
    swapped = lazy.astype(x.dtype.newbyteorder())
    found, expected = dask.compute(
        *(bn_cy.dask.moments(array, axis=form[1]) for array in (swapped, lazy))
    )
    assert found.count == expected.count
    assert np.array_equal(found.mean, expected.mean) and np.array_equal(found.var, expected.var)
    y = bn_cy.dask.normalize(swapped, *found[1:], axis=form[1])
    assert y.dtype == y.compute().dtype == dtype and y.dtype.isnative
    assert np.array_equal(y.compute(), bn_cy.normalize(x, *found[1:], axis=form[1]))


@pytest.mark.parametrize("rows", [3, 100])
def test_no_features(rows):
    x = da.ones((rows, 5), chunks=(1, 2))[:, :0]
    (found,) = dask.compute(bn_cy.dask.moments(x))
    assert found.count == rows and found.mean.shape == found.var.shape == (0,)
    assert bn_cy.dask.normalize(x, found.mean, found.var).compute().shape == (rows, 0)


def test_rows_in_smaller_chunks_cut_the_result(rng):
    x, lazy = drawn(rng, FORMS[0], np.float32)
    mean, var = rng.standard_normal(5), rng.uniform(1, 2, 5)
    y = bn_cy.dask.normalize(lazy, da.from_array(mean, chunks=2), var)
    assert y.chunks == (lazy.chunks[0], (2, 2, 1))
    assert np.array_equal(y.compute(), bn_cy.normalize(x, mean, var))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("scale", "shift"), exact.COMBINATIONS)
@pytest.mark.parametrize("lazy_rows", [False, True])
def test_normalize_has_the_bits_of_the_function(rng, form, lazy_rows, scale, shift, relu):
    axis = form[1]
    x, lazy = drawn(rng, form, np.float32)
    gamma, beta = exact.parameters(rng, 5, np.float32, scale, shift)
    _, mean, var = bn_cy.dask.moments(lazy, axis=axis)
    if not lazy_rows:
        mean, var = dask.compute(mean, var)
    y = bn_cy.dask.normalize(lazy, mean, var, gamma, beta, 1e-3, axis=axis, relu=relu)
    assert (y.shape, y.dtype, y.chunks) == (lazy.shape, lazy.dtype, lazy.chunks)
    mean, var, found = dask.compute(mean, var, y)
    expected = bn_cy.normalize(x, mean, var, gamma, beta, 1e-3, axis=axis, relu=relu)
    assert np.array_equal(found, expected)
    if not relu:
        wanted = exact.forward(x, gamma, beta, 1e-3, axis)
        assert error(found, wanted) <= 2e-7


@pytest.mark.parametrize(
    ("x", "options", "kind", "message"),
    [
        (np.ones((4, 5)), {}, TypeError, "x must be a Dask array, got ndarray"),
        (da.ones((4, 5), dtype=int), {}, TypeError, "x must be float32 or float64, got int64"),
        (da.ones(4), {}, ValueError, "x must have two dimensions or more"),
        (da.ones((4, 5)), {"axis": 2}, ValueError, "axis must be from -2 to 1"),
    ],
)
def test_bad_input_is_refused_at_once(x, options, kind, message):
    for call in (
        lambda: bn_cy.dask.moments(x, **options),
        lambda: bn_cy.dask.normalize(x, np.zeros(5), np.ones(5), **options),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_a_relu_is_a_flag():
    with pytest.raises(TypeError, match="relu must be True or False, got 'no'"):
        bn_cy.dask.normalize(da.ones((4, 5)), np.zeros(5), np.ones(5), relu="no")


def test_a_row_of_another_shape_is_refused():
    x, row = da.ones((4, 5)), np.ones(5)
    for name in ("mean", "var", "gamma", "beta"):
        rows = {"mean": row, "var": row, name: np.ones(4)}
        with pytest.raises(ValueError, match=rf"{name} must have shape \(5,\), .* got \(4,\)"):
            bn_cy.dask.normalize(x, **rows)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_an_array_larger_than_memory(run):
    """A gigabyte, in a process that may ask for a quarter of it: nothing of it is collected."""
    run(
        """
        import resource
        from pathlib import Path

        import dask
        import dask.array as da
        import numpy as np

        import bn_cy
        import bn_cy.dask

        ROWS, FEATURES, CHUNKS = 1 << 16, 32, 128  # chunks of 8 MB


        def chunk(block_info=None):
            number = block_info[None]["chunk-location"][0] if block_info else 0
            drawn = np.random.default_rng(number).random((ROWS, FEATURES), np.float32)
            return drawn + np.float32(number)


        chunks, meta = ((ROWS,) * CHUNKS, (FEATURES,)), np.empty((0, 0), np.float32)
        x = da.map_blocks(chunk, chunks=chunks, dtype=np.float32, meta=meta)
        assert x.nbytes == 1 << 30
        dask.config.set(scheduler="threads", num_workers=2)
        bn_cy.set_num_threads(1)
        dask.compute(bn_cy.dask.moments(x[: 4 * ROWS]))  # starts threads
        page = resource.getpagesize()
        pages, resident, *_ = map(int, Path("/proc/self/statm").read_text().split())
        assert resident * page < x.nbytes // 4
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * page + x.nbytes // 4, hard))
        (found,) = dask.compute(bn_cy.dask.moments(x))
        y = bn_cy.dask.normalize(x, found.mean, found.var, np.sqrt(found.var), eps=0)
        largest = y.max().compute()
        # Not by getrusage, which counts the memory of the parent before exec.
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        assert peak < x.nbytes // 2, peak
        try:
            x.compute()
        except MemoryError:
            print("limited")

        expected = bn_cy.Moments.sum(
            bn_cy.moments(chunk({None: {"chunk-location": (i, 0)}})) for i in range(CHUNKS)
        )
        assert found.count == expected.count == ROWS * CHUNKS
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-14)
        np.testing.assert_allclose(found.var, expected.var, rtol=1e-14)
        assert abs(largest + found.mean.min() - CHUNKS) < 1  # the last chunk's, less a mean
        print("done")
    """,
        expected="limited done",
    )
