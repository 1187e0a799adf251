"""Moments of parts against those of the whole, in exact fractions and 80-bit arithmetic."""

import doctest
import itertools
import tracemalloc
from fractions import Fraction

import exact
import numpy as np
import pytest
from exact import error

from bn_cy import Moments, _moments, moments
from bn_cy._running import take_in

DTYPES = [np.float32, np.float64]


def cut(x, sizes):
    """Return the rows of x in parts of these sizes."""
    return np.split(x, np.cumsum(sizes)[:-1])


def uneven(rng, rows, parts):
    """Return sizes of parts that add up to `rows`, among them 0, 1, and one that is most of it."""
    cuts = np.sort(rng.integers(0, rows // 10, parts - 3))
    sizes = [0, 1, *np.diff(cuts, prepend=0)]
    return rng.permutation([*sizes, rows - sum(sizes)])


def exact_moments(parts):
    """Return count, means and variances of the whole as fractions, from parts taken as exact."""
    count = sum(part.count for part in parts)
    means, variances = [], []
    for f in range(len(parts[0].mean)):
        of_parts = [(p.count, Fraction(p.mean[f]), Fraction(p.var[f])) for p in parts]
        mean = sum(n * m for n, m, _ in of_parts) / Fraction(count)
        means.append(mean)
        variances.append(sum(n * (v + (m - mean) ** 2) for n, m, v in of_parts) / count)
    return count, means, variances


def assert_is_exact(whole, parts, digits=1e-14):
    """Assert that nothing is lost but the roundings of the result."""
    count, means, variances = exact_moments(parts)
    assert whole.count == count
    for mean, var, true_mean, true_var in zip(whole.mean, whole.var, means, variances, strict=True):
        last_digit = np.spacing(np.abs(mean)) + 1e-15 * float(true_var) ** 0.5
        assert abs(Fraction(mean) - true_mean) <= Fraction(last_digit)
        assert abs(Fraction(var) - true_var) <= Fraction(digits) * true_var


# Against the whole


@pytest.mark.parametrize("offset", [0, 1, 1e3, 1e6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_in_any_order_are_the_whole(rng, offset, dtype):
    x = (offset + rng.standard_normal((5000, 6))).astype(dtype)
    _, mean, var = exact.statistics(x)
    parts = [moments(part) for part in cut(x, uneven(rng, len(x), 40))]
    for _ in range(5):
        rng.shuffle(parts)
        whole = Moments.sum(parts)
        assert whole.count == 5000
        assert np.max(np.abs(whole.mean - mean) / np.sqrt(var)) <= 2e-7
        assert np.max(np.abs(whole.var / var - 1)) <= 3e-7


@pytest.mark.parametrize("offset", [1, 1e6, 1e8])
def test_single_values_give_all_digits(rng, offset):
    x = offset + rng.standard_normal((3000, 4))
    _, mean, var = exact.statistics(x)
    whole = Moments.sum(moments(row[None]) for row in x)
    assert np.all(np.abs(whole.mean - mean) <= np.spacing(np.abs(whole.mean)))
    assert np.max(np.abs(whole.var / var - 1)) <= 1e-13


def test_parts_of_every_other_axis(rng):
    x = rng.standard_normal((6, 3, 8, 5))
    for axis, along in [(1, 0), (1, 2), (0, 3), (-1, 1)]:
        whole = Moments.sum(moments(part, axis=axis) for part in np.split(x, [1], axis=along))
        _, mean, var = exact.statistics(x, axis)
        assert error(whole.mean, mean) <= 1e-14
        assert error(whole.var, var) <= 1e-14


# Against fractions


def drawn(rng, features, offset, scale):
    count = int(rng.integers(0, 10 ** rng.integers(1, 10)))
    mean = offset + scale * rng.standard_normal(features)
    return Moments(count, mean, scale**2 * rng.exponential(size=features))


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (1e6, 1), (-1e13, 1), (1e30, 1e25), (3, 0)])
def test_nothing_is_lost_but_the_last_rounding(rng, offset, scale):
    parts = [drawn(rng, 3, offset, scale) for _ in range(30)]
    parts += [Moments(1, np.full(3, offset + 1e6 * scale), np.zeros(3))]  # an outlier
    parts += [Moments(0, np.full(3, np.nan), np.full(3, np.nan))]  # an empty part has no say
    for _ in range(5):
        rng.shuffle(parts)
        assert_is_exact(Moments.sum(parts), [part for part in parts if part.count])


def test_counts_beyond_the_integers_of_float64():
    whole = Moments.sum(
        [
            Moments(2**60, np.array([1.0]), np.array([2.0])),
            Moments(1, np.array([5.0]), np.array([0.0])),
        ]
        * 2
    )
    assert whole.count == 2**61 + 2
    np.testing.assert_array_equal(whole.mean, [1.0])
    np.testing.assert_array_equal(whole.var, [2.0])


def test_variances_near_the_ends_of_float64():
    parts = [
        Moments(1, np.array([0.0, 0.0]), np.zeros(2)),
        Moments(10**9, np.array([1e156, 1e-155]), np.zeros(2)),
    ]
    assert_is_exact(Moments.sum(parts), parts, digits=1e-4)  # of a subnormal number


def test_merge_is_the_sum_of_two(rng):
    one, other = moments(rng.standard_normal((3, 4))), moments(rng.standard_normal((9, 4)))
    for merged in (one.merge(other), other.merge(one)):
        assert isinstance(merged, Moments)
        assert_is_exact(merged, [one, other])


def test_a_part_alone_or_beside_empty_ones_keeps_its_bits(rng):
    part = moments(1e6 + rng.standard_normal((7, 4)))
    empty = moments(np.empty((0, 4)))
    for parts in ([part], [part, empty], [empty, part], [empty, part, empty]):
        whole = Moments.sum(parts)
        assert whole.count == 7
        np.testing.assert_array_equal(whole.mean, part.mean)
        np.testing.assert_array_equal(whole.var, part.var)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_part_that_is_not_finite_beside_an_empty_one_is_as_it_is(bad):
    part = moments(np.array([[1.0, 2.0], [bad, 3.0], [5.0, 4.0]]))
    empty = moments(np.empty((0, 2)))
    for whole in (part.merge(empty), empty.merge(part), Moments.sum([empty, part, empty])):
        assert whole.mean.tobytes() == part.mean.tobytes()
        assert whole.var.tobytes() == part.var.tobytes()


def test_numpy_set_to_raise_has_no_say(rng):
    with np.errstate(all="raise"):
        parts = [moments(1e-200 * rng.standard_normal((4, 3))) for _ in range(3)]
        assert Moments.sum(parts).count == 12


def test_empty_parts_are_an_empty_whole():
    empty = moments(np.empty((0, 4)))
    for whole in (empty.merge(empty), Moments.sum([empty])):
        assert whole.count == 0
        np.testing.assert_array_equal(whole.mean, np.zeros(4))
        np.testing.assert_array_equal(whole.var, np.zeros(4))


def test_a_constant_is_constant(rng):
    value = rng.standard_normal()
    parts = [Moments(int(n), np.array([value]), np.zeros(1)) for n in rng.integers(1, 100, 20)]
    whole = Moments.sum(parts)
    assert (whole.mean, whole.var) == (value, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_feature(rng, bad):
    x = rng.standard_normal((20, 3))
    x[7, 1] = bad
    whole = Moments.sum(moments(part) for part in cut(x, [4, 8, 8]))
    assert not np.isfinite(whole.var[1])
    good = [0, 2]
    _, mean, var = exact.statistics(x[:, good])
    assert error(whole.mean[good], mean) <= 1e-14
    assert error(whole.var[good], var) <= 1e-14


# What comes with it


def test_the_examples_in_the_docstrings():
    failed, attempted = doctest.testmod(_moments)
    assert attempted > 3
    assert not failed


def test_a_result_does_not_share_memory(rng):
    part = moments(rng.standard_normal((7, 4)))
    whole = Moments.sum([part])
    assert not np.shares_memory(whole.mean, part.mean)
    assert not np.shares_memory(whole.var, part.var)


def test_a_sum_takes_the_memory_of_a_few_parts_however_many_there_are():
    features = 20_000

    def peak(parts):
        rows = np.zeros(features)
        tracemalloc.start()
        Moments.sum(itertools.repeat(Moments(1, rows, rows), parts))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(3)
    assert peak(1000) <= 1.01 * peak(3) <= 300 * features


# Bad input


def of(features, count=1):
    return Moments(count, np.zeros(features), np.zeros(features))


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ([], ValueError, "parts must hold Moments, got none"),
        ([of(3), of(3), of(4)], ValueError, "part 2 has 4, and those before it have 3"),
        ([of(3), (1, np.zeros(3), np.zeros(3))], TypeError, "part 1 must be Moments, got tuple"),
        (of(3), TypeError, "part 0 must be Moments, got int"),
        ([of(3, 2.5)], TypeError, "count of part 0 must be an integer, got 2.5"),
        ([of(3, np.inf)], TypeError, "count of part 0 must be an integer, got inf"),
        ([of(3), of(3, -1)], ValueError, "count of part 1 must not be negative, got -1"),
        (
            [Moments(1, np.zeros(3), np.zeros(2))],
            ValueError,
            r"part 0 must have .* shape \(features,\), got \(3,\) and \(2,\)",
        ),
        (
            [Moments(1, np.zeros((1, 3)), np.zeros((1, 3)))],
            ValueError,
            r"part 0 must have .* got \(1, 3\) and \(1, 3\)",
        ),
    ],
)
def test_bad_parts_are_named(parts, kind, message):
    with pytest.raises(kind, match=message):
        Moments.sum(parts)


def test_a_bad_other_is_named():
    with pytest.raises(TypeError, match="part 1 must be Moments, got ndarray"):
        of(3).merge(np.zeros(3))
    with pytest.raises(ValueError, match="part 1 has 2, and those before it have 3"):
        of(3).merge(of(2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_batch_is_taken_into_running_statistics(rng, dtype, weight):
    mean, var = rng.standard_normal((2, 5))
    running = rng.standard_normal((2, 5)).astype(dtype)
    wide = running.astype(np.float64)
    take_in(*running, mean, var, weight, 1.25)
    expected = wide + weight * (np.array([mean, 1.25 * var]) - wide)
    np.testing.assert_allclose(running, expected, rtol=4 * np.finfo(dtype).eps, atol=1e-15)


def test_running_statistics_of_another_shape_are_refused_and_left():
    mean, var = np.zeros(4), np.zeros(5)
    with pytest.raises(ValueError, match=r"must have shape \(4,\).* got \(4,\) and \(5,\)"):
        take_in(mean, var, np.ones(4), np.ones(4), 0.5, 1.0)
    assert not mean.any()
