"""Ghost batches: groups of the examples of a batch, each normalized by its own statistics.

A large batch then trains as small ones do, whose statistics have noise; nothing but the statistics
is of the groups. E. Hoffer, I. Hubara and D. Soudry, *Train longer, generalize better*, 2017,
algorithm 1.
"""

from dataclasses import dataclass

import numpy as np

from bn_cy import functional
from bn_cy._arguments import as_index, as_plain
from bn_cy._calls import check_unchanged
from bn_cy._checks import check_like, checked_target, unlike
from bn_cy._layout import as_batch, axis_of, new_result
from bn_cy._moments import Moments
from bn_cy._parts import count_batches, is_counted


@dataclass(frozen=True, eq=False)
class GhostCache:
    """What a forward in groups leaves for its backward.

    Attributes
    ----------
    x : array
        The batch, by reference, or its copy.
    axis : int
        Its feature axis.
    places : list of tuples of slices
        Where in x the groups are.
    groups : list of Cache
        That of each group.
    residual : bool
        Whether there was a residual.
    """

    x: np.ndarray
    axis: int
    places: list
    groups: list
    residual: bool

    @property
    def num_features(self):
        """How many features the batch has."""
        return self.groups[0].num_features

    @property
    def scaled(self):
        """Whether there was a gamma."""
        return self.groups[0].scaled

    @property
    def shifted(self):
        """Whether there was a beta."""
        return self.groups[0].shifted

    @property
    def empty(self):
        """Whether the batch has no values."""
        return self.x.size == 0


def checked_size(size):
    """Return how many examples are in a group, or None."""
    if size is None:
        return None
    index = as_index("ghost_batch_size", size)
    if index < 1:
        raise ValueError(f"ghost_batch_size must be at least 1, or None, got {size}")
    return index


def places_of(x, axis, size):
    """Return where the groups are: `size` examples each, and in the last what is left over.

    Examples lie along the first axis that is not the features'. What is left over joins the group
    before where it would be one value per feature, which has no variance.
    """
    along = 0 if axis_of(x, axis) else 1
    examples, features = x.shape[along], x.shape[axis]
    each = x.size // (examples * features) if x.size else 0  # values of a feature in an example
    if size * each == 1:
        raise ValueError(
            f"ghost_batch_size must give every group two values per feature or more, got {size} "
            f"for x of shape {x.shape}"
        )
    starts = list(range(0, examples, size)) or [0]
    if len(starts) > 1 and (examples - starts[-1]) * each == 1:
        starts.pop()
    before = (slice(None),) * along
    return [
        (*before, slice(*bounds)) for bounds in zip(starts, [*starts[1:], examples], strict=True)
    ]


def forward(layer, x, out, residual, update):
    """Normalize every group, and count each in the running statistics, one after the other."""
    given, x = x, as_batch(x, layer.axis)
    if residual is not None:
        residual = as_plain("residual", residual)
        check_like("residual", residual, x)
    target = checked_target(out, given, residual=residual)
    places = places_of(x, layer.axis, layer.ghost_batch_size)
    if target is None:
        target = new_result(x, layer.axis)
    groups = []
    for place in places:
        _, cache = functional.batchnorm_forward(
            x[place],
            layer.gamma,
            layer.beta,
            layer.eps,
            axis=layer.axis,
            out=target[place],
            relu=layer.relu,
            residual=None if residual is None else residual[place],
        )
        groups.append(cache)
    found = [Moments(cache.count, cache.mean, cache.var) for cache in groups]
    counted = [moments for moments in found if is_counted(layer, moments, update)]
    if counted:  # of all groups at once: one that is refused leaves the statistics as they were
        count_batches(layer, counted)
    cache = GhostCache(x, layer.axis, places, groups, residual is not None)
    return target if out is None else out, cache


def backward(dout, cache, *, out=None):
    """Return what `batchnorm_backward` does, of a forward in groups."""
    x = cache.x
    dout = as_plain("dout", dout)
    if dout.shape != x.shape:
        raise unlike("dout", dout, x)
    target = checked_target(out, x, dout=dout)
    for group in cache.groups:  # before any of them writes over its dout
        check_unchanged(group)
    if target is None:
        target = new_result(x, cache.axis)
    dresidual = [new_result(x, cache.axis)] if cache.residual else []
    gradients = []
    for place, group in zip(cache.places, cache.groups, strict=True):
        _, dgamma, dbeta, *of_residual = functional.batchnorm_backward(
            dout[place], group, out=target[place]
        )
        gradients.append((dgamma, dbeta))
        for whole, part in zip(dresidual, of_residual, strict=True):
            whole[place] = part
    dgamma, dbeta = (
        None if rows[0] is None else np.sum(rows, axis=0, dtype=np.float64)
        for rows in zip(*gradients, strict=True)
    )
    return target if out is None else out, dgamma, dbeta, *dresidual
