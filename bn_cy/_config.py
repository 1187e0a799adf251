"""What `show_config` tells."""

from bn_cy import _dispatch, _threads
from bn_cy._openmp import cpu
from bn_cy._version import __version__

__all__ = ["show_config"]


def show_config(mode="stdout"):
    """Show how the package was built and how it runs here.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, optional
        Print the configuration, or return it.

    Returns
    -------
    dict or None
        With mode "dicts": ``version`` of the package; ``numpy``, ``python`` and ``platform`` that
        it runs with; ``compiler`` and ``flags``, who compiled the kernels and what it was told;
        ``variant``, the instruction-set variant in use; ``built``, those that were built;
        ``supported``, those of them that the processor runs; ``levels``, the x86-64 levels that it
        offers; ``openmp``, whether the build has it; ``runtime``, the path of the OpenMP runtime,
        None if there is none or the system does not tell; ``threads``, how many the next call may
        use.

    Raises
    ------
    ValueError
        If `mode` is neither.

    Examples
    --------
    >>> import bn_cy
    >>> bn_cy.show_config(mode="dicts")["version"] == bn_cy.__version__
    True
    """
    config = _describe()
    if mode == "dicts":
        return config
    if mode != "stdout":
        raise ValueError(f'mode must be "stdout" or "dicts", got {mode!r}')
    for name, value in config.items():
        print(f"{name:10} {value}")
    return None


def _describe():
    import platform  # not for those who only import the package

    import numpy as np

    return {
        "version": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiler": cpu.COMPILER,
        "flags": _dispatch.FLAGS,
        "variant": _dispatch.VARIANT,
        "built": cpu.BUILT,
        "supported": _dispatch.SUPPORTED,
        "levels": list(_dispatch.LEVELS),
        "openmp": cpu.OPENMP,
        "runtime": cpu.openmp_runtime(),
        "threads": _threads.get_num_threads(),
    }
