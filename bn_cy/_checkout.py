"""What an import needs in a checkout, where the sources are; nothing of it runs elsewhere.

Python that starts in the root of a checkout finds its folder `bn_cy` before the package that pip
installed. After `pip install -e .` the folder has its compiled modules and is the package. After
`pip install .` they are with the installed package alone, which is then imported instead: all of
it, as a mixture of two versions would be neither.
"""

import importlib.util
import os
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder

COMPILED = EXTENSION_SUFFIXES[0]
TO_COMPILE = (".pyx", ".pxi", ".pxd")
INSTALL = 'pip install -e ".[dev]"'
BUILD = "python setup.py build_ext --inplace"


def prepare(folder: str) -> None:
    """Find the compiled modules for the checkout's package, and warn where they are stale.

    Raises
    ------
    ImportError
        If there are none.
    """
    if os.path.exists(os.path.join(folder, f"_cpu{COMPILED}")):
        _warn_if_stale(folder, TO_COMPILE, folder, BUILD)
        return
    spec = _installed(os.path.dirname(folder))
    if spec is None or spec.origin is None or spec.loader is None:
        raise ImportError(
            f"bn_cy is imported from its source folder, {folder}, where its compiled modules were "
            f"not built, and none is installed: run `{INSTALL}` in {os.path.dirname(folder)}"
        )
    _warn_if_stale(folder, (".py", *TO_COMPILE), os.path.dirname(spec.origin), INSTALL)
    package = importlib.util.module_from_spec(spec)
    sys.modules["bn_cy"] = package
    spec.loader.exec_module(package)


def _installed(root: str) -> ModuleSpec | None:
    """Find the package on `sys.path` outside of this checkout."""
    here = os.path.realpath(root)
    elsewhere = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != here]
    return PathFinder.find_spec("bn_cy", elsewhere)


def _warn_if_stale(sources: str, suffixes: tuple[str, ...], built: str, command: str) -> None:
    """Warn if a source is newer than the newest compiled module: a command dates them all."""
    if _newest(sources, suffixes) > _newest(built, (COMPILED,)):
        warnings.warn(
            f"the bn_cy in {built} was built before the sources in {sources} were changed: "
            f"run `{command}` in {os.path.dirname(sources)}",
            RuntimeWarning,
            stacklevel=4,
        )


def _newest(folder: str, suffixes: tuple[str, ...]) -> float:
    """Return when the newest of the files with these suffixes was written; 0 without any."""
    return max(
        (
            os.stat(os.path.join(place, name)).st_mtime
            for place, _, names in os.walk(folder)
            for name in names
            if name.endswith(suffixes)
        ),
        default=0,
    )
