"""`MicroBatch`: a large batch that comes in parts, normalized as one."""

from itertools import product

import numpy as np

from bn_cy._arguments import as_flag, as_output, as_plain
from bn_cy._checks import (
    check_apart_from_layer,
    check_batch,
    check_like,
    check_several,
    checked_target,
    naming,
)
from bn_cy._moments import Moments
from bn_cy._parts import PartCache, count_batches, is_counted
from bn_cy.functional import moments
from bn_cy.layer import BatchNorm
from bn_cy.sync import SyncBatchNorm

__all__ = ["MicroBatch"]


class MicroBatch:
    """A layer for a batch that comes in parts: what it computes is that of the whole.

    Gradients that are added up over small batches are those of one large batch, but for batch
    norm: each small batch has statistics of its own. Here all parts are measured before the first
    one is normalized, and in the backward all have their say before the first gradient is
    computed. So a network goes through the parts layer by layer, all parts through one layer
    before the first goes through the next.

    Parameters
    ----------
    layer : BatchNorm
        Whose parameters, running statistics, mode and options are used.

    Attributes
    ----------
    layer : BatchNorm
        The same.

    Raises
    ------
    TypeError
        If `layer` is not a `BatchNorm`, or is one whose batch is spread over ranks.

    Notes
    -----
    The parts are kept by reference until the backward, with O(features) numbers each, and, after a
    residual and a ReLU, a bit a value. They must not change before it. Pickles and copies leave
    them out. The means of float64 data are rounded to float64, as in eval mode.

    There is no mask: give sequences of different lengths as parts without padding, or of a padded
    part the rows that count, ``np.moveaxis(x, layer.axis, -1)[mask]``, where `axis` is 1 or -1.

    A layer that is used twice in a network needs a `MicroBatch` for each use.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> x = np.array([[1.0], [2.0], [6.0], [7.0]])
    >>> layer = bn_cy.BatchNorm(1, dtype=np.float64)
    >>> micro = bn_cy.MicroBatch(layer)
    >>> ys = micro.forward([x[:3], x[3:]])
    >>> bool(np.allclose(np.concatenate(ys), bn_cy.batchnorm_forward(x)[0]))
    True
    >>> dxs = micro.backward([y**2 for y in ys])
    >>> [dx.shape for dx in dxs], layer.num_batches_tracked
    ([(3, 1), (1, 1)], 1)
    """

    def __init__(self, layer):
        if not isinstance(layer, BatchNorm) or isinstance(layer, SyncBatchNorm):
            raise TypeError(
                "layer must be a BatchNorm, whose batch is in this process, "
                f"got {type(layer).__name__}"
            )
        self._layer = layer
        self._caches, self._cached_mode = None, True

    @property
    def layer(self):
        """The layer."""
        return self._layer

    def forward(self, parts, *, out=None, residuals=None, update=True):
        """Normalize all parts; in training, by the statistics of the whole batch.

        Parameters
        ----------
        parts : iterable of arrays of float32 or float64
            What the layer gets as `x`, of any sizes; a part may be empty, or of a single value.
        out : iterable of arrays, optional
            Where to write the results, each of the shape and dtype of its part. They may not share
            memory with each other, with a part or with the layer; one may be its part's residual.
        residuals : iterable of arrays, optional
            Added to the results, before the ReLU if there is one; each of the shape and dtype of
            its part.
        update : bool, optional
            False: the statistics are not taken into the running ones.

        Returns
        -------
        list of arrays
            A result for each part; those of `out`, if given.

        Raises
        ------
        FloatingPointError
            If the whole is to be counted in the running statistics and has NaN or infinity, as
            `BatchNorm` says, or a variance that overflows. Nothing has been written then.
        TypeError, ValueError
            As `BatchNorm.forward`, with the number of the part, counted from 0; if all parts
            together have a single value per feature; and in training, if the layer has a
            `ghost_batch_size`. The layer is unchanged.

        Notes
        -----
        The running statistics are updated once, and one batch is counted, as for the whole.
        """
        layer, update = self._layer, as_flag("update", update)
        xs, targets, residuals = self._fitting(parts, out, residuals)
        if layer._measures:
            if layer._groups:
                raise ValueError(
                    "the layer has a ghost_batch_size, and a MicroBatch normalizes the whole batch "
                    "by its own statistics: set layer.ghost_batch_size = None"
                )
            whole = self._measured(xs)
            self._caches = None  # if it is refused: a backward would be of the batch before
            counted = is_counted(layer, whole, update)
        else:
            state = layer.state_dict()
            whole = Moments(np.inf, state["running_mean"], state["running_var"])
            counted = False
        results = [
            PartCache.forward(layer, x, whole, target, residual)
            for x, target, residual in zip(xs, targets, residuals, strict=True)
        ]
        ys, caches = [y for y, _ in results], [cache for _, cache in results]
        if counted:  # last: nothing after it wants memory
            count_batches(layer, [whole])
        self._caches, self._cached_mode = caches, layer.training
        return ys

    def __call__(self, parts, **options):
        """Normalize the parts: `forward`, also that of a subclass."""
        return self.forward(parts, **options)

    def backward(self, douts, *, out=None):
        """Gradients of the last forward; those of the parameters go to the layer's `grads`.

        Parameters
        ----------
        douts : iterable of arrays
            The gradients with respect to the results, one for each part; of any floating-point
            dtype.
        out : iterable of arrays, optional
            Where to write `dxs`, each of the shape and dtype of its part. It may be `douts`.

        Returns
        -------
        dxs : list of arrays
            A gradient for each part; those of `out`, if given.
        dresiduals : list of arrays
            Only after a forward with residuals: their gradients.

        Raises
        ------
        RuntimeError
            If there was no forward since the last backward, if the layer's mode has changed since,
            or if a part was, as in `batchnorm_backward`.
        TypeError, ValueError
            As `BatchNorm.backward`, with the number of the part. The layer is unchanged.
        """
        caches = self._caches_for_backward()
        douts = one_each("douts", douts, caches)
        targets = [None if a is None else as_output(a) for a in one_each("out", out, caches)]
        upstream, sums = [], []
        for number, (cache, dout, target) in enumerate(zip(caches, douts, targets, strict=True)):
            with naming(f"part {number}"):
                douts[number] = dout = as_plain("dout", dout)
                cache.target(target, dout)
                check_apart_from_layer(target, self._layer)
                of_part, from_above = cache.gradient_sums(dout)
                sums.append(of_part)
                upstream.append(from_above)
        check_apart(targets, [cache.x for cache in caches], "x")
        check_apart(targets, douts, "dout")
        check_apart(targets, targets, "out")
        whole = np.sum(np.reshape(sums, (-1, 2, self._layer.num_features)), axis=0)
        gradients = [
            cache.input_gradients(*from_above, whole, target)
            for cache, from_above, target in zip(caches, upstream, targets, strict=True)
        ]
        result = dxs = [dx for dx, *_ in gradients]
        if any([cache.residual for cache in caches]):  # a generator's end may want memory
            result = dxs, [rest[0] if rest else None for _, *rest in gradients]
        dbeta, dgamma = whole
        self._layer._keep_gradients(dgamma, dbeta)  # last: nothing after it wants memory
        self._caches = None
        return result

    def __getstate__(self):
        """Everything but the parts of the last forward, as of a layer."""
        return {**self.__dict__, "_caches": None}

    def __repr__(self):
        """As the expression that makes it."""
        return f"{type(self).__name__}({self._layer!r})"

    def _fitting(self, parts, out, residuals):
        """Return the parts, where to write their results, and residuals, as arrays that fit.

        What `frozen_forward` would refuse is refused here, before anything is written.
        """
        check_several("parts", parts)
        xs = list(parts)
        targets = [None if a is None else as_output(a) for a in one_each("out", out, xs)]
        residuals = one_each("residuals", residuals, xs)
        for number, (x, target, residual) in enumerate(zip(xs, targets, residuals, strict=True)):
            with naming(f"part {number}"):
                xs[number] = x = as_plain("x", x)
                self._layer._check_features(x)
                check_batch(x, self._layer.axis)
                if residual is not None:
                    residuals[number] = residual = as_plain("residual", residual)
                    check_like("residual", residual, x)
                checked_target(target, x, residual=residual)
                check_apart_from_layer(target, self._layer)
        check_apart(targets, xs, "x")
        check_apart(targets, residuals, "residual")
        check_apart(targets, targets, "out")
        return xs, targets, residuals

    def _measured(self, xs):
        """Return the moments of all parts together."""
        features = self._layer.num_features
        found = [Moments(0, np.zeros(features), np.zeros(features))]  # for no part at all
        for number, x in enumerate(xs):
            with naming(f"part {number}"):
                found.append(moments(x, axis=self._layer.axis))
        whole = Moments.sum(found)
        if whole.count == 1:
            raise ValueError(
                "parts must have two values per feature or more together to have a variance, "
                "got one"
            )
        return whole

    def _caches_for_backward(self):
        if self._caches is None:
            raise RuntimeError(
                "backward needs a forward before it, and each forward serves one backward: for "
                "two forwards before their backwards, make a MicroBatch for each"
            )
        if self._cached_mode != self._layer.training:
            raise RuntimeError(
                f"the last forward was in {'training' if self._cached_mode else 'eval'} mode, and "
                "the layer no longer is: change its mode after the backward"
            )
        return self._caches


def one_each(name, arrays, parts):
    """Return a list with an entry for each part."""
    if arrays is None:
        return [None] * len(parts)
    check_several(name, arrays)
    arrays = list(arrays)
    if len(arrays) != len(parts):
        raise ValueError(
            f"{name} must have an array for each of the {len(parts)} parts, got {len(arrays)}"
        )
    return arrays


def check_apart(targets, arrays, name):
    """Refuse a target that shares memory with what another part has still to read or to write."""
    for (i, target), (j, array) in product(enumerate(targets), enumerate(arrays)):
        if i == j or target is None or array is None:
            continue
        if np.shares_memory(target, array):
            raise ValueError(
                f"the out of part {i} may not share memory with the {name} of part {j}"
            )
