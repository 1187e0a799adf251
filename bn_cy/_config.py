"""What `show_config` tells."""

from bn_cy import _dispatch, _threads
from bn_cy._openmp import cpu

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
        With mode "dicts": ``variant``, the instruction-set variant in use; ``supported``, those
        that were built and that the processor runs; ``openmp``, whether the build has it;
        ``threads``, how many the next call may use; ``flags``, what the C compiler was told.

    Raises
    ------
    ValueError
        If `mode` is neither.

    Examples
    --------
    >>> import bn_cy
    >>> sorted(bn_cy.show_config(mode="dicts"))
    ['flags', 'openmp', 'supported', 'threads', 'variant']
    """
    config = {
        "variant": _dispatch.VARIANT,
        "supported": _dispatch.SUPPORTED,
        "openmp": cpu.OPENMP,
        "threads": _threads.get_num_threads(),
        "flags": _dispatch.FLAGS,
    }
    if mode == "dicts":
        return config
    if mode != "stdout":
        raise ValueError(f'mode must be "stdout" or "dicts", got {mode!r}')
    for name, value in config.items():
        print(f"{name:10} {value}")
    return None
