"""How many threads a kernel gets."""

import operator
import os

from bn_cy._openmp import cpu

_limit = None  # what set_num_threads asked for


def set_num_threads(n):
    """Use at most `n` threads in every later call, in this process.

    Parameters
    ----------
    n : int or None
        At least 1. More than there are processors is allowed and changes no result, as no
        number of threads does. None goes back to what OpenMP says at each call
        (OMP_NUM_THREADS, threadpoolctl).

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is less than 1.

    Examples
    --------
    >>> import bn_cy
    >>> bn_cy.set_num_threads(1)
    >>> bn_cy.get_num_threads()
    1
    >>> bn_cy.set_num_threads(None)
    """
    global _limit
    if n is not None:
        try:
            n = operator.index(n)
        except TypeError:
            raise TypeError(f"n must be an integer or None, got {n!r}") from None
        if not 1 <= n <= 2**31 - 1:
            raise ValueError(f"n must be at least 1 and fit a C int, got {n}")
    _limit = n


def get_num_threads():
    """Return how many threads the next call may use.

    Returns
    -------
    int
        What `set_num_threads` asked for, else what OpenMP says now for the calling thread (from
        OMP_NUM_THREADS, the processors this process may use, or threadpoolctl). 1 without
        OpenMP, and in a child that was forked: an OpenMP runtime does not survive a fork.

    Examples
    --------
    >>> import bn_cy
    >>> bn_cy.get_num_threads() >= 1
    True
    """
    if cpu.is_serial():
        return 1
    return _limit or cpu.max_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=cpu.stay_serial)
