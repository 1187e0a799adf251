"""The data of a case and its exact result, made once and read by every library's process."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cases import Case

EPS = 1e-5
INPUTS = ("x", "dout", "gamma", "beta", "residual")
RESULTS = ("y", "dx", "dgamma", "dbeta", "dresidual")
KINK = 1e-3  # where a ReLU's input is nearer to 0, dout is 0: rounding may put it on either side
CHECKED = 1 << 26  # elements; of a larger array whole features up to so many are checked


@dataclass
class Problem:
    """The arrays of a case, each at the start of a page: every library is given the same."""

    case: Case
    x: np.ndarray
    dout: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    residual: np.ndarray | None = None  # of a case that adds one
    eps: float = EPS

    @property
    def axis(self):
        return self.case.axis


def create(case, seed):
    """Draw a case's data: every feature has a mean and a standard deviation of its own."""
    rng = np.random.default_rng([seed, *case.shape])
    along = [-1 if i == case.axis else 1 for i in range(len(case.shape))]

    def per_feature(low, high):
        return rng.uniform(low, high, case.features).astype(case.dtype)

    x = rng.standard_normal(case.shape, case.dtype)
    x *= per_feature(0.5, 2.0).reshape(along)
    x += per_feature(-2.0, 2.0).reshape(along)
    dout = rng.standard_normal(case.shape, case.dtype)
    problem = Problem(case, x, dout, per_feature(0.5, 1.5), per_feature(-0.5, 0.5))
    if case.adds:
        problem.residual = rng.standard_normal(case.shape, case.dtype)
    if case.after:
        for feature in range(case.features):
            _, _, z = _normalized(problem, feature, np.float64)
            np.moveaxis(dout, case.axis, 0)[feature][np.abs(z) < KINK] = 0
    return problem


def _normalized(problem, feature, precise):
    """Return invstd, xhat and what a ReLU is given, of one feature."""
    x = np.moveaxis(problem.x, problem.axis, 0)[feature]
    xhat = x.astype(precise)
    xhat -= xhat.mean()
    invstd = 1 / np.sqrt(np.square(xhat).mean() + precise(problem.eps))
    xhat *= invstd
    z = precise(problem.gamma[feature]) * xhat + precise(problem.beta[feature])
    if problem.residual is not None:
        z += np.moveaxis(problem.residual, problem.axis, 0)[feature]
    return invstd, xhat, z


def save(problem, folder):
    """Write the inputs and the float64 results of the checked features into `folder`."""
    folder = Path(folder)
    for name in INPUTS:
        if getattr(problem, name) is not None:
            np.save(folder / f"{name}.npy", getattr(problem, name))
    checked = checked_features(problem.case)
    for name, array in zip(RESULTS, reference(problem, checked), strict=False):
        np.save(folder / f"{name}.npy", array)


def load(case, folder):
    """Read the inputs; without a folder there are none, only the case's size."""
    if folder is None:
        return Problem(case, *[None] * len(INPUTS))
    names = INPUTS if case.adds else INPUTS[:-1]
    arrays = (np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in names)
    return Problem(case, *map(aligned_copy, arrays))


def checked_features(case):
    """All features, or of very large arrays some, evenly spread."""
    count = min(case.features, max(1, CHECKED * case.features // case.size))
    return np.linspace(0, case.features - 1, count).astype(np.intp)


def reference(problem, features):
    """Compute y, dx, dgamma, dbeta and, of a residual, dresidual of `features`, one at a time.

    In float64 for float32 data, whose means and deviations it holds with nine digits more
    than are asked for, and in long double for float64 data. Results are float64.
    """
    precise = np.longdouble if problem.x.dtype == np.float64 else np.float64
    dout = np.moveaxis(problem.dout, problem.axis, 0)
    y, dx, dresidual = (np.empty((len(features), *dout.shape[1:])) for _ in range(3))
    dgamma, dbeta = (np.empty(len(features)) for _ in range(2))
    for i, feature in enumerate(features):
        invstd, xhat, z = _normalized(problem, feature, precise)
        gamma, d = precise(problem.gamma[feature]), dout[feature].astype(precise)
        y[i] = z
        if problem.case.after:
            y[i], d = np.maximum(z, 0), np.where(z > 0, d, 0)
        dbeta[i], dgamma[i] = d.sum(), (d * xhat).sum()
        dx[i] = gamma * invstd * (d - d.mean() - xhat * (d * xhat).mean())
        dresidual[i] = d
    return y, dx, dgamma, dbeta, *([dresidual] if problem.case.adds else [])


def relative_errors(case, folder, results):
    """Return the relative L2 error of the results, in the order of RESULTS, by name."""
    checked = checked_features(case)
    errors = {}
    for name, array in zip(RESULTS, results, strict=False):
        expected = np.load(Path(folder) / f"{name}.npy", mmap_mode="r")
        got = np.moveaxis(array, case.axis, 0) if array.ndim > 1 else array
        errors[name] = _relative_l2(got, checked, expected)
    return errors


def _relative_l2(got, features, expected):
    difference = norm = 0.0
    for i, feature in enumerate(features):
        difference += float(np.square(got[feature] - expected[i]).sum())
        norm += float(np.square(expected[i]).sum())
    return (difference / norm) ** 0.5


def aligned_copy(array):
    """Copy `array` to a page boundary."""
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def aligned_empty(shape, dtype):
    page = 4096
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + page, np.uint8)
    start = -raw.ctypes.data % page
    return raw[start : start + nbytes].view(dtype).reshape(shape)
