"""`Moments`: what a batch, or a part of one, says about every feature; the whole from its parts."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.float64]
Part: TypeAlias = tuple[int, Rows, Rows, Rows]  # count, mean, what that leaves over, variance


class Moments(NamedTuple):
    """What `moments` returns: the count, the mean and the biased variance of every feature.

    Those of the parts of a batch, in whatever order, give those of the whole::

        n = n1 + n2 + ...    mean = sum(ni*meani)/n    var = sum(ni*(vari + (meani - mean)^2))/n

    Attributes
    ----------
    count : int
        Values per feature; 0 of an empty part.
    mean, var : float64 array of shape (features,)
        The means, and the variances divided by ``count``.

    Notes
    -----
    T. F. Chan, G. H. Golub and R. J. LeVeque, *Updating formulae and a pairwise algorithm for
    computing sample variances*, 1979. The deviations ``meani - mean`` are taken from the mean in
    two parts, so a sum of many parts is as exact as these: what is lost is the rounding of their
    means to float64.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> x = np.array([[1.0], [2.0], [6.0], [7.0]])
    >>> bn_cy.moments(x[:1]).merge(bn_cy.moments(x[1:]))
    Moments(count=4, mean=array([4.]), var=array([6.5]))
    >>> bn_cy.Moments.sum(bn_cy.moments(row[None]) for row in x)
    Moments(count=4, mean=array([4.]), var=array([6.5]))
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, on purpose
    mean: Rows
    var: Rows

    def merge(self, other: Moments) -> Moments:
        """Return the moments of this part and another one together.

        Parameters
        ----------
        other : Moments
            Of the same features.

        Returns
        -------
        Moments
            Of both.

        Raises
        ------
        TypeError, ValueError
            As `sum`.
        """
        return Moments.sum((self, other))

    @staticmethod
    def sum(parts: Iterable[Moments]) -> Moments:
        """Return the moments of all the parts together.

        Parameters
        ----------
        parts : iterable of Moments
            One or more, of the same features; looked at one after the other, and not kept: however
            many there are, the sum takes about 200 bytes a feature.

        Returns
        -------
        Moments
            Of the whole. A single part that is not empty is returned bit for bit.

        Raises
        ------
        TypeError
            If a part is not Moments, or its count is no integer.
        ValueError
            If there is no part, a count is negative, or the features of two parts differ.
        """
        whole = None
        for number, part in enumerate(parts):
            piece = _checked(part, number)
            if whole is None:
                whole = piece
            elif whole[1].shape == piece[1].shape:
                whole = _both(whole, piece)
            else:
                raise ValueError(
                    f"parts must have the same features: part {number} has {len(piece[1])}, "
                    f"and those before it have {len(whole[1])}"
                )
        if whole is None:
            raise ValueError("parts must hold Moments, got none: how many features is not known")
        count, mean, _, var = whole
        return Moments(count, mean, var)


def _checked(part: Moments, number: int) -> Part:
    """Return a part whose mean leaves nothing over."""
    if not isinstance(part, Moments):
        raise TypeError(f"part {number} must be Moments, got {type(part).__name__}")
    try:
        count = operator.index(part.count)
    except TypeError:
        raise TypeError(
            f"the count of part {number} must be an integer, got {part.count!r}"
        ) from None
    if count < 0:
        raise ValueError(f"the count of part {number} must not be negative, got {count}")
    mean, var = (np.array(row, np.float64) for row in (part.mean, part.var))
    if mean.ndim != 1 or mean.shape != var.shape:
        raise ValueError(
            f"part {number} must have a mean and a variance of shape (features,), "
            f"got {mean.shape} and {var.shape}"
        )
    return count, mean, np.zeros_like(mean), var


def _both(one: Part, other: Part) -> Part:
    counts = one[0], other[0]
    means, rests, variances = (np.array(pair) for pair in zip(one[1:], other[1:], strict=True))
    return sum(counts), *pooled(counts, means, rests, variances)


def pooled(
    counts: Sequence[int], means: Rows, rests: Rows, variances: Rows
) -> tuple[Rows, Rows, Rows]:
    """Pool the moments of parts, given in the rows of arrays of shape (parts, features).

    Returns the mean, what rounding it left over, and the variance. ``means + rests`` are the means
    of the parts. A part that is empty has no say, whatever is in its rows.
    """
    total = sum(counts)
    if total == 0:
        return np.zeros_like(means[0]), np.zeros_like(means[0]), np.zeros_like(means[0])
    filled = np.flatnonzero(counts)
    weights = np.array([[count / total] for count in counts if count])
    means, rests, variances = means[filled], rests[filled], variances[filled]
    if len(filled) == 1:
        return means[0], rests[0], variances[0]
    largest = np.argmax(weights)  # near the mean, in standard deviations, however far others are
    with np.errstate(all="ignore"):  # NaN and infinity stay in their feature
        shift = means[largest]
        mean, rest = _two_sum(shift, np.sum(weights * ((means - shift) + rests), axis=0))
        deviations = (means - mean) + (rests - rest)
        # Weighted before it is squared: a square may overflow where the variance does not.
        var = np.sum(weights * variances + (weights * deviations) * deviations, axis=0)
    return mean, rest, var


def _two_sum(a: Rows, b: Rows) -> tuple[Rows, Rows]:
    """Return ``a + b`` rounded, and the rounding error, exactly (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
