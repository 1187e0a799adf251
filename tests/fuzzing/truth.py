"""What a call must return, from the formulas of `exact.py` in 80 bits, and how far off it may be.

The contract of docs/accuracy.md is on whole arrays: their relative L2 errors, numbers and scales
from `test_accuracy.py`. It says nothing about one value of an array or one feature, so a single
wrong value among many could hide. Therefore each value has a bound of its own, too: the roundings
of the formula at their worst, each half a unit in the last place of a term, and what the contract
allows the statistics.
"""

from dataclasses import dataclass

import numpy as np
from exact import standardize, statistics
from test_accuracy import DX, MEAN, SUMS, VAR, Y

wide = np.longdouble
HALF_ULP = 2.0**-53  # of the statistics, which are in float64
SMALLEST = wide(np.finfo(float).smallest_subnormal)
# Roundings of a value that makes most of a variance, which nothing averages: of x - shift, which
# counts twice in the square, of that, and of three sums in its group.
LONE = 6
# Rows whose sum is added to another one. Sums of float64 are no wider than the data: beside a value
# that makes most of the variance the others are alike, and all additions may round the same way.
GROUP = 8
# Of dout, the share that its products with xhat are where it is 0 except near the mean: see the
# contract's words on dgamma.
NEAR = 0.1


class Contract:
    """The bounds for one dtype. In float64 what the tests of docs/accuracy.md have for it."""

    def __init__(self, dtype):
        limits = np.finfo(dtype)
        single = dtype == np.float32
        scale = 1 if single else 1e-7
        self.dtype = dtype
        self.y, self.dx, self.sums, self.mean = (b * scale for b in (Y, DX, SUMS, MEAN))
        self.var = VAR if single else 1e-12
        self.alike = 0 if single else HALF_ULP / GROUP
        self.unit = wide(limits.eps) / 2  # the rounding of one operation
        self.least = wide(limits.smallest_subnormal)
        self.tiny, self.largest = wide(limits.tiny), wide(limits.max)
        self.reach = self.largest / 2 if single else np.sqrt(self.largest) / 2  # of deviations


@dataclass
class Expected:
    """A result: its values, the bound of each, and the contract on the whole.

    The contract is on the L2 error relative to `scale`, or to the values where these are larger.
    Bounds and contract both leave room for `slack`.
    """

    value: np.ndarray
    bound: np.ndarray
    contract: float = np.inf
    scale: np.ndarray | float = 0.0
    slack: np.ndarray | float = 0.0  # of each value, where numbers are below the normal ones
    promised: np.ndarray | None = None  # features that there is a contract about; None: all
    infinities: bool = True  # whether an infinity must be one: NaN may not take its place
    terms: float | None = None  # that roundings average over, as `number_of` counts; None: values


class Truth:
    """A batch as (features, values), its statistics, its own or given ones, and xhat.

    Statistics of its own are those of x less a value near the mean: at an offset of 1e13, or
    from an outlier of 1e30, even 80 bits lose digits.
    """

    def __init__(self, x, eps, dtype, given=None):
        self.limits = Contract(dtype)
        self.x, self.eps, self.measured = x, wide(eps), given is None
        if self.measured:
            origin = near_mean(x)
            self.count, rest, self.var = statistics(x - origin, axis=0)
            self.mean = origin[:, 0] + rest
            x = x - origin
        else:
            self.count = np.inf
            self.mean, self.var = (np.asarray(array, wide) for array in given)
            rest = self.mean
        added = self.var + self.eps
        # Where nothing varies and nothing is added, xhat is 0: y is beta, dx and dgamma are 0.
        self.xhat, self.invstd = standardize(
            x, rest, np.where(added == 0, wide(np.inf), self.var), eps, axis=0
        )
        self.deviation = np.sqrt(self.var)[:, None]
        self.invstd_error = 3 * HALF_ULP  # var + eps, the root and its reciprocal
        self.alike_error = np.zeros_like(self.invstd)  # of var, relative
        self.shift_error = np.zeros_like(self.invstd)  # of xhat, where the mean is not exact
        if self.measured:  # what the contract allows the statistics; that on y is narrower
            self.alike_error[self._lone()] = self.limits.alike * self.count
            self.invstd_error += min(self.limits.var / 2, self.limits.y) + self.alike_error / 2
            self.shift_error = self.limits.mean * self.deviation * self.invstd
        self.errors = self.invstd_error * np.abs(self.xhat) + self.shift_error

    def in_range(self, gamma, *arrays):
        """Tell which features the contract is about: their intermediate results are numbers."""
        c = self.limits
        slope = np.abs(gamma * self.invstd)[:, 0]
        fits = (slope <= c.largest) & (self.invstd[:, 0] <= c.largest)
        fits &= (slope >= 4 * c.tiny) | (slope == 0)
        if self.eps == 0:
            fits &= (self.var > 1e-290) | (self.var == 0)
        for array in (self.x - self.mean[:, None], *arrays):
            fits &= ~np.any((np.abs(array) > c.reach) & np.isfinite(array), axis=1)
        return fits

    # Statistics

    def expected_mean(self):
        c = self.limits
        if not self.measured:
            return Expected(self.mean, np.zeros_like(self.mean))
        varies = self.var > 0
        bound = c.mean * self.deviation[:, 0] + 2 * HALF_ULP * np.abs(self.mean) * varies
        return Expected(self.mean, bound, slack=self._small(varies, SMALLEST))

    def expected_var(self):
        if not self.measured:
            return Expected(self.var, np.zeros_like(self.var))
        c = self.limits
        error = np.where(self._lone(), np.maximum(c.var, LONE * c.unit), c.var)
        error = error + self.alike_error[:, 0]
        return Expected(self.var, error * self.var, slack=self._small(self.var > 0, 4 * SMALLEST))

    def _lone(self):
        """Tell of which features one value makes most of the variance."""
        squares = (self.x - self.mean[:, None]) ** 2
        return 2 * squares.max(axis=1, initial=0) > squares.sum(axis=1)

    # The second pass of the forward

    def expected_y(self, gamma, beta, residual, relu):
        """y = gamma*xhat + beta (+ residual), and the maximum with 0 if `relu`."""
        c = self.limits
        product = gamma * self.xhat
        bare = product + beta
        value = bare if residual is None else bare + residual
        bound = c.unit * (6 * np.abs(product) + 2 * np.abs(beta) + np.abs(value))
        bound = bound + np.abs(gamma) * self.errors
        slack = self._small(
            self.xhat != 0,
            c.least * (2 + np.abs(self.x - self.mean[:, None]))
            + SMALLEST * np.abs(gamma) * self.invstd,
        )
        terms = np.abs(product) + np.abs(beta)
        if residual is not None:
            bound = bound + c.unit * np.abs(bare)
            terms = terms + np.abs(residual)
        value = np.maximum(value, 0) if relu else value
        contract = c.y + self.alike_error.max(initial=0)
        return Expected(value, bound, contract, terms, slack, self.in_range(gamma, product, value))

    @staticmethod
    def _small(where, size):
        """What the rounding of numbers below the normal ones may change."""
        return np.where(where, size, 0)

    # The backward

    def expected_sums(self, dout):
        """sum(dout) and sum(dout*xhat) of every feature.

        The second is summed about a centre near the mean: of few digits, and of the data's type.
        """
        c = self.limits
        promised = self.in_range(wide(1), dout)
        centre = (self.deviation / 16 + c.unit * np.abs(self.mean[:, None])) * self.invstd
        size = np.abs(dout).sum(axis=1)
        slack = self._small(size > 0, 2 * dout.shape[1] * c.least)
        moved = (np.abs(dout) * (np.abs(self.xhat) + centre)).sum(axis=1)
        finest = (8 * HALF_ULP * self.deviation * self.invstd)[:, 0]  # error of a mean in double
        left = self.shift_error[:, 0] + finest
        dbeta = self._sum(dout, c.unit * size, slack, promised)
        rounding = c.unit * moved + left * np.abs(dbeta.value)
        below = SMALLEST * self.invstd[:, 0] * (2 + size) + c.least * size  # of mean; of (x - c)*p
        slack = slack + self._small(size > 0, below)
        terms = dout * self.xhat
        near = norms(terms) < NEAR * norms(dout)  # the error of the mean then shows
        slack = slack + np.where(near, left, finest) * np.abs(dbeta.value)
        if self.measured:  # of a constant dgamma is exactly 0
            rounding, slack = (np.where(self.var == 0, 0, a) for a in (rounding, slack))
        dgamma = self._sum(terms, rounding, slack, promised)
        dgamma.infinities = False  # it is a difference of sums
        return dbeta, dgamma

    def _sum(self, terms, rounding, slack, promised):
        """A term, and the sums of eight of them, are rounded four times."""
        c = self.limits
        value = terms.sum(axis=1)
        root = norms(terms)
        bound = c.sums * np.maximum(root, np.abs(value)) + 4 * rounding
        return Expected(value, bound, c.sums, root, slack, promised, terms=number_of(terms))

    def expected_dx(self, dout, gamma, sums=None, count=None):
        """gamma*invstd*(dout - dbeta/n - xhat*dgamma/n); the sums may be given, exactly."""
        c = self.limits
        slope = np.abs(gamma * self.invstd)
        if count == np.inf or (not self.measured and sums is None):
            value = gamma * self.invstd * dout
            slack = self._small(value != 0, c.least * (1 + np.abs(dout)))
            bound = (3 * c.unit + self.invstd_error) * np.abs(value)
            return Expected(value, bound, c.dx, value, slack, self.in_range(gamma, dout, value))
        count = wide(self.count if count is None else count)
        dbeta, dgamma = (
            self.expected_sums(dout)
            if sums is None
            else (Expected(wide(s), np.zeros(len(s))) for s in sums)
        )
        mean_dout, mean_product = (s.value[:, None] / count for s in (dbeta, dgamma))
        wrong_dout, wrong_product = (s.bound[:, None] / count for s in (dbeta, dgamma))
        product = self.xhat * mean_product
        kept = dout - mean_dout - product
        value = gamma * self.invstd * kept
        parts = np.abs(dout) + np.abs(mean_dout) + np.abs(product)
        inner = c.unit * (4 * np.abs(dout) + 5 * np.abs(mean_dout) + 13 * np.abs(product))
        inner = inner + wrong_dout + np.abs(self.xhat) * wrong_product
        inner = inner + self.errors * np.abs(mean_product) + self.invstd_error * parts
        small = 4 + np.abs(self.xhat) + np.abs(self.x - self.mean[:, None]) * np.abs(mean_product)
        slack = self._small(slope > 0, c.least * (slope * small + 2 + parts))
        promised = self.in_range(gamma, self.xhat, dout, product, kept, value)
        # It is on dx of sums over this batch.
        contract = c.dx + self.alike_error.max(initial=0) if sums is None else np.inf
        return Expected(value, slope * inner, contract, slope * parts, slack, promised, False)


def near_mean(x):
    """Return the value of every feature that is nearest its mean, as a column."""
    first = x[:, :1]
    _, rest, _ = statistics(x - first, axis=0)
    distance = np.abs(x - first - rest[:, None])
    distance[np.isnan(distance)] = np.inf
    return np.take_along_axis(x, distance.argmin(axis=1)[:, None], axis=1)


def norms(rows):
    """The root of the summed squares of every row."""
    return np.sqrt(np.square(rows).sum(axis=1))


def number_of(terms):
    """How many of the terms matter: where one is much larger than the others, it is one."""
    squares = np.square(terms[np.isfinite(terms)])
    total = squares.sum()
    return float(total * total / np.square(squares).sum()) if total > 0 else 0.0


def opened(dout, y, relu):
    """dout where a ReLU lets it through, by the y that was returned: 0 where y is not above 0."""
    return np.where(y > 0, dout, 0) if relu else dout
