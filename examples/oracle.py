"""Tells whether a step of batch norm that was worked out by hand is right, and what it is if not.

An `Oracle` is made of a problem: x, gamma, beta, dout and eps. It knows every value of
`bn_cy.reference.staged_forward` and `staged_backward` by its name, and is asked about one::

    >>> oracle = Oracle(x, gamma, beta, dout)
    >>> oracle.check(dvar=my_dvar)
    dvar      exact: no   approximate: no   largest difference: 3.1e-01   the factor 2 forgotten

"exact" is the same to the last bit, "approximate" the same but for rounding: two right ways to one
number may round differently. A wrong value is compared with those that known mistakes give, each
made in this one step while all before it is right. So go on when a step is right, not before.

The batch is (examples, features). Take dout at random: where all its entries are equal dx is 0,
and it is 0 by several of the mistakes, too.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from bn_cy import reference

TOLERANCE = 1e-9  # of the largest entry: far more than rounding, far less than a mistake
SMALL = 1e-3  # what the largest entry counts for at the least: where all are 0 there is rounding


def total(values):
    """One sum per feature."""
    return values.sum(axis=0)


def through_statistics(v, start):
    """dx by the three ways of `reference.backward_through_statistics`, summed from `start`."""
    dvar = -(v.ivar**3) / 2 * total(start * v.xmu)
    dmu = -v.ivar * total(start)
    return v.dxhat * v.ivar + 2 / v.n * dvar * v.xmu + dmu / v.n


def one_line(v, sqrtvar):
    """dx by `reference.backward_closed_form`, with another root."""
    xhat = v.xmu / sqrtvar
    return v.gamma / sqrtvar * (v.dout - v.dbeta / v.n - xhat * total(v.dout * xhat) / v.n)


# What goes wrong, node by node: {node: {mistake: its value, made of the right values v}}.
MISTAKES = {
    "mu": {"1/n forgotten": lambda v: total(v.x)},
    "xmu": {"the sign": lambda v: v.mu - v.x},
    "var": {
        "1/n forgotten": lambda v: total(v.sq),
        "n - 1 for n": lambda v: total(v.sq) / (v.n - 1),
        "E[x^2] alone": lambda v: total(v.x**2) / v.n,
    },
    "sqrtvar": {
        "eps outside the root": lambda v: np.sqrt(v.var) + v.eps,
        "eps forgotten": lambda v: np.sqrt(v.var),
        "the root forgotten": lambda v: v.var + v.eps,
    },
    "xhat": {"divided by ivar": lambda v: v.xmu / v.ivar},
    "out": {"beta forgotten": lambda v: v.gammax},
    "dbeta": {"a mean for a sum": lambda v: total(v.dout) / v.n},
    "dxhat": {"gamma forgotten": lambda v: v.dout},
    "dgamma": {
        "the sum without dout": lambda v: total(v.xhat),
        "a mean for a sum": lambda v: total(v.dout * v.xhat) / v.n,
        "x where xhat belongs": lambda v: total(v.dout * v.x),
        "xmu where xhat belongs": lambda v: total(v.dout * v.xmu),
    },
    "divar": {
        "the sum without dxhat": lambda v: total(v.xmu),
        "dout where dxhat belongs": lambda v: total(v.dout * v.xmu),
        "xhat where xmu belongs": lambda v: total(v.dxhat * v.xhat),
    },
    "dsqrtvar": {
        "the sign": lambda v: v.divar / v.sqrtvar**2,
        "the square forgotten": lambda v: -v.divar / v.sqrtvar,
    },
    "dvar": {
        "the factor 2 forgotten": lambda v: v.dsqrtvar / v.sqrtvar,
        "the sign": lambda v: -v.dvar,
        "dx where dxhat belongs": lambda v: -(v.ivar**3) / 2 * total(v.dx * v.xmu),
        "dout where dxhat belongs": lambda v: -(v.ivar**3) / 2 * total(v.dout * v.xmu),
    },
    "dsq": {
        "1/n forgotten": lambda v: v.n * v.dsq,
        "n - 1 for n": lambda v: v.dsq * v.n / (v.n - 1),
    },
    "dxmu2": {
        "the factor 2 forgotten": lambda v: v.xmu * v.dsq,
        "xmu forgotten": lambda v: 2 * v.dsq,
    },
    "dxmu": {
        "only the first of two uses": lambda v: v.dxmu1,
        "only the second of two uses": lambda v: v.dxmu2,
    },
    "dmu": {
        "the sign": lambda v: total(v.dxmu),
        "dx where dxhat belongs": lambda v: -v.ivar * total(v.dx),
        "dout where dxhat belongs": lambda v: -v.ivar * total(v.dout),
    },
    "dx2": {
        "1/n forgotten": lambda v: v.n * v.dx2,
        "n - 1 for n": lambda v: v.dx2 * v.n / (v.n - 1),
    },
    "dx": {
        "1/n forgotten": lambda v: v.gamma * v.ivar * (v.dout - v.dbeta - v.xhat * v.dgamma),
        "the sum without dout": lambda v: (
            v.gamma * v.ivar * (v.dout - v.dbeta / v.n - v.xhat * total(v.xhat) / v.n)
        ),
        "dx where dxhat belongs": lambda v: through_statistics(v, v.dx),
        "dout where dxhat belongs": lambda v: through_statistics(v, v.dout),
        "eps outside the root": lambda v: one_line(v, np.sqrt(v.var) + v.eps),
        "n - 1 for n": lambda v: one_line(v, np.sqrt(v.var * v.n / (v.n - 1) + v.eps)),
        "gamma forgotten": lambda v: v.dx / v.gamma,
        "the mean taken for a constant": lambda v: v.dx1,
        "mean and variance taken for constants": lambda v: v.dxmu1,
    },
}


@dataclass
class Verdict:
    """What is to be said of one value; printed as a line."""

    name: str
    exact: bool
    approximate: bool
    difference: float
    mistakes: tuple

    def __str__(self):
        words = {True: "yes", False: "no"}
        line = (
            f"{self.name:9} exact: {words[self.exact]:4} approximate: {words[self.approximate]:4} "
            f"largest difference: {self.difference:.1e}"
        )
        return line + "".join(f"   {mistake}" for mistake in self.mistakes)


def verdict(name, value, right, mistakes=None):
    """Compare a value with the right one and, if it is wrong, with those of known mistakes."""
    value = np.asarray(value)
    if value.shape != right.shape:
        shapes = f"the shape is {value.shape} and should be {right.shape}"
        return Verdict(name, False, False, np.inf, (shapes,))
    tolerance = TOLERANCE * max(np.abs(right).max(), SMALL)

    def close(other):
        return bool(np.abs(value - other).max() <= tolerance)

    exact, approximate = np.array_equal(value, right), close(right)
    known = {} if approximate or mistakes is None else mistakes
    named = tuple(what for what, wrong in known.items() if close(wrong))
    return Verdict(name, exact, approximate, float(np.abs(value - right).max()), named)


def compare(name, value, right, mistakes=None):
    """Print the verdict; `...` for a value says that it is still to be found."""
    if value is ...:
        print(f"{name:9} still open")
    else:
        print(verdict(name, value, right, mistakes))


class Oracle:
    """Knows every value of the nine steps for one problem, there and back."""

    def __init__(self, x, gamma, beta, dout, eps=1e-5):
        x, gamma, beta, dout = (np.asarray(a, np.float64) for a in (x, gamma, beta, dout))
        if x.ndim != 2:
            raise ValueError(f"x must have the shape (examples, features), got {x.shape}")
        _, cache = reference.staged_forward(x, gamma, beta, eps)
        reference.staged_backward(dout, cache)
        self._values = SimpleNamespace(**cache, n=len(x), eps=eps)

    def right(self, name):
        """Return what the step `name` should be."""
        return getattr(self._values, name)

    def mistakes(self, name):
        """Return what known mistakes make of the step `name`, by their names."""
        return {what: wrong(self._values) for what, wrong in MISTAKES.get(name, {}).items()}

    def verdict(self, name, value):
        """Return what is to be said of `value` as the step `name`."""
        return verdict(name, value, self.right(name), self.mistakes(name))

    def check(self, **values):
        """Print it, for any number of steps."""
        for name, value in values.items():
            compare(name, value, self.right(name), self.mistakes(name))
