"""Freeze a small application with PyInstaller, and run it where there is no Python to help it.

    python tests/tools/frozen.py

wants PyInstaller beside the installed package, which brings its hooks by an entry point.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

APPLICATION = """
import numpy as np
import bn_cy

layer = bn_cy.BatchNorm(3)
x = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
assert np.abs(layer(x).mean(axis=0)).max() < 1e-6
assert layer.backward(np.ones_like(x)).shape == x.shape
if PAGE:
    bn_cy.graph.trace(x, np.ones(3), np.zeros(3), x).to_html("page.html")
    assert "<html" in open("page.html").read()
print("frozen:", bn_cy.show_config(mode="dicts")["supported"])
"""


def freeze(folder, page):
    """Freeze the application in a folder; return the program."""
    source = folder / "application.py"
    start = "import bn_cy.graph\n" if page else ""
    source.write_text(start + APPLICATION.replace("PAGE", str(page)))
    options = ["--onedir", "--log-level", "WARN", "--noconfirm", "--distpath", "dist"]
    command = [sys.executable, "-m", "PyInstaller", *options, source.name]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "dist" / "application" / "application"


for page in (False, True):
    with tempfile.TemporaryDirectory() as folder:
        program = freeze(Path(folder), page)
        subprocess.run([program], cwd=folder, env={}, check=True)
