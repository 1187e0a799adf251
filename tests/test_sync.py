"""`SyncBatchNorm` on ranks that are threads, and what of it needs no second rank."""

import numpy as np
import pytest
import shards
from thread_comm import on_threads

import bn_cy
from bn_cy import BatchNorm, SyncBatchNorm


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("program", shards.PROGRAMS, ids=lambda program: program.__name__)
def test_ranks_that_are_threads(rng, size, program):
    on_threads(size, program, int(rng.integers(2**32)))


@pytest.mark.parametrize("size", [2, 7])
def test_a_run_repeats_bit_for_bit(rng, size):
    seed = int(rng.integers(2**32))
    first = on_threads(size, shards.digest, seed)
    assert on_threads(size, shards.digest, seed) == first
    assert len(set(first)) == size  # parts differ, and what is compared is no constant


class Alone:
    """A communicator that is one of mpi4py in nothing but its names."""

    def Get_rank(self):
        return 0

    def Get_size(self):
        return 1

    def Allgather(self, sent, received):
        received[...] = sent.reshape(received.shape)

    Alltoall = Allgather

    def Bcast(self, array, root=0):
        pass


def test_any_object_with_the_methods_will_do(rng):
    x = rng.standard_normal((6, 5))
    layer = SyncBatchNorm(5, comm=Alone())
    np.testing.assert_allclose(layer(x), BatchNorm(5)(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("comm", [None, 4, object(), np.zeros(3)])
def test_what_is_no_communicator_is_refused(comm):
    message = rf"comm must be .* Alltoall, .*, got {type(comm).__name__}, which has no Get_rank"
    with pytest.raises(TypeError, match=message):
        SyncBatchNorm(5, comm=comm)
    layer = SyncBatchNorm(5, comm=Alone())
    with pytest.raises(TypeError, match=message):
        layer.comm = comm


def test_options_are_those_of_the_layer():
    layer = SyncBatchNorm(5, comm=Alone(), eps=1e-3, relu=True, on_nonfinite="skip")
    plain = BatchNorm(5, eps=1e-3, relu=True, on_nonfinite="skip")
    again = eval(repr(layer).replace(repr(layer.comm), "comm"), vars(bn_cy), {"comm": layer.comm})
    assert repr(again) == repr(layer)
    assert repr(layer).replace(f"comm={layer.comm!r}, ", "") == "Sync" + repr(plain)
    with pytest.raises(TypeError, match="speed"):
        SyncBatchNorm(5, comm=Alone(), speed=3)


def test_a_backward_without_a_forward_is_refused(rng):
    layer, x = SyncBatchNorm(5, comm=Alone()), rng.standard_normal((6, 5))
    with pytest.raises(RuntimeError, match="backward needs a forward before it"):
        layer.backward(x)
    layer(x)
    with pytest.raises(RuntimeError, match="the last forward was in training mode"):
        layer.eval().backward(x)


def test_a_cache_of_another_layer_is_refused(rng):
    layer, other = (SyncBatchNorm(n, comm=Alone()) for n in (5, 6))
    other(rng.standard_normal((4, 6)))
    with pytest.raises(ValueError, match="cache must be of a forward of this layer"):
        layer.backward(rng.standard_normal((4, 5)), cache=other.cache)


def test_an_error_of_a_kind_that_has_no_number_is_a_runtime_error(rng):
    class Hostile:
        def __array__(self, dtype=None, copy=None):
            raise KeyError("é" * 3000)

    with pytest.raises(RuntimeError, match=r"^rank 0: 'é") as caught:
        SyncBatchNorm(5, comm=Alone())(Hostile())
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_cache_has_what_that_of_a_layer_has(rng):
    x = rng.standard_normal((6, 5))
    layer, plain = SyncBatchNorm(5, comm=Alone(), shift=False), BatchNorm(5, shift=False)
    layer(x), plain(x)
    for name in ("count", "num_features", "scaled", "shifted", "empty"):
        assert getattr(layer.cache, name) == getattr(plain.cache, name)
    np.testing.assert_array_equal(layer.cache.mean, plain.cache.mean)
