"""What arrays hold, as (features, values): ordinary numbers, and those that try a formula."""

import numpy as np

LARGEST = {"f": 5e37, "d": 1e150}  # deviations beyond: squares or differences are not numbers
OFFSETS = {"f": (0, 1, -3, 1e3, 1e6), "d": (0, 1, -3, 1e4, 1e8, 1e13)}
UNITS = {"f": (1, 1, 1, 1e-3, 1e-10, 1e-22, 1e10, 1e30), "d": (1, 1, 1, 1e-10, 1e-100, 1e100)}


def normal(rng, source, shape, kind):
    """Numbers of a normal distribution, off 0 and of any unit."""
    unit, offset = source.pick(UNITS[kind]), source.pick(OFFSETS[kind])
    unit = min(unit, LARGEST[kind] / max(1, abs(offset)))
    return unit * (offset + np.clip(rng.standard_normal(shape), -5, 5))


def uneven(rng, source, shape, kind):
    """Features with means and deviations of their own, of any size, side by side."""
    centres, spreads = rng.standard_normal((2, shape[0], 1))
    centres *= 10.0 ** rng.integers(-2, 5, centres.shape)
    spreads = 10.0 ** (3 * spreads).round()
    return centres + spreads * rng.standard_normal(shape)


def few(rng, source, shape, kind):
    """Two to four distinct values a feature."""
    values = source.pick(OFFSETS[kind][:4]) + rng.standard_normal((shape[0], source.integer(2, 4)))
    return np.take_along_axis(values, rng.integers(values.shape[1], size=shape), axis=1)


def counts(rng, source, shape, kind):
    """Small integers, or a pixel's 256 steps from 0 to 1."""
    if source.chance(50):
        return rng.integers(0, 256, shape) / 255
    return rng.poisson(source.pick((1, 10)), shape).astype(float)


def ordered(rng, source, shape, kind):
    """Rising values, or a step at half of them."""
    place = np.linspace(-1, 3, shape[1]) if shape[1] else np.empty(0)
    if source.chance(50):
        return place * rng.uniform(1, 2, (shape[0], 1))
    return rng.standard_normal(shape) + 1e5 * (place > 1)


def skewed(rng, source, shape, kind):
    """Long tails, or nothing below 0."""
    if source.chance(50):
        return rng.lognormal(0, 3, shape)
    return np.maximum(0, rng.standard_normal(shape))


def outlier(rng, source, shape, kind):
    """A value that is far from all the others, in each feature, often among the first."""
    values = rng.standard_normal(shape)
    last = 0 if source.chance(40) else shape[1] - 1
    if values.size:
        places = rng.integers(0, last + 1, shape[0])
        values[np.arange(shape[0]), places] = source.pick((1e2, -1e4, 1e6, 1e10, 1e30))
    return values


def constant(rng, source, shape, kind):
    """Features of one value: some of them, or all."""
    values = rng.standard_normal(shape)
    chosen = rng.random(shape[0]) < source.pick((0.5, 1.0))
    values[chosen] = source.pick((0.1, 0, -0.0, 7, 7.5e10, 1e-38, 3e37))
    return values


def subnormal(rng, source, shape, kind):
    """Multiples of the smallest number that there is."""
    return rng.integers(-1000, 1000, shape) * np.finfo(kind).smallest_subnormal.astype(float)


def neighbours(rng, source, shape, kind):
    """Two numbers with none between them."""
    number = np.array(source.pick((1, -7, 1e10, 1e-10, 1e30)), kind)
    return np.where(rng.random(shape) < 0.5, number, np.nextafter(number, np.inf, dtype=kind))


def not_finite(rng, source, shape, kind):
    """NaN and infinities, in some features."""
    values = rng.standard_normal(shape)
    bad = source.pick(((np.nan,), (np.inf,), (-np.inf,), (np.inf, -np.inf), (np.nan, np.inf)))
    chosen = np.flatnonzero(rng.random(shape[0]) < 0.4)
    for _ in range(source.integer(1, 3) if shape[1] else 0):
        places = rng.integers(shape[1], size=len(chosen))
        values[chosen, places] = rng.choice(bad, len(chosen))
    return values


def zeros(rng, source, shape, kind):
    return np.zeros(shape)


def one_hot(rng, source, shape, kind):
    """A single 1 a feature: the gradient of a sample of the batch."""
    values = np.zeros(shape)
    if values.size:
        values[np.arange(shape[0]), rng.integers(shape[1], size=shape[0])] = 1
    return values


def with_mean(rng, source, shape, kind):
    """A mean that is not small against the deviation."""
    return source.pick((1, 10, -1000)) + rng.standard_normal(shape)


def unit(rng, source, shape, kind):
    """Mean 0 and deviation 1, as the textbook has it."""
    return rng.standard_normal(shape)


def sized(rng, source, shape, kind):
    """Mean 0 and any deviation."""
    return source.pick(UNITS[kind]) * np.clip(rng.standard_normal(shape), -5, 5)


# Where many values of x differ little against its deviation, roundings of terms have something in
# common. Beside a dout with a mean dgamma is then a small difference of sums, its errors add up,
# and not all of that is promised: `docs/accuracy.md`. test_accuracy.py has what is.
ALIKE = (few, counts, ordered, skewed, outlier, constant, subnormal, neighbours, zeros)
BATCHES = (
    *(unit, normal, normal, normal, uneven, uneven, few, counts, ordered, skewed, outlier),
    *(constant, subnormal, neighbours, not_finite),
)
CENTRED = (unit, unit, sized, zeros, not_finite)
# Not few: the sum of a dout of few distinct values has roundings in common, too.
GRADIENTS = (unit, sized, with_mean, with_mean, one_hot, skewed, not_finite)
RESIDUALS = (unit, sized, with_mean, not_finite, constant)
