"""Run an installed wheel's layer forward and backward beside NumPy in long double.

For an environment that has the wheel and NumPy alone, with no compiler in reach.
"""

import importlib.metadata
import shutil
import sys
from pathlib import Path

import numpy as np

import bn_cy

EPS = 1e-5


def formula(x, dout, gamma, beta):
    """Return (y, dx, dgamma, dbeta) for features along axis 1."""
    xhat = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + EPS)
    dgamma, dbeta = (dout * xhat).sum(axis=0), dout.sum(axis=0)
    dx = gamma / np.sqrt(x.var(axis=0) + EPS) * (dout - dbeta / len(x) - xhat * dgamma / len(x))
    return gamma * xhat + beta, dx, dgamma, dbeta


def check_layer(rng, dtype, tolerance):
    x = rng.normal(3, 2, (3000, 70)).astype(dtype)
    dout = rng.standard_normal(x.shape).astype(dtype)
    layer = bn_cy.BatchNorm(70, eps=EPS, dtype=dtype)
    layer.gamma[:], layer.beta[:] = rng.normal(1, 0.5, (2, 70))
    results = layer.forward(x), layer.backward(dout), layer.dgamma, layer.dbeta
    wide = [np.asarray(a, np.longdouble) for a in (x, dout, layer.gamma, layer.beta)]
    names = "y", "dx", "dgamma", "dbeta"
    for name, got, expected in zip(names, results, formula(*wide), strict=True):
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert got.dtype == dtype, (name, got.dtype)
        assert error < tolerance, (name, dtype, error)
        print(f"  {np.dtype(dtype)} {name}: relative error {error:.1e}")


def check_surroundings():
    compilers = [shutil.which(name) for name in ("cc", "gcc", "clang", "c++")]
    assert not any(compilers), compilers
    others = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
    assert others <= {"bn_cy", "numpy", "pip", "setuptools"}, others
    mapped = Path("/proc/self/maps").read_text().split()
    runtimes = {path for path in mapped if "libgomp" in path}
    folder = Path(bn_cy.__file__).resolve().parents[1]
    assert runtimes, "no OpenMP runtime is loaded"
    assert all(folder in Path(path).parents for path in runtimes), runtimes


seed = np.random.SeedSequence().entropy
print(f"Python {sys.version.split()[0]}, NumPy {np.__version__}, seed {seed}")
generator = np.random.default_rng(seed)
check_layer(generator, np.float32, 5e-7)
check_layer(generator, np.float64, 1e-14)
check_surroundings()
