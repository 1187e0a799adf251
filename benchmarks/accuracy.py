"""How many digits are right: error against offset, number of rows and magnitude.

    python benchmarks/accuracy.py [--plot FILE.png] [--table FILE.md] [--seed N]

For bn_cy and what it is held against: PyTorch's native_batch_norm; JAX, jitted, with jnp.var and
with E[x^2] - E[x]^2, Flax's default; the formula step by step in NumPy; and RepDL's way of summing.
All get the same float32 data and one thread. Errors are relative L2 errors of y and of dgamma
against 80-bit arithmetic on those data. What is not installed is named and left out.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import machine
import numpy as np
from cases import Case
from peers import BnCy, Jax, NumPy, Torch
from problem import Problem
from tqdm import tqdm

RESULTS = {"y": 0, "dgamma": 2}  # and their places in what a library returns
STYLES = {"y": "-", "dgamma": ":"}
BOUND = 2e-7  # on the error of y, in the contract
ROWS = 1 << 18  # of an error summed at a time
NOTHING_RIGHT = 1.0  # an error from here on, or nan: drawn on the upper edge


class JaxVar(Jax):
    """The formula with jnp.mean and jnp.var, jitted, and its derivative by JAX."""

    def bind(self, p):
        jnp, rsqrt = self.jax.numpy, self.jax.lax.rsqrt

        @self.jax.jit
        def forward(x, gamma, beta):
            return (x - jnp.mean(x, 0)) * (gamma * rsqrt(jnp.var(x, 0) + p.eps)) + beta

        y, backward = self.jax.vjp(forward, p.x, p.gamma, p.beta)
        return {"forward": lambda: y, "backward": lambda: backward(p.dout)}

    def results(self, verbs):
        return [np.asarray(array) for array in (verbs["forward"](), *verbs["backward"]())]


class SerialChain:
    """RepDL's way to the same bits everywhere: a sum is one chain of float32 additions.

    P. Xie, X. Zhang and S. Chen, *RepDL: Bit-level Reproducible Deep Learning Training and
    Inference*, 2025, arXiv:2510.09180. Its promise is the nearest to bn_cy's.
    """

    def __init__(self, threads):
        pass

    def bind(self, p):
        return {"results": lambda: self._results(p)}

    def results(self, verbs):
        return verbs["results"]()

    def _results(self, p):
        nth = np.float32(1 / len(p.x))
        from_mean = p.x - chain(p.x) * nth
        std = np.sqrt(chain(from_mean * from_mean) * nth + np.float32(p.eps))
        xhat = from_mean / std
        return p.gamma * xhat + p.beta, None, chain(xhat * p.dout)


def chain(values):
    """Add up the rows one after the other, rounding each sum to the data's type."""
    return np.add.accumulate(values, axis=0)[-1]


class Library(NamedTuple):
    """What is measured, and how its lines look."""

    kind: type
    look: dict


def look(colour, marker, width=1.4, **more):
    return {"color": colour, "marker": marker, "linewidth": width, "markersize": 4, **more}


# PyTorch, NumPy and RepDL add up in the same order and lie on each other: one is drawn wide.
LIBRARIES = {
    "bn_cy": Library(BnCy, look("black", "o", 2.2)),
    "PyTorch": Library(Torch, look("#f2a3a3", "s", 5, markersize=9)),
    "JAX, jnp.var": Library(JaxVar, look("#3f9b3a", "^")),
    "JAX, Flax's variance": Library(Jax, look("#b08d00", "v")),
    "NumPy formula": Library(NumPy, look("#2f5f9e", "D")),
    "RepDL's chain": Library(SerialChain, look("#8e4fa8", "x", 0.8)),
}


class Sweep(NamedTuple):
    """One panel: how the data depend on the value that is varied."""

    title: str
    label: str
    values: tuple
    draw: object  # (rng, value) -> rows of features
    eps: float = 1e-5


def draw_offset(rng, offset):
    return offset + rng.standard_normal((10_000, 32))


def draw_rows(rng, rows):
    return rng.standard_normal((rows, max(2, min(256, 1_000_000 // rows))))


def draw_magnitude(rng, deviation):
    return deviation * np.clip(rng.standard_normal((1000, 64)), -5, 5)


# Closer together where squares underflow and overflow.
DECADES = (-30, -25, -22, -20, -18, -15, -10, -5, 0, 5, 10, 15, 18, 19, 20, 25, 30, 35)

SWEEPS = (
    Sweep("Offset", "mean / standard deviation", tuple(10.0**k for k in range(9)), draw_offset),
    Sweep("Batch size", "rows", tuple(10**k for k in range(1, 8)), draw_rows),
    Sweep(
        "Magnitude, eps = 0",
        "standard deviation",
        (*(float(f"1e{k}") for k in DECADES), 5e37),
        draw_magnitude,
        eps=0.0,
    ),
)


def main(arguments=None):
    options = parse(arguments)
    libraries = load()
    measured = [(sweep, measure(sweep, libraries, options.seed)) for sweep in SWEEPS]
    text = table(measured, libraries)
    print(text)
    if options.table:
        options.table.write_text(text)
    if options.plot:
        plot(measured, libraries, options.plot)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the errors")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write them as Markdown")
    parser.add_argument("--seed", type=int, default=0, help="of the random data (default: 0)")
    return parser.parse_args(arguments)


def load():
    """Return the libraries that are there, by name; tell which are not."""
    libraries = {}
    for name, library in LIBRARIES.items():
        try:
            libraries[name] = library.kind(threads=1)
        except ImportError as absent:
            print(f"absent: {name} ({absent})", file=sys.stderr)
    return libraries


# Measuring


def measure(sweep, libraries, seed):
    """Return {library: {result: [error for every value of the sweep]}}."""
    errors = {name: {result: [] for result in RESULTS} for name in libraries}
    for value in tqdm(sweep.values, desc=sweep.title, disable=None, leave=False):
        problem = create(sweep, value, seed)
        exact = reference(problem)
        for name, library in libraries.items():
            with np.errstate(all="ignore"):  # of what overflows in the formula
                results = library.results(library.bind(problem))
            for result, place in RESULTS.items():
                errors[name][result].append(relative_error(results[place], exact[result]))
    return errors


def create(sweep, value, seed):
    """Draw the data of one point. The scale and shift of no interest: 1 and 0."""
    rng = np.random.default_rng([seed, sweep.values.index(value)])
    x = sweep.draw(rng, value).astype(np.float32)
    dout = rng.standard_normal(x.shape, np.float32)
    features = x.shape[1]
    ones, zeros = np.ones(features, np.float32), np.zeros(features, np.float32)
    return Problem(Case("rows", x.shape), x, dout, ones, zeros, sweep.eps)


def reference(problem):
    """Return y and dgamma, computed in 80 bits, feature by feature.

    y is kept in float64, eight digits more than are measured: the largest would fill the memory.
    """
    y = np.empty(problem.x.shape)
    dgamma = []
    for kept, x, dout in zip(y.T, problem.x.T, problem.dout.T, strict=True):
        xhat = x.astype(np.longdouble)
        xhat -= xhat.mean()
        xhat -= xhat.mean()  # what the rounding of the first mean left over
        xhat /= np.sqrt(np.dot(xhat, xhat) / len(xhat) + np.longdouble(problem.eps))
        kept[:] = xhat
        dgamma.append(np.dot(xhat, dout))
    return {"y": y, "dgamma": np.array(dgamma)}


def relative_error(actual, expected):
    """Return a relative L2 error; nan where the result holds a nan or an infinity."""
    if not np.all(np.isfinite(actual)):
        return float("nan")
    wrong = whole = np.longdouble(0)
    for start in range(0, len(expected), ROWS):  # 80 bits take much memory
        part = expected[start : start + ROWS]
        wrong += np.sum((actual[start : start + ROWS] - part) ** 2)
        whole += np.sum(part**2)
    return float(np.sqrt(wrong / whole))


# Showing


def table(measured, libraries):
    """Return the errors as Markdown, a table a sweep."""
    versions = machine.versions()
    held = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"Relative L2 error of y / dgamma, float32 ({held}).", ""]
    for sweep, errors in measured:
        lines.append(f"| {sweep.label} | " + " | ".join(libraries) + " |")
        lines.append("|---:|" + "---|" * len(libraries))
        for i, value in enumerate(sweep.values):
            cells = (" / ".join(show(errors[name][r][i]) for r in RESULTS) for name in libraries)
            lines.append(f"| {value:.0e} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def show(error):
    return f"{error:.1e}" if np.isfinite(error) else "nan"


def plot(measured, libraries, path):
    """Draw a panel for every sweep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(measured), figsize=(13, 5), sharey=True, layout="constrained"
    )
    for ax, (sweep, errors) in zip(axes, measured, strict=True):
        draw_panel(ax, sweep, errors)
    axes[0].set_ylabel("relative L2 error")
    axes[0].set_ylim(1e-8, 5)
    figure.legend(handles=legend_handles(libraries), loc="outside lower center", ncols=8)
    figure.suptitle("Batch normalization of float32 data: how far from exact arithmetic")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_panel(ax, sweep, errors):
    ax.axhline(BOUND, color="0.4", linewidth=1, linestyle="--")
    ax.axhline(NOTHING_RIGHT, color="0.8", linewidth=1)
    for name, of_result in errors.items():
        for result, style in STYLES.items():
            drawn = np.minimum(np.nan_to_num(of_result[result], nan=NOTHING_RIGHT), NOTHING_RIGHT)
            ax.plot(sweep.values, drawn, style, **LIBRARIES[name].look)
    ax.set(xscale="log", yscale="log", xlabel=sweep.label)
    ax.set_title(sweep.title, fontsize=11, loc="left")
    for height, text in ((NOTHING_RIGHT, "no digit right"), (BOUND, "bn_cy's bound on y")):
        ax.text(
            0.995, 1.6 * height, text, transform=ax.get_yaxis_transform(), ha="right",
            fontsize=8, color="0.3",
        )  # fmt: skip
    ax.grid(alpha=0.25)
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)


def legend_handles(libraries):
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **LIBRARIES[name].look, label=name) for name in libraries]
    return handles + [
        Line2D([], [], color="0.4", linestyle=style, label=result)
        for result, style in STYLES.items()
    ]


if __name__ == "__main__":
    main()
