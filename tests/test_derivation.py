"""docs/derivation.md: its numbered formulas hold, and the lines of code that it quotes stand.

A test is marked with the numbers of the formulas that it verifies, and the last one here asks for
every number of the page. What is not a formula there, numbers and tables, is read from the page.
"""

import ast
import importlib.util
import inspect
import itertools
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from exact import backward
from test_examples import EXAMPLES, assert_png
from test_reference import Batch, assert_close, assert_gradient, largest_error

from bn_cy import reference

sys.path.append(str(EXAMPLES))

import oracle

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["derivation.md", "why_it_works.md"]
PAGE = (DOCS / "derivation.md").read_text("utf-8")
BLOCK = re.compile(r"^```python\n# reference\.(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLES = {
    "step | in words | `reference.staged_forward`": "staged_forward",
    "step | mathematics | `reference.staged_backward`": "staged_backward",
}
EPS = np.longdouble(1) / 128
verified = set()


def verifies(*numbers):
    """Mark a test with the formulas that it verifies."""
    verified.update(numbers)
    return lambda test: test


class Feature:
    """One feature of random numbers in 80 bits, by the names of the page."""

    def __init__(self, rng, eps):
        batch = Batch(rng, (9, 1), 1, np.longdouble)
        self.n, self.eps = len(batch.x), eps
        self.x, self.d = batch.x[:, 0], batch.dout[:, 0]
        self.gamma, self.beta = batch.gamma[0], batch.beta[0]
        self.mu = sum(self.x) / self.n
        self.var = sum((self.x - self.mu) ** 2) / self.n
        self.s = 1 / np.sqrt(self.var + eps)
        self.xhat = (self.x - self.mu) * self.s
        self.dbeta, self.dgamma = sum(self.d), sum(self.d * self.xhat)
        self.g = self.gamma * self.d

    def y(self, x):
        return reference.forward(x[:, None], self.gamma, self.beta, self.eps)[:, 0]

    def dx(self):
        """dx by (12)."""
        centred = self.d - self.dbeta / self.n - self.xhat * self.dgamma / self.n
        return self.gamma * self.s * centred


@pytest.fixture(params=[EPS, np.longdouble(0)], ids=["eps", "eps = 0"])
def f(rng, request):
    return Feature(rng, request.param)


# 1 to 6: the layer, and three forms of its gradient


@verifies(1, 2)
def test_the_layer(f):
    assert_close(f.gamma * f.xhat + f.beta, f.y(f.x))


@verifies(3, 4)
def test_two_sums(f):
    assert_close(sum(f.x - f.mu), np.longdouble(0))
    assert_close(sum(f.xhat), np.longdouble(0))
    assert_close(sum(f.xhat**2), f.n * f.var / (f.var + f.eps))
    assert_close(sum(f.xhat**2), f.n * f.var * f.s**2)


@verifies(5, 13)
def test_the_gradient_sums_over_all_outputs(f):
    jacobian = np.array(
        [
            [
                f.gamma * f.s * ((k == i) - 1 / np.longdouble(f.n) - f.xhat[k] * f.xhat[i] / f.n)
                for i in range(f.n)
            ]
            for k in range(f.n)
        ]
    )
    for row, one_hot in zip(jacobian, np.eye(f.n, dtype=np.longdouble), strict=True):
        assert_gradient(f.y, f.x, one_hot, row)
    assert_gradient(f.y, f.x, f.d, sum(f.d[k] * jacobian[k] for k in range(f.n)))
    alone = f.d * np.diag(jacobian)
    assert np.abs(alone - f.dx()).max() > 1e-3


@verifies(6)
def test_gradients_of_the_parameters(f):
    one = np.ones(1, np.longdouble)
    assert_gradient(lambda beta: f.gamma * f.xhat + beta, f.beta * one, f.d, f.dbeta * one)
    assert_gradient(lambda gamma: gamma * f.xhat + f.beta, f.gamma * one, f.d, f.dgamma * one)


@verifies(7, 8, 9)
def test_through_the_statistics(f):
    dvar = -(f.s**3) / 2 * sum(f.g * (f.x - f.mu))
    dmu = -f.s * sum(f.g)
    _, cache = reference.staged_forward(
        f.x[:, None], np.array([f.gamma]), np.array([f.beta]), f.eps
    )
    reference.staged_backward(f.d[:, None], cache)
    assert_close(cache["dsqrtvar"] / (2 * cache["sqrtvar"]), np.array([dvar]))
    assert_close(-cache["divar"] / (2 * cache["sqrtvar"] ** 3), np.array([dvar]))
    assert_close(-sum(f.g * f.s + 2 * (f.x - f.mu) * dvar / f.n), dmu)
    assert_close(cache["dmu"], np.array([dmu]))
    one = np.ones(1, np.longdouble)

    def loss_from(mu, var):
        return f.gamma * (f.x - mu) / np.sqrt(var + f.eps) + f.beta

    assert_gradient(lambda var: loss_from(f.mu, var), f.var * one, f.d, dvar * one)
    step = 2.0**-12 * np.sqrt(f.var)  # mu itself may be next to 0
    assert_gradient(
        lambda mu: loss_from(mu, np.mean((f.x - mu) ** 2)), f.mu * one, f.d, dmu * one, step
    )
    assert_gradient(f.y, f.x, f.d, f.g * f.s + dvar * 2 / f.n * (f.x - f.mu) + dmu / f.n)


@verifies(10, 11, 12)
def test_one_line(f):
    dvar = -(f.s**3) / 2 * sum(f.g * (f.x - f.mu))
    deviations = f.s * (f.x - f.mu)
    middle = -f.gamma * f.s / f.n * deviations * sum(f.d * f.s * (f.x - f.mu))
    assert_close(dvar * 2 / f.n * (f.x - f.mu), middle)
    assert_close(middle, -f.gamma * f.s / f.n * f.xhat * sum(f.d * f.xhat))
    assert_close(-f.s * sum(f.g) / f.n, -f.gamma * f.s / f.n * sum(f.d))
    assert_gradient(f.y, f.x, f.d, f.dx())


def test_the_residual_is_that_of_a_regression(rng):
    f = Feature(rng, np.longdouble(0))
    design = np.stack([np.ones(f.n), f.xhat.astype(float)], axis=1)
    coefficients, *_ = np.linalg.lstsq(design, f.d.astype(float), rcond=None)
    residual = f.d.astype(float) - design @ coefficients
    np.testing.assert_allclose(float(f.gamma * f.s) * residual, f.dx().astype(float), atol=1e-12)


@verifies(14, 15)
def test_the_jacobian(f):
    one, eye = np.ones(f.n, np.longdouble), np.eye(f.n, dtype=np.longdouble)
    J = f.gamma * f.s * (eye - np.outer(one, one) / f.n - np.outer(f.xhat, f.xhat) / f.n)
    assert_close(J.T @ f.d, f.dx())
    assert_close(J.T, J)
    assert_close(J @ one, 0 * one)
    assert_close(J @ f.xhat, f.gamma * f.s * f.eps / (f.var + f.eps) * f.xhat)


@verifies(16)
def test_the_jacobian_is_a_projection(rng):
    f = Feature(rng, np.longdouble(0))
    P = reference.jacobian(f.x, f.gamma, f.eps) / (f.gamma * f.s)
    assert_close(P @ P, P)
    assert_close(np.trace(P), np.longdouble(f.n - 2))


@verifies(17)
def test_what_length_is_lost(rng):
    f = Feature(rng, np.longdouble(0))
    dx, _, _ = backward(f.d[:, None], f.x[:, None], np.array([f.gamma]), f.eps)
    along = sum(f.d) ** 2 / f.n, (f.d @ f.xhat) ** 2 / f.n
    assert_close(sum(dx[:, 0] ** 2), f.gamma**2 / f.var * (sum(f.d**2) - sum(along)))
    sums = (f.dbeta**2 + f.dgamma**2) / f.n
    assert_close(sum(dx[:, 0] ** 2), f.gamma**2 / f.var * (sum(f.d**2) - sums))


@verifies(18)
def test_what_length_is_lost_with_any_eps(f):
    r = f.var / (f.var + f.eps)
    lost = (f.dbeta**2 + (2 - r) * f.dgamma**2) / f.n
    assert_close(sum(f.dx() ** 2), (f.gamma * f.s) ** 2 * (sum(f.d**2) - lost))


# 7: layouts


@verifies(19)
def test_both_layouts(rng):
    batch = Batch(rng, (8, 3), 1)
    x, gamma, dout = batch.x, batch.gamma, batch.dout
    assert_close(reference.forward(x.T.copy(), gamma, axis=0), reference.forward(x, gamma).T)
    rows, columns = (
        reference.backward_closed_form(given.copy(), at.copy(), gamma, axis=axis)
        for given, at, axis in [(dout.T, x.T, 0), (dout, x, 1)]
    )
    assert_close(rows[0], columns[0].T)
    for of_rows, of_columns in zip(rows[1:], columns[1:], strict=True):
        assert_close(of_rows, of_columns)


@pytest.mark.parametrize(
    ("shape", "axis", "n"), [((8, 3), 1, 8), ((3, 8), 0, 8), ((2, 3, 4, 5), 1, 40),
                             ((2, 4, 5, 3), -1, 40)],
)  # fmt: skip
def test_the_table_of_layouts(rng, shape, axis, n):
    count, mean, _ = reference.moments(rng.normal(size=shape), axis=axis)
    assert (count, mean.shape) == (n, (3,))


# 8: mistakes


def test_which_mistakes_ones_find(rng):
    batch = Batch(rng, (8, 3), 1)

    def found(what, dout):
        batch.dout = dout
        asked = oracle.Oracle(batch.x, batch.gamma, batch.beta, dout, eps=1e-3)
        wrong = asked.mistakes("dx")[what]
        return "yes" if largest_error(wrong, batch) > 1e-4 else "no"

    ones, random = np.ones_like(batch.dout), batch.dout
    rows = rows_below("mistake in dx")
    assert {what for what, *_ in rows} == oracle.MISTAKES["dx"].keys()
    for what, with_ones, with_random in rows:
        assert (what, found(what, ones), found(what, random)) == (what, with_ones, with_random)


@verifies(20)
def test_differences_of_fourth_order():
    """Of (x^5 + 2x^3)/60 at 1: l' is 11/60, and the fifth derivative is 2."""
    h, at = Fraction(1, 3), Fraction(1)

    def D(h):
        return (
            sum(sign * ((at + sign * h) ** 5 + 2 * (at + sign * h) ** 3) for sign in (1, -1)) / 60
        )

    assert (8 * D(h) - D(2 * h)) / (12 * h) == Fraction(11, 60) - h**4 / 30 * 2


# 9: one pass


@verifies(21, 23)
def test_both_identities_of_the_variance():
    x = [Fraction(value) for value in (3, 1, 4, 1, 5, 9)]
    mu = sum(x) / 6
    var = sum((value - mu) ** 2 for value in x) / 6
    assert sum(value**2 for value in x) / 6 - mu**2 == var
    for delta in (Fraction(1, 7), Fraction(-5)):
        assert sum((value - mu - delta) ** 2 for value in x) / 6 == var + delta**2


@verifies(22)
@pytest.mark.parametrize("offset", [10, 100, 1000, 10000])
def test_one_pass_has_the_error_of_its_formula(rng, offset):
    """Within a factor of four, the median of many draws."""
    x = (offset + rng.normal(size=(200, 400))).astype(np.float32)
    exact = reference.moments(x.astype(np.longdouble), axis=0)[2]
    error = np.median(np.abs(reference.moments_one_pass(x, axis=0)[2] - exact) / exact)
    formula = np.finfo(np.float32).eps / 2 * (1 + offset**2)
    assert formula / 4 < error < 4 * formula


# 10: evaluation


@verifies(24)
def test_evaluation(f, rng):
    m, v = rng.normal(size=1).astype(np.longdouble), rng.uniform(1, 2, 1).astype(np.longdouble)
    s = 1 / np.sqrt(v + f.eps)

    def y(x):
        return f.gamma * (x - m) * s + f.beta

    assert_close(y(f.x), reference.normalize(f.x[:, None], m, v, f.gamma, f.beta, f.eps)[:, 0])
    assert_gradient(y, f.x, f.d, f.gamma * s * f.d)


def test_frozen_statistics_of_the_batch_itself_have_another_gradient(f):
    frozen = f.gamma * f.s * f.d
    assert np.abs(frozen - f.dx()).max() > 1e-3


# 11: estimates


@verifies(25)
def test_the_variance_of_a_batch_is_too_small_on_average():
    population = [Fraction(value) for value in (0, 1, 5)]
    tau2 = sum((value - 2) ** 2 for value in population) / 3
    for n in (2, 3, 4):
        batches = list(itertools.product(population, repeat=n))
        means = [sum(batch) / n for batch in batches]
        variances = [
            sum((value - mean) ** 2 for value in batch) / n
            for batch, mean in zip(batches, means, strict=True)
        ]
        assert sum((mean - 2) ** 2 for mean in means) / len(batches) == tau2 / n
        assert sum(variances) / len(batches) == tau2 - tau2 / n == tau2 * (n - 1) / n


@verifies(26, 27)
def test_running_statistics_after_some_batches(rng):
    w, r0, batches = 0.3, np.array([2.0]), rng.normal(size=(5, 8, 1))
    mean, var = r0, r0
    for batch in batches:
        mean, var = reference.running_update(mean, var, batch, w, unbiased=False)
    t = len(batches)
    for index, r in [(1, mean), (2, var)]:
        b = [reference.moments(batch)[index] for batch in batches]
        expected = (1 - w) ** t * r0 + w * sum(
            (1 - w) ** (t - j) * b[j - 1] for j in range(1, t + 1)
        )
        assert_close(r, expected)


def test_a_running_variance_that_starts_at_zero_is_too_small_by_a_third(rng):
    x, zero = rng.normal(size=(8, 1)), np.zeros(1)
    mean, var = zero, zero
    for _ in range(10):
        mean, var = reference.running_update(mean, var, x, 0.9, weighs="old", unbiased=False)
    assert_close(var, (1 - 0.9**10) * x.var(axis=0))
    assert 0.3 < 0.9**10 < 0.4


# 12: a weight of fixed length


class LinearLayer:
    """Inputs that are not centred, a weight, and what batch norm needs of them."""

    def __init__(self, rng, eps, n=40, inputs=3, features=2):
        self.X = (rng.normal(size=(n, inputs)) + rng.normal(size=inputs)).astype(np.longdouble)
        sign, size = (
            rng.choice([-1, 1], (inputs, features)),
            rng.uniform(0.5, 2, (inputs, features)),
        )
        self.W = (sign * size).astype(np.longdouble)
        self.gamma = rng.uniform(0.5, 2, features).astype(np.longdouble)
        self.beta = rng.normal(size=features).astype(np.longdouble)
        self.dout = rng.normal(size=(n, features)).astype(np.longdouble) / n
        self.eps = eps
        self.centred = self.X - self.X.mean(axis=0)
        self.S = self.centred.T @ self.centred / n
        self.G = self.centred.T @ self.dout

    def y(self, W):
        """The layer as it is trained, by the batch."""
        return reference.forward(self.X @ W, self.gamma, self.beta, self.eps)

    def dW(self, W):
        """(33), with (32)."""
        s = 1 / np.sqrt(np.sum(W * (self.S @ W), axis=0) + self.eps)
        dgamma = s * np.sum(W * self.G, axis=0)
        return self.gamma * s * (self.G - s * dgamma * (self.S @ W)), dgamma, s


@pytest.fixture(params=[EPS, np.longdouble(0)], ids=["eps", "eps = 0"])
def linear(rng, request):
    return LinearLayer(rng, request.param)


@verifies(28, 29, 32, 33)
def test_the_whole_layer_from_the_covariance(linear):
    """The exercise: no value of the batch is normalized."""
    var = np.sum(linear.W * (linear.S @ linear.W), axis=0)
    assert_close(var, reference.moments(linear.X @ linear.W)[2])
    W_hat = linear.gamma * linear.W / np.sqrt(var + linear.eps)
    assert_close(linear.centred @ W_hat + linear.beta, linear.y(linear.W))
    dW, dgamma, s = linear.dW(linear.W)
    dx, of_batch, _ = backward(linear.dout, linear.X @ linear.W, linear.gamma, linear.eps)
    assert_close(dgamma, of_batch)
    assert_close(dW, linear.X.T @ dx)
    assert_gradient(linear.y, linear.W, linear.dout, dW)
    w, S = linear.W[:, :1], linear.S
    assert_gradient(
        lambda w: 1 / np.sqrt(w.T @ S @ w + linear.eps), w, np.ones((1, 1)), -(s[0] ** 3) * S @ w
    )


@verifies(30)
def test_the_length_of_the_weight_is_fixed(rng):
    linear = LinearLayer(rng, np.longdouble(0))
    gamma = -linear.gamma
    W_hat = reference.reparameterized_weight(linear.W, linear.S, gamma)
    assert_close(np.sqrt(np.sum(W_hat * (linear.S @ W_hat), axis=0)), np.abs(gamma))
    assert_close(reference.reparameterized_weight(7 * linear.W, linear.S, gamma), W_hat)


@verifies(31)
def test_weight_norm_is_the_case_of_white_inputs(rng):
    linear = LinearLayer(rng, np.longdouble(0))
    eye = np.eye(3, dtype=np.longdouble)
    expected = linear.gamma * linear.W / np.sqrt(np.sum(linear.W**2, axis=0))
    assert_close(reference.weight_norm(linear.W, linear.gamma), expected)
    assert_close(reference.reparameterized_weight(linear.W, eye, linear.gamma), expected)


@verifies(34)
def test_the_gradient_is_at_right_angles_to_the_weight(linear):
    dW, dgamma, s = linear.dW(linear.W)
    along = np.sum(linear.W * dW, axis=0)
    assert_close(along, linear.gamma * dgamma * linear.eps * s**2, ulps=2000)
    if not linear.eps:
        assert_close(linear.dW(5 * linear.W)[0], dW / 5)


# The page itself


def statements(code):
    """Every statement in the code, in order, as Python writes it; annotations left out."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    for node in sorted(nodes, key=lambda node: node.lineno):
        if isinstance(node, ast.AnnAssign):
            yield f"{ast.unparse(node.target)} = {ast.unparse(node.value)}"
        else:
            yield ast.unparse(node)


def rows_below(header):
    """The cells of the table of the page whose header begins so."""
    table = PAGE[PAGE.index(f"| {header} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]


def quoted():
    """Every function that the page quotes, with the code."""
    yield from BLOCK.findall(PAGE)
    for header, name in TABLES.items():
        yield name, "\n".join(row[2].strip("`") for row in rows_below(header))


@pytest.mark.parametrize(("name", "code"), list(quoted()))
def test_the_code_that_is_quoted_stands_in_the_reference(name, code):
    rest = statements(inspect.getsource(getattr(reference, name)))
    for statement in statements(code):
        assert statement in rest, f"{statement!r} is not in {name}, or not in this order"


def test_every_block_of_code_names_its_function():
    assert PAGE.count("```python") == len(BLOCK.findall(PAGE)) > 10


def example():
    """The values of the example with a pencil: the cells `name = numbers`."""
    cells = re.findall(r"\| (\w+) = ([-\d/, ]+) \|$", PAGE, re.MULTILINE)
    return {
        name: [float(Fraction(value)) for value in numbers.split(", ")] for name, numbers in cells
    }


def test_the_example_has_the_numbers_of_the_page():
    x, dout = np.array([[1.0], [3.0], [5.0], [7.0]]), np.array([[0.0], [9.0], [0.0], [0.0]])
    _, cache = reference.staged_forward(x, np.array([2.0]), np.array([1.0]), 4.0)
    reference.staged_backward(dout, cache)
    found = example()
    names = set(cache) - {"axis", "x", "gamma", "beta", "dout"}
    assert found.keys() == names
    for name, values in found.items():
        np.testing.assert_allclose(np.ravel(cache[name]), values, rtol=0, atol=1e-13)
    moved = x.copy()
    moved[1] += 1e-3
    assert (reference.forward(moved, eps=4.0) != reference.forward(x, eps=4.0)).all()


def test_every_numbered_formula_is_verified():
    numbers = [int(number) for number in re.findall(r"\\qquad \((\d+)\)\$\$$", PAGE, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert verified == set(numbers)


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    page = (DOCS / name).read_text("utf-8")
    links = re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]*))?\)", page)
    assert len(links) > 10
    for path, anchor in links:
        assert (DOCS / path).exists(), path
        assert not anchor or anchor in slugs(DOCS / path if path else DOCS / name), anchor


def slugs(path):
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^## (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_has_its_command(name):
    """Below it, and it names a script that is there."""
    page = re.sub("<!--.*?-->", "", (DOCS / name).read_text("utf-8"))
    pictures, commands = (
        re.findall(pattern, page, re.MULTILINE)
        for pattern in (r"^!\[", r"^!\[.*\)\n\n    python (\S+\.py)")
    )
    assert 0 < len(pictures) == len(commands)
    for script in commands:
        assert (DOCS.parent / script).exists()


def test_the_command_of_the_figures_draws(tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    figures.SEEDS, figures.ROWS, figures.OFFSETS = 2, 50, figures.OFFSETS[::6]
    figures.main(tmp_path)
    assert_png(tmp_path / "one_pass.png")
    assert_png(tmp_path / "graph.png")
