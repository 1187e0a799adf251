"""Trace a batch from the shell and write its page: ``python -m bn_cy.graph``."""

import argparse
import csv
import secrets
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bn_cy.graph.trace import Trace, trace

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bn_cy.graph",
        description="Run batch norm forward and backward on a batch, print every step, compare "
        "every gradient with finite differences, and write a page on which all numbers can be "
        "changed.",
    )
    batch = parser.add_argument_group("the batch, from a file or at random")
    batch.add_argument(
        "--csv", type=Path, metavar="FILE", help="rows are examples, columns features"
    )
    batch.add_argument("--rows", type=int, default=5, metavar="N", help="examples (default: 5)")
    batch.add_argument("--features", type=int, default=3, metavar="D", help="features (default: 3)")
    parser.add_argument(
        "--eps", type=float, default=0.1, help="default: 0.1, large enough that its place shows"
    )
    parser.add_argument("--seed", type=int, help="repeat the random numbers of an earlier run")
    parser.add_argument("--out", type=Path, default=Path("graph.html"), metavar="graph.html")
    return parser


def batch_of(options: argparse.Namespace, rng: np.random.Generator) -> Trace:
    """Trace the file's or a random x, with random gamma, beta and dout."""
    if options.csv:
        x = read_csv(options.csv)
    elif min(options.rows, options.features) < 1:
        raise ValueError("--rows and --features must be at least 1")
    else:
        x = np.round(rng.normal(0.5, 1.2, (options.rows, options.features)), 2)
    features = x.shape[1]
    gamma = np.round(rng.uniform(0.6, 1.8, features), 2)
    beta = np.round(rng.normal(0, 0.7, features), 2)
    dout = np.round(rng.normal(size=x.shape), 2)
    return trace(x, gamma, beta, dout, options.eps)


def read_csv(path: Path) -> NDArray[np.float64]:
    """Read numbers separated by commas; a first line that holds none names the columns."""
    rows: list[list[float]] = []
    named = False  # whether a line that names the columns has come
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for cells in reader:
            if not "".join(cells).strip() and len(cells) < 2:
                continue  # an empty line
            wrong = [cell for cell in cells if not is_number(cell)]
            if not (named or rows) and len(wrong) == len(cells):
                named = True
                continue
            where = f"{path}, line {reader.line_num}"
            if wrong:
                raise ValueError(f"{where}: {wrong[0]!r} is no number")
            if rows and len(cells) != len(rows[0]):
                raise ValueError(f"{where}: expected {len(rows[0])} numbers, got {len(cells)}")
            rows.append([float(cell) for cell in cells])
    if not rows:
        raise ValueError(f"{path} holds no numbers")
    return np.array(rows)


def is_number(text: str) -> bool:
    """Tell whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says."""
    options = parser().parse_args(arguments)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    try:
        result = batch_of(options, np.random.default_rng(seed))
        print(f"random numbers: --seed {seed}\n\n{result}\n")
        print("largest difference between each gradient and central differences")
        for name, error in result.check().items():
            print(f"    {name:<9}{error:.1e}")
        result.to_html(options.out)
    except (OSError, ValueError, csv.Error) as error:
        sys.exit(f"python -m bn_cy.graph: {error}")
    print(f"\n{options.out}: open it in a browser")


if __name__ == "__main__":
    main()
