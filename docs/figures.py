"""Draw the pictures of derivation.md, beside this file or into another folder.

    python docs/figures.py [FOLDER]

one_pass.png   the error of the variance by three methods, against the mean
graph.png      the nine steps of the page's example, by `bn_cy.graph`
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import bn_cy
from bn_cy import graph, reference

SEEDS = 20
ROWS = 1000
LEAST = 1e-10  # the lower edge of the picture: what is less is drawn there
OFFSETS = np.logspace(0, 6, 25)  # means, in deviations
METHODS = {
    "one pass: E[x^2] - E[x]^2": (reference.moments_one_pass, "#c8501e"),
    "two passes": (reference.moments, "#777777"),
    "bn_cy.moments": (bn_cy.moments, "#1f5fa8"),
}


def error_of_variance(method, x):
    """Return the relative error of a method's variance of float32 data."""
    _, _, exact = reference.moments(x.astype(np.longdouble))
    return float(np.abs(method(x)[2] / exact - 1).max())


def median_errors(method):
    """Return the median over the seeds at every offset."""

    def error(seed, offset):
        x = offset + np.random.default_rng(seed).standard_normal((ROWS, 1))
        return error_of_variance(method, x.astype(np.float32))

    errors = [[error(seed, offset) for seed in range(SEEDS)] for offset in OFFSETS]
    return np.maximum(np.median(errors, axis=1), LEAST)


def draw_one_pass(path):
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, (method, colour) in METHODS.items():
        ax.loglog(OFFSETS, median_errors(method), "o-", markersize=3, color=colour, label=name)
    u = np.finfo(np.float32).eps / 2
    ax.loglog(OFFSETS, u * (1 + OFFSETS**2), ":", color="0.3", label="formula (22)")
    ax.axhline(1, color="0.3", linewidth=0.8)
    ax.text(OFFSETS[-1], 1.3, "no digit is right", color="0.3", ha="right")
    ax.set_ylim(LEAST / 2, 1e4)
    ax.set_xlabel("mean, in standard deviations")
    ax.set_ylabel(f"relative error of the variance ({LEAST:g}: or less)")
    ax.set_title(f"float32, {ROWS} values; median of {SEEDS} draws")
    ax.grid(alpha=0.25)
    ax.legend(loc="upper left")
    figure.savefig(path, dpi=110)


def draw_graph(path):
    x = np.array([[1.0], [3.0], [5.0], [7.0]])
    dout = np.array([[0.0], [9.0], [0.0], [0.0]])
    figure = Figure(figsize=(12, 6), layout="constrained")
    graph.trace(x, np.array([2.0]), np.array([1.0]), dout, 4.0).draw(ax=figure.subplots())
    figure.savefig(path, dpi=110)


def main(folder=Path(__file__).parent):
    draw_one_pass(Path(folder) / "one_pass.png")
    draw_graph(Path(folder) / "graph.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
