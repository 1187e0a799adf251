"""Batches of more than 2^31 values, against exact sums: what an index of 32 bits would get wrong.

    python tests/tools/large.py > tests/tools/large.txt

takes up to an hour and 18 GB of the folder for temporary files (`--folder` names another). x, dout
and the results are files that are mapped into memory, so little memory will do. The values are
small integers: their sums, and those of their products, are exact. Small runs are part of the
tests; a large one is not, and `large.txt` is the last one's output.
"""

import argparse
import math
import secrets
import sys
import tempfile
from pathlib import Path

import numpy as np

from bn_cy import batchnorm_backward, batchnorm_forward

CHUNK = 1 << 23  # values at a time
SHIFT = 1001  # dout is x, so many values later
EPS = 1e-5
PROMISED = {"mean": 2e-7, "var": 3e-7, "y": 2e-7, "dgamma": 4e-7, "dbeta": 4e-7, "dx": 2e-7}


def layouts(elements):
    """Return the shapes: of at least so many values, but for the axis that is not divided."""
    return {
        "rows of features": (elements // 65 + 1, 65),
        "images": (elements // (24 * 14 * 14) + 1, 24, 14, 14),
        "one feature": (elements, 1),
        "one image": (1, 3, elements // 3 + 1),
    }


def chunks(size):
    return [slice(i, min(i + CHUNK, size)) for i in range(0, size, CHUNK)]


def fill(values, rng):
    """Write integers from -3 to 28: of one mean, but not symmetric about it."""
    for part in chunks(values.size):
        values[part] = rng.integers(-3, 29, values[part].size, np.int8)


def features_of(part, shape):
    """Return the feature of each value of a part of a flat array."""
    inner = math.prod(shape[2:])
    return np.arange(part.start, part.stop) // inner % shape[1]


def exact_sums(x, dout, shape):
    """Return the sums of x, x*x, dout and x*dout of every feature, as integers."""
    sums = np.zeros((4, shape[1]), np.int64)
    for part in chunks(x.size):
        feature = features_of(part, shape)
        u, v = x[part].astype(np.float64), dout[part].astype(np.float64)
        for row, terms in zip(sums, (u, u * u, v, u * v), strict=True):
            row += np.bincount(feature, terms, shape[1]).astype(np.int64)  # each below 2^53
    return sums.astype(np.longdouble)


def worst(actual, expected, size):
    """Return the largest relative error, in the L2 norm, of the parts of an array."""
    errors = []
    for part in chunks(size):
        wanted = expected(part)
        difference = np.linalg.norm(actual[part] - wanted)
        errors.append(difference / np.linalg.norm(wanted))
    return max(errors)


def errors_of(shape, x, dout, out):
    """Return the errors of everything that a training step computes."""
    size = math.prod(shape)
    x, dout, out = x[:size], dout[:size], out[:size]
    sum_x, sum_xx, dbeta, sum_xdout = exact_sums(x, dout, shape)
    n = np.longdouble(size // shape[1])
    mean, var = sum_x / n, sum_xx / n - (sum_x / n) ** 2  # 2^-64 of what is near 400
    invstd = 1 / np.sqrt(var + EPS)
    dgamma = (sum_xdout - mean * dbeta) * invstd
    gamma = np.linspace(0.5, 2, shape[1], dtype=np.float32)
    centre, scale, slope, offset = (
        values.astype(np.float64) for values in (mean, invstd, dgamma / n, dbeta / n)
    )

    def xhat(part):
        feature = features_of(part, shape)
        return (x[part] - centre[feature]) * scale[feature], feature

    def y(part):
        normalized, feature = xhat(part)
        return gamma[feature] * normalized

    def dx(part):
        normalized, feature = xhat(part)
        inside = dout[part] - offset[feature] - normalized * slope[feature]
        return gamma[feature] * scale[feature] * inside

    errors = {}
    written, cache = batchnorm_forward(
        x.reshape(shape), gamma, np.zeros_like(gamma), EPS, out=out.reshape(shape)
    )
    assert np.shares_memory(written, out)
    errors["mean"] = float(np.max(np.abs(cache.mean - mean) / np.sqrt(var)))
    errors["var"] = float(np.max(np.abs(cache.var - var) / var))
    errors["y"] = worst(out, y, size)
    _, *sums = batchnorm_backward(dout.reshape(shape), cache, out=out.reshape(shape))
    for name, found, wanted in zip(("dgamma", "dbeta"), sums, (dgamma, dbeta), strict=True):
        errors[name] = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    errors["dx"] = worst(out, dx, size)
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=2**31 + 2**20, help="values of a batch")
    parser.add_argument("--folder", type=Path, help="where the temporary files are")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    args = parser.parse_args()
    print(f"seed {args.seed}, float32; errors relative to the promise in brackets")
    shapes = layouts(args.elements)
    most = max(math.prod(shape) for shape in shapes.values())
    kept = True
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        values = np.memmap(Path(folder, "x"), np.float32, "w+", shape=most + SHIFT)
        out = np.memmap(Path(folder, "out"), np.float32, "w+", shape=most)
        fill(values, np.random.default_rng(args.seed))
        for name, shape in shapes.items():
            errors = errors_of(shape, values[:most], values[SHIFT:], out)
            kept &= all(errors[key] <= promise for key, promise in PROMISED.items())
            told = ", ".join(f"{k} {v:.1e} ({v / PROMISED[k]:.2f})" for k, v in errors.items())
            print(f"{name}, {shape}, {math.prod(shape)} values: {told}", flush=True)
    print("all promises kept" if kept else "a promise is broken")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
