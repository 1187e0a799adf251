"""Outputs held against the truth: every value, and the array as a whole."""

import numpy as np
from exact import norm

from fuzzing import memory
from fuzzing.truth import number_of

FEW = 32  # of them, and roundings do not average: values have their bounds, the contract no say
SEEN = 1e-2  # of a value: an error of this size is above the bound where a value counts as checked


class Report:
    """What a comparison found: faults, and whether there was anything that could be wrong."""

    def __init__(self):
        self.faults = []
        self.refused = 0
        self.checked = 0  # values whose errors would be seen
        self.shares = {}  # the largest share of a bound that was used, by what was compared

    def fault(self, text):
        self.faults.append(text)

    def exactly(self, name, got, expected):
        """Compare what must be equal: counts, shapes, states."""
        if got != expected:
            self.fault(f"{name}: expected {expected}, got {got}")

    def written(self, name, array):
        missing = memory.never_written(array)
        if missing.any():
            self.fault(f"{name}: {missing.sum()} of {missing.size} values were never written")

    def close(self, name, got, expected, dtype):
        """Compare numbers: where there are any, how far off, and how far all of them together."""
        value = np.asarray(expected.value, np.longdouble)
        rounded = value.astype(dtype)
        slack = np.broadcast_to(expected.slack, value.shape)
        bound = expected.bound + slack
        # An error that is allowed to be as large as that allows infinity: dx of two rows is a
        # remainder of what may itself be too large.
        free = self._outside(expected) | (bound > np.finfo(dtype).max)
        finite = np.isfinite(rounded)
        self._pattern(name, got, rounded, free, expected)
        held = finite & ~free & np.isfinite(got)
        self._values(name, got[held], value[held], bound[held])
        self._whole(name, got[held], value[held], slack[held], expected, held)
        seen = held & (bound < SEEN * np.abs(value))
        self.checked += int(seen.sum())

    @staticmethod
    def _outside(expected):
        """Tell which values there is no contract about."""
        if expected.promised is None:
            return np.False_
        return ~expected.promised.reshape(-1, *[1] * (np.ndim(expected.value) - 1))

    def _pattern(self, name, got, value, free, expected):
        """NaN and infinities where they must be, and nowhere else."""
        same = (got == value) | (np.isnan(got) & np.isnan(value))
        if not expected.infinities:
            same |= ~np.isfinite(got) & np.isinf(value)
        wrong = ~same & ~(np.isfinite(got) & np.isfinite(value)) & ~free
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            self.fault(
                f"{name}: {wrong.sum()} of {wrong.size} values are NaN or infinite, or should be; "
                f"at {at} expected {value[at]}, got {got[at]}"
            )

    def _values(self, name, got, value, bound):
        if not got.size:
            return
        wrong = np.abs(got - value)
        share = np.where(wrong == 0, 0, wrong / bound)
        at = int(np.argmax(share))
        self._note(name, share[at])
        if not share[at] <= 1:
            self.fault(
                f"{name}: {(share > 1).sum()} of {share.size} values are beyond their "
                f"bounds; expected {value[at]}, got {got[at]}, {float(share[at]):.3g} times that"
            )

    def _whole(self, name, got, value, slack, expected, held):
        if not (np.isfinite(expected.contract) and got.size):
            return
        scale = np.broadcast_to(expected.scale, held.shape)[held]
        if (number_of(scale) if expected.terms is None else expected.terms) < FEW:
            return
        allowed = expected.contract * max(norm(value), norm(scale)) + norm(slack)
        wrong = norm(got - value)
        share = wrong / allowed if wrong else 0
        self._note(f"{name} as a whole", share)
        if not share <= 1:
            self.fault(f"{name}: relative L2 error {float(share):.3g} times that of the contract")

    def _note(self, name, share):
        self.shares[name] = max(self.shares.get(name, 0.0), float(share))
