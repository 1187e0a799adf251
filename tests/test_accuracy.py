"""The accuracy contract: docs/accuracy.md says what is promised, every promise is held here.

The references are exact sums of fractions, or two passes in 80-bit arithmetic about a value of the
data, the second correcting the mean of the first: the mean is then known to the last bit, in two
parts, at any offset.
"""

from decimal import Decimal, localcontext
from fractions import Fraction

import nist
import numpy as np
import pytest
from exact import error, norm, parameters

from bn_cy import (
    BatchNorm,
    batchnorm_backward,
    batchnorm_forward,
    gradient_sums,
    moments,
    normalize,
)

Y = DX = 2e-7  # relative L2 errors
SUMS = 4e-7  # dgamma and dbeta
VAR = 3e-7  # relative
MEAN = 2e-7  # in standard deviations
NOT_CENTRED = 0  # of dbeta, in dgamma
# dgamma of a few thousand values that repeat so rarely, or run so roughly, that it may go
# unnoticed: about one array in a hundred is then beyond SUMS.
UNNOTICED = 8e-7

CHUNK = 1 << 18  # elements held in 80 bits at a time

SHAPES = [  # one for every way in which an array is walked
    ((300, 70), 1),
    ((257, 1029), 1),
    ((3, 500), 1),
    ((28, 200), 1),
    ((1003, 100), 1),
    ((5001, 3), 1),
    ((20011, 1), 1),
    ((50, 3000), 0),
    ((90, 130), 0),
    ((70, 21), 0),
    ((40, 23, 7, 7), 1),
    ((128, 4, 14, 14), 1),
    ((12, 30, 5, 5), 1),
    ((2, 40, 5, 7), 1),
    ((5, 60, 9, 9), 1),
    ((6, 7, 37, 31), 1),
    ((20, 7, 26, 27), 1),
    ((9, 3, 97, 91), 1),
    ((1, 5, 100, 101), 1),
    ((6, 9, 8, 20), -1),
]

SAMPLED = 8  # values of a feature that its shift is made of


# References


def rows_of(array, axis=1):
    """Return a batch as rows of features."""
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def chunks(*arrays):
    """Yield arrays of rows in 80 bits, some rows at a time."""
    step = max(1, CHUNK // arrays[0].shape[1])
    for start in range(0, len(arrays[0]), step):
        yield [np.asarray(array[start : start + step], np.longdouble) for array in arrays]


def ratio(wrong, scale):
    """Return wrong/scale; 0 where nothing is wrong, though the scale be 0."""
    return np.divide(wrong, scale, out=np.zeros_like(scale), where=wrong != 0)


class Truth:
    """The statistics of rows of features. The mean is origin + rest: the sum would be rounded."""

    def __init__(self, x):
        self.count = len(x)
        self.origin = x[0].astype(np.longdouble)
        self.rest = np.zeros_like(self.origin)
        self.rest = self._mean(x, lambda deviation: deviation)
        self.rest = self.rest + self._mean(x, lambda deviation: deviation)
        self.var = self._mean(x, np.square)

    def _mean(self, x, term):
        return sum(term(self.centred(part)).sum(axis=0) for (part,) in chunks(x)) / self.count

    def centred(self, x):
        """Return x - mean."""
        return (x - self.origin) - self.rest

    def invstd(self, eps):
        """Return 1/sqrt(var + eps)."""
        return 1 / np.sqrt(self.var + np.longdouble(eps))

    def mean_errors(self, mean):
        """Return the errors of a mean, in standard deviations."""
        return ratio(np.abs((mean - self.origin) - self.rest), np.sqrt(self.var))

    def var_errors(self, var):
        """Return the relative errors of a variance."""
        return ratio(np.abs(var - self.var), self.var)


class Squares:
    """A relative L2 error, added up in parts."""

    def __init__(self):
        self.wrong = self.whole = np.longdouble(0)

    def add(self, actual, expected, measure=None):
        self.wrong += np.sum((actual - expected) ** 2)
        self.whole += np.sum((expected if measure is None else measure) ** 2)

    @property
    def error(self):
        return float(np.sqrt(self.wrong / self.whole))


def step_errors(x, dout, gamma, beta, eps=1e-5, axis=1):
    """Run a training step; return the errors that the contract bounds, by name.

    Those of dgamma and dbeta are relative to the root of the summed squares of their terms where
    the sums themselves happen to be smaller: what a sum of random signs is expected to be.
    """
    y, cache = batchnorm_forward(x, gamma, beta, eps, axis=axis)
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    _, mean, var = moments(x, axis=axis)
    x, dout, y, dx = (rows_of(array, axis) for array in (x, dout, y, dx))
    truth = Truth(x)
    invstd = truth.invstd(eps)
    gamma, beta = gamma.astype(np.longdouble), beta.astype(np.longdouble)
    sums = np.zeros((2, x.shape[1]), np.longdouble)
    terms = np.zeros(2, np.longdouble)
    for part, part_dout in chunks(x, dout):
        products = part_dout * truth.centred(part) * invstd
        sums += part_dout.sum(axis=0), products.sum(axis=0)
        terms += np.sum(part_dout**2), np.sum(products**2)
    errors_y, errors_dx = Squares(), Squares()
    for part, part_dout, part_y, part_dx in chunks(x, dout, y, dx):
        xhat = truth.centred(part) * invstd
        errors_y.add(part_y, gamma * xhat + beta)
        kept = part_dout - sums[0] / truth.count - xhat * (sums[1] / truth.count)
        errors_dx.add(part_dx, gamma * invstd * kept, gamma * invstd * part_dout)
    return {
        "y": errors_y.error,
        "dx": errors_dx.error,
        "dbeta": error(dbeta, sums[0], np.sqrt(terms[0])),
        "dgamma": error(dgamma, sums[1], np.sqrt(terms[1])),
        "var": float(truth.var_errors(var).max()),
        "mean": float(truth.mean_errors(mean).max()),
    }


BOUNDS = {"y": Y, "dx": DX, "dbeta": SUMS, "dgamma": SUMS, "var": VAR, "mean": MEAN}


def check_step(rng, x, eps=1e-5, axis=1, dout=None):
    """Hold the float32 contract over a training step, the gradient random unless given."""
    x = np.ascontiguousarray(x, np.float32)
    assert np.all(np.isfinite(x))
    dout = np.asarray(rng.standard_normal(x.shape) if dout is None else dout, np.float32)
    gamma, beta = parameters(rng, x.shape[axis])
    errors = step_errors(x, dout, gamma, beta, eps, axis)
    broken = {name: e for name, e in errors.items() if not e <= BOUNDS[name]}
    assert not broken, f"of {errors}"


def exact_moments(values):
    """Return the mean and the variance of numbers as fractions."""
    values = [Fraction(value) for value in values]
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)


def column_moments(values, dtype):
    """Return the moments of a column as bn_cy computes them, and exactly."""
    x = np.array(values, dtype)
    _, mean, var = moments(x[:, None])
    return Fraction(float(mean[0])), Fraction(float(var[0])), *exact_moments(x.tolist())


def root(fraction):
    """Return a square root to 40 digits."""
    with localcontext() as context:
        context.prec = 40
        return Fraction((Decimal(fraction.numerator) / Decimal(fraction.denominator)).sqrt())


# float32: offsets, layouts, rows, magnitudes


@pytest.mark.parametrize("offset", [0, 1, 30, 1e3, 3e4, -1e6])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_offsets_in_every_layout(rng, shape, axis, offset):
    check_step(rng, offset + rng.standard_normal(shape), axis=axis)


@pytest.mark.parametrize("offset", [0, 3, 1e6])
@pytest.mark.parametrize(
    "rows", [2, 3, 4, 7, 8, 9, 15, 64, 65, 127, 129, 1000, 8191, 8193, 100_003]
)
def test_numbers_of_rows(rng, rows, offset):
    features = max(3, min(300, 200_000 // rows))
    # For two or three rows of the same sign, the deviation is not near zero by chance.
    side = np.where(np.arange(rows) % 2, 1, -1)[:, None]
    x = side * (0.5 + np.abs(rng.standard_normal((rows, features))))
    check_step(rng, offset + x)


@pytest.mark.parametrize(("rows", "features", "offset"), [(1 << 24, 1, 1e3), (1_000_003, 3, 1e6)])
def test_millions_of_rows(rng, rows, features, offset):
    check_step(rng, offset + rng.standard_normal((rows, features), np.float32))


@pytest.mark.parametrize("offset", [0, 3, 1e6])
@pytest.mark.parametrize(
    "deviation", [1e-22, 1e-19, 1e-16, 1e-15, 1e-10, 1e-3, 1e9, 1e18, 2e19, 1e25, 1e31, 5e37]
)
def test_magnitudes(rng, deviation, offset):
    values = np.clip(offset + rng.standard_normal((500, 100)), offset - 5, offset + 5)
    # The magnitude of the values, not of their deviation, is what is at most 5e37.
    unit = min(deviation, 5e37 / max(1, offset))
    # dout is large too, lest dx be subnormal where 1/std is next to the least normal float32.
    dout = np.sqrt(unit) * rng.standard_normal(values.shape)
    check_step(rng, unit * values, eps=0, dout=dout)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_sums_and_squares_that_overflow(rng, shape, axis):
    values = np.clip(rng.standard_normal(shape), -3, 3)
    check_step(rng, 5e37 * values, eps=0, axis=axis, dout=1e4 * rng.standard_normal(shape))


@pytest.mark.parametrize("offset", [0, 1, 1e6])
@pytest.mark.parametrize("rows", [100, 5000, 200_003])
def test_gradients_that_are_not_centred(rng, rows, offset):
    """dgamma is then a small difference of large sums: sum(dout*xhat) of a constant dout is 0."""
    x = (offset + rng.standard_normal((rows, 8))).astype(np.float32)
    dout = (1 + rng.standard_normal(x.shape)).astype(np.float32)
    _, cache = batchnorm_forward(x, np.ones(8), eps=0)
    _, dgamma, _ = batchnorm_backward(dout, cache)
    truth = Truth(x)
    xhat = truth.centred(x.astype(np.longdouble)) * truth.invstd(0)
    wrong = np.abs(dgamma - (xhat * dout).sum(axis=0))
    terms = np.sqrt(((xhat * dout) ** 2).sum(axis=0))
    assert np.all(wrong <= SUMS * terms + NOT_CENTRED * np.abs(dout.sum(axis=0)))


def few_values(rng, count, shape):
    """Of normal data, so many values: all of their bits are in use."""
    return rng.choice(rng.standard_normal(count), shape)


def eight_bits(rng, mean, deviation, shape):
    """An image as most people scale it, which leaves no short numbers."""
    return np.clip(rng.normal(mean, deviation, shape), 0, 255).astype(np.uint8) / np.float32(255)


FEW_VALUES = {
    "two values": lambda rng, shape: few_values(rng, 2, shape),
    "five values": lambda rng, shape: few_values(rng, 5, shape),
    "rarely the other": lambda rng, shape: np.where(
        rng.random(shape) < 0.1, *rng.standard_normal(2)
    ),
    "binary": lambda rng, shape: rng.integers(0, 2, shape),
    "counts": lambda rng, shape: rng.poisson(3, shape),
    "an image": lambda rng, shape: eight_bits(rng, 120, 60, shape),
    "a dark image": lambda rng, shape: eight_bits(rng, 10, 30, shape),
    "a standardized image": lambda rng, shape: (
        (eight_bits(rng, 120, 60, shape) - np.float32(0.456)) / np.float32(0.224)
    ),
    "half precision": lambda rng, shape: rng.standard_normal(shape).astype(np.float16),
}

FEW_VALUES_IN = [((rows, 12), 1) for rows in (100, 1000, 10_000, 100_000)] + [
    ((1_000_000, 1), 1),
    ((2, 500_000), 0),
    ((16, 6, 32, 32), 1),
    ((64, 10, 7, 7), 1),
    ((20, 30, 25, 5), -1),
    ((2, 3, 150, 150), 1),
]


def dgamma_of(dout, x, axis=1, eps=1e-5):
    """Return dgamma in 80 bits, and for every feature what its error is relative to: where a sum
    is smaller than its terms, these."""
    x, dout = (rows_of(a, axis) for a in (x, dout))
    truth = Truth(x)
    terms = truth.centred(x.astype(np.longdouble)) * truth.invstd(eps) * dout
    exact = terms.sum(axis=0)
    return exact, np.maximum(abs(exact), np.sqrt((terms**2).sum(axis=0)))


def dgamma_error(dgamma, dout, x, axis):
    exact, scale = dgamma_of(dout, x, axis)
    return norm(dgamma - exact) / norm(scale)


def check_dgamma_of_few(kind, x, dout, axis):
    """Of both ways to it."""
    _, cache = batchnorm_forward(x, np.ones(x.shape[axis]), axis=axis)
    found = moments(x, axis=axis)
    _, dgamma, _ = batchnorm_backward(dout, cache)
    _, of_pieces = gradient_sums(dout, x, found.mean, found.var, axis=axis)
    rarely = kind in ("a dark image", "a walk") and 500 <= x.size // x.shape[axis] < 10_000
    bound = UNNOTICED if rarely else SUMS
    assert dgamma_error(dgamma, dout, x, axis) <= bound
    assert dgamma_error(of_pieces, dout, x, axis) <= bound


@pytest.mark.parametrize(("shape", "axis"), FEW_VALUES_IN)
@pytest.mark.parametrize("kind", FEW_VALUES)
def test_few_distinct_values(rng, kind, shape, axis):
    """All groups of rows round in the same few ways, and what that leaves of the mean counts as
    often as there are rows, where dout has a mean."""
    x = FEW_VALUES[kind](rng, shape).astype(np.float32)
    mean = rng.choice([0, 1, 10, 1000])
    print("mean of dout", mean)
    check_dgamma_of_few(kind, x, (mean + rng.standard_normal(shape)).astype(np.float32), axis)


GRADIENTS_OF_FEW_VALUES = {
    "of a mean": lambda rng, shape: np.full(shape, 1 / np.prod(shape)),
    "constant": lambda rng, shape: np.full(shape, rng.standard_normal()),
    "of absolute values": lambda rng, shape: (
        np.where(rng.random(shape) < 0.3, -1, 1) / np.prod(shape)
    ),
    "of a hinge": lambda rng, shape: np.where(rng.random(shape) < 0.5, 0, rng.standard_normal()),
}
ALSO_FEW = {
    "rectified": lambda rng, shape: np.maximum(0, rng.standard_normal(shape)),
    "dropped": lambda rng, shape: 2 * rng.standard_normal(shape) * (rng.random(shape) < 0.5),
}


@pytest.mark.parametrize(("shape", "axis"), FEW_VALUES_IN)
@pytest.mark.parametrize("kind", FEW_VALUES | ALSO_FEW)
def test_few_distinct_values_and_a_gradient_of_few(rng, kind, shape, axis):
    """The products with dout are then few, too, and rounded where the values were not."""
    x = (FEW_VALUES | ALSO_FEW)[kind](rng, shape).astype(np.float32)
    name = rng.choice([*GRADIENTS_OF_FEW_VALUES])
    print("dout is the gradient", name)
    check_dgamma_of_few(kind, x, GRADIENTS_OF_FEW_VALUES[name](rng, shape).astype(np.float32), axis)


BY_TURNS_IN = [
    ((10_000, 12), 1),
    ((100_000, 12), 1),
    ((1_000_000, 1), 1),
    ((32, 6, 28, 28), 1),
    ((2, 6, 150, 150), 1),
    ((32, 3, 7919), 1),
    ((16, 30, 30, 40), -1),
    ((3, 300_000), 0),
]


@pytest.mark.parametrize("period", [2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 15, 16, 28, 32])
@pytest.mark.parametrize(("shape", "axis"), BY_TURNS_IN)
def test_values_that_come_by_turns(rng, shape, axis, period):
    """Neighbours are never the same, and all groups of rows are of few kinds."""
    features, rest = shape[axis], np.delete(shape, axis)
    values = rng.standard_normal((period, features)).astype(np.float32)
    turns = values[np.arange(rest.prod()) % period].reshape(*rest, features)
    x = np.ascontiguousarray(np.moveaxis(turns, -1, axis))
    dout = (rng.choice([1, 10, 1000]) + rng.standard_normal(shape)).astype(np.float32)
    _, cache = batchnorm_forward(x, np.ones(features), axis=axis)
    _, dgamma, _ = batchnorm_backward(dout, cache)
    assert dgamma_error(dgamma, dout, x, axis) <= SUMS


@pytest.mark.parametrize("period", [3, 5, 7, 10])
@pytest.mark.parametrize(
    ("shape", "some"),
    [((100_000, 7), [0]), ((100_000, 7), [3]), ((20_000, 1024), slice(850, 950, 2))],
)
def test_values_that_come_by_turns_in_some_features(rng, shape, some, period):
    """Whatever the others are like, and behind as many of them as a cell has rows."""
    x = rng.standard_normal(shape).astype(np.float32)
    x[:, some] = x[np.arange(len(x)) % period][:, some]
    dout = (1000 + rng.standard_normal(shape)).astype(np.float32)
    _, cache = batchnorm_forward(x, np.ones(shape[1]))
    _, dgamma, _ = batchnorm_backward(dout, cache)
    assert dgamma_error(dgamma[some], dout[:, some], x[:, some], 1) <= SUMS


SMOOTH = {  # of n values
    "a ramp": lambda rng, n: rng.uniform(0.1, 10) * np.linspace(0, 1, n) + rng.standard_normal(),
    "squares": lambda rng, n: np.linspace(0, rng.uniform(0.1, 10), n) ** 2,
    "time": lambda rng, n: np.arange(n) / rng.choice([1, 10, 30, 44_100]),
    "a wave": lambda rng, n: np.sin(np.arange(n) * rng.uniform(0.001, 0.05)),
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),
    "a walk": lambda rng, n: np.cumsum(rng.standard_normal(n)),
    "a coordinate": lambda rng, n: np.arange(n) % rng.choice([40, 90, 100, 130, 150, 200]) / 7,
}
SMOOTH_IN = [*BY_TURNS_IN, ((600, 40), 1), ((3000, 70), 1), ((2, 3, 200, 200), 1), ((5, 2000), 0)]


@pytest.mark.parametrize("mean", [0, 1, 100, None])
@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize(("shape", "axis"), SMOOTH_IN)
def test_values_that_run_smoothly(rng, shape, axis, kind, mean):
    """The sums of one group after the other are ties, and rounded the same way."""
    features, rest = shape[axis], np.delete(shape, axis)
    values = np.stack([SMOOTH[kind](rng, rest.prod()) for _ in range(features)], -1)
    x = np.moveaxis(values.reshape(*rest, features), -1, axis).astype(np.float32, order="C")
    dout = 0.1 if mean is None else mean + rng.standard_normal(shape)
    check_dgamma_of_few(kind, x, np.broadcast_to(dout, shape).astype(np.float32, order="C"), axis)


@pytest.mark.parametrize(
    ("often", "other", "share"),
    [(-0.41139230132102966, -1.1484071016311646, 0.1), (-6.9614105, -0.7791593, 0.03)],
)
def test_two_values_whose_difference_is_rounded_and_has_few_digits(rng, often, other, share):
    """The shift is the one that all samples are, so that its own deviations say nothing; and those
    of the other, which were all rounded, end in zeros as if they had not been."""
    often, other = np.float32(often), np.float32(other)
    x = np.full((16_000, 3), often)
    x[rng.random(x.shape) < share] = other
    x[::1000] = often  # the samples
    assert (other - often).view(np.uint32) & 0xFF == 0
    dout = np.full_like(x, 1000)
    _, cache = batchnorm_forward(x, np.ones(3))
    _, dgamma, _ = batchnorm_backward(dout, cache)
    assert dgamma_error(dgamma, dout, x, 1) <= SUMS


@pytest.mark.parametrize("kind", ["two values", "five values", "an image", "a dark image"])
def test_few_distinct_values_and_a_gradient_of_one_near_the_mean(rng, kind):
    """dgamma is then as small as that one's xhat, and the mean's error is all of its own."""
    x = FEW_VALUES[kind](rng, (30_000, 5)).astype(np.float32)
    dout = np.zeros_like(x)
    dout[abs(x - x.mean(axis=0, dtype=np.float64)).argmin(axis=0), range(5)] = 1
    found = moments(x)
    _, dgamma = gradient_sums(dout, x, found.mean, found.var)
    assert dgamma_error(dgamma, dout, x, 1) <= SUMS


@pytest.mark.parametrize("rows", [300, 1240, 1900, 30_000])
@pytest.mark.parametrize("kind", ["one value", "all but an outlier"])
def test_a_gradient_of_values_near_the_mean(rng, kind, rows):
    """All xhat that count are small, and what the mean is off by is not small against them."""
    x = rng.standard_normal((rows, 50)).astype(np.float32)
    if kind == "one value":
        dout = np.zeros_like(x)
        dout[abs(x - x.mean(axis=0, dtype=np.float64)).argmin(axis=0), range(50)] = 1
    else:
        dout = 1 + rng.standard_normal(x.shape).astype(np.float32)
        places = rng.choice([0, rows // SAMPLED, rows - 1], 50), range(50)
        x[places], dout[places] = rng.choice([-1e4, 1e6], 50), 0
    found = moments(x)
    dbeta, dgamma = gradient_sums(dout, x, found.mean, found.var)
    exact, scale = dgamma_of(dout, x)
    assert np.all(abs(dgamma - exact) <= SUMS * scale + MEAN * abs(dbeta))


@pytest.mark.parametrize("overflows", ["dbeta", "dgamma"])
@pytest.mark.parametrize("shape", [(16, 1100), (64, 200), (3000, 7), (2, 3, 300), (2, 3, 9000)])
def test_gradients_that_overflow_beside_one_that_does_not(rng, shape, overflows):
    """The first half of the rows alone is too large, the second takes nearly all of it away. Not
    so of the last feature."""
    x, size = rng.standard_normal(shape), rng.uniform(0.9, 1.1, shape)
    size[:, -1] = 1e-3
    sign = np.ones(shape) if overflows == "dbeta" else np.sign(x)
    half = len(x) // 2
    others = tuple(i for i in range(x.ndim) if i != 1)
    x[:half] *= 4 / x[:half].std(axis=others, keepdims=True)  # of less, dx itself is too large
    x[half:], sign[half:] = x[:half], -sign[:half]
    size[half:] = size[:half] * rng.uniform(0.99, 1.01, size[half:].shape)
    check_step(rng, x, dout=1e38 * sign * size)


def test_products_that_overflow_in_one_group_alone(rng):
    """What the others take away is no infinity, so that the sum is none of these and no NaN."""
    x = np.repeat([1e8, -1e7], [8, 80])[:, np.newaxis] * rng.uniform(0.9, 1.1, (88, 512))
    x = x.astype(np.float32)
    dout = np.full_like(x, 1e30)
    sum_dout, sum_dout_xhat = gradient_sums(dout, x, np.zeros(512), np.ones(512), eps=0)
    terms = np.float64(dout) * x
    assert terms[:8, 0].sum() > np.finfo(np.float32).max
    np.testing.assert_allclose(sum_dout, dout.sum(axis=0, dtype=np.float64), rtol=SUMS)
    assert np.all(abs(sum_dout_xhat - terms.sum(axis=0)) <= SUMS * np.linalg.norm(terms, axis=0))


def test_sums_of_dout_that_overflow_where_products_do_not(rng):
    """As those of values near the mean."""
    x = (1e-3 * rng.uniform(0.5, 1, (64, 3))).astype(np.float32)
    dout = (1e38 * rng.uniform(0.9, 1.1, x.shape)).astype(np.float32)
    sum_dout, sum_dout_xhat = gradient_sums(dout, x, np.zeros(3), np.ones(3), eps=0)
    np.testing.assert_allclose(sum_dout, dout.sum(axis=0, dtype=np.float64), rtol=SUMS)
    np.testing.assert_allclose(sum_dout_xhat, (np.float64(dout) * x).sum(axis=0), rtol=SUMS)


# float32: data on which shifts, signs or orders go wrong


@pytest.mark.parametrize("outlier", [1e2, 1e4, -1e6, 1e10, 1e30])
@pytest.mark.parametrize("rows", [9, 20, 100, 128, 129, 160, 1000, 10_007])
def test_an_outlier_in_any_row(rng, rows, outlier):
    sampled = [k * rows // SAMPLED for k in range(SAMPLED)]
    places = np.array([*sampled, rows - 1, *rng.integers(rows, size=50)])
    x = rng.standard_normal((rows, len(places)))
    x[places, np.arange(len(places))] = outlier
    check_step(rng, x, eps=0)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_an_outlier_in_the_first_row_in_every_layout(rng, shape, axis):
    x = rng.standard_normal(shape)
    rows = np.moveaxis(x, axis, -1)
    rows[(0,) * (rows.ndim - 1)] = 1e6
    check_step(rng, x, axis=axis)


@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e15, 1e37])
@pytest.mark.parametrize("rows", [64, 1000, 10_000])
def test_every_sampled_value_an_outlier(rng, rows, outlier):
    x = rng.standard_normal((rows, 40))
    x[[k * rows // SAMPLED for k in range(SAMPLED)]] = outlier
    check_step(rng, x, eps=0)


ORDERED = {
    "ramp": lambda rng, shape: np.linspace(-1, 3, shape[0])[:, None] * rng.uniform(1, 2, shape[1]),
    "sorted": lambda rng, shape: np.sort(rng.standard_normal(shape), axis=0),
    "falling": lambda rng, shape: 5 - np.sort(rng.standard_normal(shape), axis=0),
    "drift": lambda rng, shape: rng.standard_normal(shape) + np.linspace(0, 1e4, shape[0])[:, None],
    "growth": lambda rng, shape: (
        np.exp(np.linspace(0, 20, shape[0]))[:, None] * rng.uniform(1, 2, shape[1])
    ),
    "step": lambda rng, shape: (
        rng.standard_normal(shape) + 1e5 * (np.arange(shape[0]) >= shape[0] // 2)[:, None]
    ),
    "two values": lambda rng, shape: np.where(
        rng.random(shape) < 0.3, *rng.standard_normal((2, shape[1]))
    ),
    "heavy tails": lambda rng, shape: rng.standard_cauchy(shape),
    "skewed": lambda rng, shape: rng.lognormal(0, 3, shape),
    "rectified": lambda rng, shape: np.maximum(0, rng.standard_normal(shape)),
}


@pytest.mark.parametrize("rows", [100, 1003, 30_000])
@pytest.mark.parametrize("name", ORDERED)
def test_ordered_and_skewed_data(rng, name, rows):
    check_step(rng, ORDERED[name](rng, (rows, 60)), eps=0)


def test_features_of_every_size_side_by_side(rng):
    features = 200
    unit = 10.0 ** rng.integers(-20, 31, features)
    offset = 10.0 ** rng.integers(-3, 7, features)
    x = (unit * (offset + rng.standard_normal((300, features)))).astype(np.float32)
    dout = rng.standard_normal(x.shape).astype(np.float32)
    for feature in range(features):
        check_step(np.random.default_rng(feature), x[:, [feature]], eps=0)
    y, cache = batchnorm_forward(x, eps=0)
    dx, _, _ = batchnorm_backward(dout, cache)
    for feature in range(0, features, 37):
        alone, cache = batchnorm_forward(x[:, [feature]], eps=0)
        alone_dx, _, _ = batchnorm_backward(dout[:, [feature]], cache)
        assert error(y[:, [feature]], alone.astype(np.longdouble)) <= 2 * Y
        assert error(dx[:, [feature]], alone_dx.astype(np.longdouble)) <= 2 * DX


# NIST's reference datasets


def test_nist_data_have_the_certified_statistics():
    for name, (values, mean, deviation) in nist.UNIVARIATE.items():
        exact_mean, var = exact_moments(values)
        sample = root(var * len(values) / (len(values) - 1))
        assert abs(exact_mean / Fraction(mean) - 1) <= Fraction("1e-14"), name
        assert abs(sample / Fraction(deviation) - 1) <= Fraction("1e-14"), name
    for name, (values, between, within) in nist.ANOVA.items():
        assert exact_moments(values)[1] * len(values) == Fraction(between) + Fraction(within), name


@pytest.mark.parametrize("name", nist.UNIVARIATE)
def test_nist_univariate_float32(name):
    mean, var, exact_mean, exact_var = column_moments(nist.UNIVARIATE[name].values, np.float32)
    # NumAcc4 in float32 is 10000000 throughout: no deviation is left to be measured.
    assert abs(var - exact_var) <= Fraction(VAR) * exact_var
    assert abs(mean - exact_mean) <= Fraction(MEAN) * root(exact_var)


@pytest.mark.parametrize("name", nist.UNIVARIATE)
def test_nist_univariate_float64(name):
    _, var, _, exact_var = column_moments(nist.UNIVARIATE[name].values, np.float64)
    assert abs(var - exact_var) <= Fraction("1e-12") * exact_var


@pytest.mark.parametrize("name", nist.ANOVA)
def test_nist_anova_float64(name):
    _, var, _, exact_var = column_moments(nist.ANOVA[name][0], np.float64)
    assert abs(var - exact_var) <= Fraction("1e-11") * exact_var


# float64


@pytest.mark.parametrize("offset", [0, 1e8, 1e13, -1e13])
@pytest.mark.parametrize("rows", [7, 100, 2001])
def test_float64_variance(rng, rows, offset):
    x = offset + rng.standard_normal((rows, 3))
    _, _, var = moments(x)
    digits = 11 if abs(offset) > 1e8 else 12
    for column, actual in zip(x.T.tolist(), var.tolist(), strict=True):
        expected = exact_moments(column)[1]
        assert abs(Fraction(actual) - expected) <= expected / 10**digits


# Constant columns

CONSTANTS = {
    np.float32: [0.1, 1e10, 7.5e10, 3e38, -3e38, 0.0, -0.0, 1e-38, 1e-45, 1 / 3],
    np.float64: [0.1, 1e10, 7.5e10, 3e38, 0.0, 5e-324, 1e-310, 1e308, -1.7e308, 1 / 3],
}


@pytest.mark.parametrize("dtype", CONSTANTS)
@pytest.mark.parametrize("rows", [2, 3, 7, 8, 100, 1003])
@pytest.mark.parametrize("image", [(), (7, 7), (37, 31)])
def test_constant_columns(rng, dtype, rows, image):
    constants = np.array(CONSTANTS[dtype], dtype)
    rows = 3 if image and rows > 100 else rows
    along = (1, -1, *[1] * len(image))
    x = np.broadcast_to(constants.reshape(along), (rows, len(constants), *image)).copy()
    dout = rng.standard_normal(x.shape).astype(dtype)
    gamma, beta = parameters(rng, len(constants), dtype)
    y, cache = batchnorm_forward(x, gamma, beta)
    dx, dgamma, _ = batchnorm_backward(dout, cache)
    _, mean, var = moments(x)
    assert np.all(y == beta.reshape(along))
    assert np.all(dgamma == 0)
    assert np.all(np.isfinite(dx))
    np.testing.assert_array_equal(mean, constants)
    np.testing.assert_array_equal(var, 0)


def test_a_constant_column_beside_others(rng):
    x = 1e6 + rng.standard_normal((1000, 40)).astype(np.float32)
    x[:, ::7] = 0.1
    dout = rng.standard_normal(x.shape).astype(np.float32)
    gamma, beta = parameters(rng, 40)
    y, cache = batchnorm_forward(x, gamma, beta)
    _, dgamma, _ = batchnorm_backward(dout, cache)
    assert np.all(y[:, ::7] == beta[::7])
    assert np.all(dgamma[::7] == 0)


# The variance is never negative


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [2, 3, 10, 1000])
def test_variance_is_never_negative(rng, rows, dtype):
    largest = 37 if dtype == np.float32 else 160  # float64 holds the variance, too
    exponents = rng.uniform(np.log10(np.finfo(dtype).tiny), largest, 1000)
    x = np.tile((10**exponents).astype(dtype), (rows, 1))
    # Neighbours in the grid of floating-point numbers: all but no variance, at any magnitude.
    up = rng.random(x.shape) < 0.5
    x[up] = np.nextafter(x[up], dtype(np.inf))
    layer = BatchNorm(x.shape[1], dtype=dtype, momentum=1.0)
    layer(x)
    _, _, var = moments(x)
    assert np.all(var >= 0)
    assert np.all(layer.running_var >= 0)


# NaN and infinity


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "dout"])
@pytest.mark.parametrize(("shape", "axis"), [case for case in SHAPES if case[0] != (20011, 1)])
def test_bad_values_stay_in_their_feature(rng, shape, axis, where, bad):
    arrays = {
        "x": rng.standard_normal(shape).astype(np.float32),
        "dout": rng.standard_normal(shape).astype(np.float32),
    }
    features = shape[axis]
    feature = int(rng.integers(features))
    gamma, beta = parameters(rng, features)

    def results(x, dout):
        y, cache = batchnorm_forward(x, gamma, beta, axis=axis)
        dx, dgamma, dbeta = batchnorm_backward(dout, cache)
        _, mean, var = moments(x, axis=axis)
        sums = gradient_sums(dout, x, np.zeros(features), np.ones(features), axis=axis)
        rows = [rows_of(y, axis), rows_of(dx, axis)]
        return [*rows, *(np.atleast_2d(a) for a in (dgamma, dbeta, mean, var, *sums))]

    expected = results(**arrays)
    rows = np.moveaxis(arrays[where], axis, -1)
    count = rows[..., 0].size
    for place in (0, count // SAMPLED, int(rng.integers(count))):
        kept = arrays[where].copy()
        rows[(*np.unravel_index(place, rows.shape[:-1]), feature)] = bad
        found = results(**arrays)
        for actual, wanted in zip(found, expected, strict=True):
            others = np.arange(features) != feature
            assert actual[:, others].tobytes() == wanted[:, others].tobytes()
        assert not np.all(np.isfinite(found[1][:, feature]))
        arrays[where][...] = kept


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_bad_values_stay_in_their_place_in_a_frozen_gradient(rng, shape, axis, bad, dtype):
    """One of dout in its own, and one of x has no say at all, also where dx goes over dout."""
    x, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    layer = BatchNorm(shape[axis], axis=axis, dtype=dtype).eval()
    layer.gamma[:], layer.beta[:] = parameters(rng, shape[axis], dtype)
    layer(x)
    expected = layer.backward(dout)
    in_dout, in_x = rng.integers(x.size, size=2)
    dout.flat[in_dout], x.flat[in_x] = bad, bad
    layer(x)
    found = layer.backward(dout, out=dout)
    assert not np.isfinite(found.flat[in_dout])
    found.flat[in_dout] = expected.flat[in_dout]
    assert found.tobytes() == expected.tobytes()


# Statistics that are exact in any order


@pytest.mark.parametrize("rows", [2, 3, 8, 10, 24, 50, 64, 100, 1000, 30_000])
@pytest.mark.parametrize("step", [1.0, 0.25])
def test_exact_statistics(rng, rows, step):
    """Multiples of `step` with a mean that is one, so few and small that every sum is exact."""
    largest = min(1 << 11, (1 << 22) // rows)
    x = rng.integers(-largest, largest + 1, (rows, 100))
    x[0] -= x.sum(axis=0) % rows
    mean = x.sum(axis=0) // rows
    var = ((x - mean) ** 2).sum(axis=0) / rows
    _, actual, actual_var = moments((x * step).astype(np.float32))
    np.testing.assert_array_equal(actual.astype(np.float32), mean * step)
    assert np.all(np.abs(actual_var - var * step**2) <= VAR * var * step**2)


# Evaluation with float64 running statistics


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_evaluation(rng, shape, axis, offset):
    features = shape[axis]
    layer = BatchNorm(features, axis=axis, momentum=None)
    layer.gamma[:], layer.beta[:] = parameters(rng, features)
    centre = offset + rng.standard_normal(shape[axis]).reshape(
        [-1 if i == axis % len(shape) else 1 for i in range(len(shape))]
    )
    for _ in range(2):
        layer((centre + rng.standard_normal(shape)).astype(np.float32))
    layer.eval()
    x = (centre + rng.standard_normal(shape)).astype(np.float32)
    dout = rng.standard_normal(shape).astype(np.float32)
    y, dx = layer(x), layer.backward(dout)
    rows, dout_rows = (rows_of(a, axis).astype(np.longdouble) for a in (x, dout))
    gamma, beta, mean, var = (
        a.astype(np.longdouble)
        for a in (layer.gamma, layer.beta, layer.running_mean, layer.running_var)
    )
    invstd = 1 / np.sqrt(var + np.longdouble(1e-5))
    xhat = (rows - mean) * invstd
    assert error(rows_of(y, axis), gamma * xhat + beta) <= Y
    assert error(rows_of(dx, axis), gamma * invstd * dout_rows) <= DX
    assert error(layer.dgamma, (dout_rows * xhat).sum(axis=0), norm(dout_rows * xhat)) <= SUMS
    assert error(layer.dbeta, dout_rows.sum(axis=0), norm(dout_rows)) <= SUMS
    pieces = normalize(x, layer.running_mean, layer.running_var, layer.gamma, layer.beta, axis=axis)
    np.testing.assert_array_equal(pieces, y)


def test_running_statistics_keep_their_digits(rng):
    layer = BatchNorm(20, momentum=1.0, unbiased=False)
    x = (1e6 + rng.standard_normal((500, 20))).astype(np.float32)
    layer(x)
    truth = Truth(x)
    assert truth.mean_errors(layer.running_mean).max() <= MEAN
    assert truth.var_errors(layer.running_var).max() <= VAR
