"""The oracle of the notebook: what is right, what is wrong, and which mistake it is."""

import sys

import numpy as np
import pytest
from test_examples import EXAMPLES

from bn_cy import reference

sys.path.append(str(EXAMPLES))

import oracle

MISTAKES = [(name, what) for name, known in oracle.MISTAKES.items() for what in known]
EPS = 1e-2


@pytest.fixture
def problem(rng):
    """Give x, gamma, beta and dout in which no mistake hides: no ones, no square."""
    gamma, beta = rng.uniform(1.5, 3, 4), rng.normal(size=4)
    return 1 + rng.normal(size=(7, 4)), gamma, beta, rng.normal(size=(7, 4))


@pytest.fixture
def values(problem):
    *problem, dout = problem
    _, cache = reference.staged_forward(*problem, EPS)
    reference.staged_backward(dout, cache)
    return cache


@pytest.fixture
def asked(problem):
    return oracle.Oracle(*problem, EPS)


def test_every_value_of_the_nine_steps_is_known_and_right(asked, values):
    names = set(values) - {"axis"}
    assert len(names) == 28
    for name in names:
        verdict = asked.verdict(name, values[name])
        assert verdict.exact
        assert verdict.approximate
        assert (verdict.difference, verdict.mistakes) == (0, ())


def test_another_way_to_the_same_number_is_approximate(asked, values):
    verdict = asked.verdict("var", values["x"].var(axis=0) * (1 + 1e-15))
    assert verdict.approximate
    assert not verdict.exact
    assert 0 < verdict.difference < 1e-13


@pytest.mark.parametrize(("name", "what"), MISTAKES)
def test_a_known_mistake_is_named(asked, name, what):
    wrong = asked.mistakes(name)[what]
    verdict = asked.verdict(name, wrong)
    assert not verdict.approximate
    assert verdict.mistakes == (what,)


def test_an_unknown_mistake_is_wrong_and_has_no_name(asked, values):
    verdict = asked.verdict("dvar", 1.01 * values["dvar"])
    assert not verdict.approximate
    assert verdict.mistakes == ()
    assert verdict.difference == pytest.approx(0.01 * np.abs(values["dvar"]).max(), rel=1e-9)


def test_another_shape_is_named(asked, values):
    (mistake,) = asked.verdict("dbeta", values["dout"].sum(axis=1)).mistakes
    assert mistake == "the shape is (7,) and should be (4,)"


def test_with_ones_a_mistake_passes(problem):
    """The reason for a dout at random."""
    x, gamma, beta, dout = problem
    asked = oracle.Oracle(x, gamma, beta, np.ones_like(dout), EPS)
    wrong = asked.mistakes("dx")["the sum without dout"]
    assert asked.verdict("dx", wrong).approximate


def test_nan_is_wrong(asked, values):
    assert not asked.verdict("dx", values["dx"] * np.nan).approximate


def test_what_is_printed(asked, values, capsys):
    asked.check(mu=values["mu"], dvar=2 * values["dvar"], dx=...)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "mu        exact: yes  approximate: yes  largest difference: 0.0e+00"
    assert second.startswith("dvar      exact: no   approximate: no   largest difference: ")
    assert second.endswith("   the factor 2 forgotten")
    assert third == "dx        still open"


def test_a_batch_of_another_form_is_refused(problem):
    x, *others = problem
    with pytest.raises(ValueError, match=r"\(examples, features\), got \(7, 4, 1\)"):
        oracle.Oracle(x[..., None], *others)
