"""`BatchNorm`: batch normalization as a layer, with parameters, running statistics and modes."""

import numpy as np

from bn_cy import _calls, _ghosts, functional
from bn_cy._arguments import as_flag, as_float_dtype, as_index, as_output, as_plain
from bn_cy._attributes import (
    Arrays,
    checked,
    checked_axis,
    checked_eps,
    checked_momentum,
    checked_policy,
    checked_relu,
    checked_tracked,
    entry,
    fixed,
    flag,
    places,
)
from bn_cy._checks import check_apart_from_layer
from bn_cy._forks import give_lock
from bn_cy._masks import Kept
from bn_cy._moments import Moments
from bn_cy._parts import count_batches, is_counted
from bn_cy._state import Stateful

__all__ = ["BatchNorm"]


class BatchNorm(Stateful):
    """Batch normalization as a layer of a NumPy network.

    In training it normalizes by the statistics of the batch and updates the running ones; in
    eval mode it normalizes by these. New layers are in training mode.

    Parameters
    ----------
    num_features : int
        Length of the feature axis.
    eps : float, optional
        Added to the variance.
    momentum : float or None, optional
        Weight of the new batch in the running statistics, from 0 to 1 (PyTorch's meaning: its
        0.1 is the 0.9 of Keras and ONNX). None: all batches weigh alike.
    scale, shift : bool, optional
        Whether there is a `gamma`, and a `beta`.
    track_running_stats : bool, optional
        False: no running statistics; eval normalizes by those of the batch, too.
    unbiased : bool, optional
        Whether the running variance is divided by n - 1 (as PyTorch does) rather than by n (as
        Keras, Flax and ONNX do).
    axis : int, optional
        The feature axis of the input.
    dtype : dtype, optional
        float32 or float64: that of the parameters and their gradients. The input may be of either.
    relu : bool, optional
        Whether a ReLU follows, in the same pass over memory.
    on_nonfinite : {"raise", "skip", "update"}, optional
        What a batch does that is to be counted in the running statistics and has NaN or infinity,
        or a variance that overflows. "raise": a FloatingPointError; the layer's parameters,
        statistics and count are unchanged, the last cache is let go, and `out` has been written.
        "skip": it is normalized and not counted. "update": it is counted, as in PyTorch;
        `load_state_dict` refuses the state of a layer whose statistics are not finite.
    ghost_batch_size : int or None, optional
        In training, the batch is split into groups of so many examples, each normalized by its
        own statistics, as small batches are. Examples lie along the first axis that is not the
        features'. The last group has what is left over, which joins the group before where it is
        one value per feature. Every group is counted as a batch in the running statistics, in
        their order. Eval mode, and a layer that is frozen, know no groups. None: the batch is one.

    Attributes
    ----------
    params, grads : dict
        ``{"gamma": ..., "beta": ...}`` as far as present, for an optimizer: update the arrays
        of `params` in place. `grads` is filled by `backward`, zeros before.
    gamma, beta, dgamma, dbeta : array of shape (num_features,) or None
        The same, one by one.
    running_mean, running_var : float64 array of shape (num_features,) or None
        The running statistics. Always float64, whatever is assigned: a float32 mean of 1e6 would
        ruin eval.
    num_batches_tracked : int
        Batches counted in the running statistics.
    relu : bool
        Whether a ReLU follows.
    training : bool
        The mode.
    frozen : bool
        Whether the running statistics are used in training, too: see `freeze`.
    cache : Cache or None
        What the last forward left for its backward, until that has been. That of a batch in groups
        has a Cache for each in `cache.groups`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Notes
    -----
    S. Ioffe and C. Szegedy, *Batch Normalization*, 2015. Ghost batches: E. Hoffer, I. Hubara and
    D. Soudry, *Train longer, generalize better*, 2017. Pickles and copies leave out the
    cached batch.

    Threads may share a layer: forwards in eval mode run side by side, those in training one after
    the other, and each is counted. `cache` is then that of whichever came last: a thread that
    wants a backward makes the forward by `batchnorm_forward`, or has a layer of its own.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> layer = bn_cy.BatchNorm(2, dtype=np.float64)
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y = layer(x)
    >>> dx = layer.backward(np.array([[1.0, 0.0], [0.0, 1.0]]))
    >>> layer.dbeta
    array([1., 1.])
    >>> layer.running_mean
    array([0.2, 2. ])
    >>> layer.eval()(x).shape
    (2, 2)
    """

    def __init__(
        self,
        num_features,
        *,
        eps=1e-5,
        momentum=0.1,
        scale=True,
        shift=True,
        track_running_stats=True,
        unbiased=True,
        axis=1,
        dtype=np.float32,
        relu=False,
        on_nonfinite="raise",
        ghost_batch_size=None,
    ):
        self._num_features = as_index("num_features", num_features)
        if self._num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        self._dtype = as_float_dtype("dtype", dtype)
        self.eps = eps
        self.momentum = momentum
        self.unbiased = unbiased
        self.axis = axis
        self.relu = relu
        self.on_nonfinite = on_nonfinite
        self.ghost_batch_size = ghost_batch_size
        self.training = True
        self._frozen = False
        parameters = {"gamma": np.ones} if as_flag("scale", scale) else {}
        parameters |= {"beta": np.zeros} if as_flag("shift", shift) else {}
        self._params = Arrays(
            {name: make(self._num_features, self._dtype) for name, make in parameters.items()}
        )
        self._grads = {name: np.zeros_like(array) for name, array in self._params.items()}
        statistics = {"running_mean": np.zeros, "running_var": np.ones}
        self._running = Arrays(
            {name: make(self._num_features) for name, make in statistics.items()}
            if as_flag("track_running_stats", track_running_stats)
            else {}
        )
        self._tracked = np.zeros((), np.int64)
        self._cache, self._cached_mode = None, True
        give_lock(self)

    _cache_types = (functional.Cache, _ghosts.GhostCache)  # that a backward takes
    params = fixed(
        "params",
        "The parameters by name; what is assigned is copied into them.",
        "assign its entries, or several by params.update(...)",
    )
    grads = fixed(
        "grads",
        "The gradients by name, which a backward replaces.",
        "assign its entries; None clears one, and backward fills them all",
    )
    num_features = fixed("num_features", "Length of the feature axis.", "make a new layer")
    dtype = fixed("dtype", "That of the parameters.", "make a new layer")
    frozen = fixed(
        "frozen",
        "Whether the running statistics are used in training, too.",
        "call freeze() or unfreeze()",
    )
    cache = fixed(
        "cache",
        "What the last forward left for its backward, until that has been.",
        "pass one to backward as cache=",
    )
    eps = checked("eps", checked_eps, "Added to the variance.")
    axis = checked("axis", checked_axis, "The feature axis of the input.")
    relu = checked("relu", checked_relu, "Whether a ReLU follows.")
    unbiased = flag("unbiased", "Whether the running variance is divided by n - 1.")
    training = flag("training", "Whether `forward` trains; see `train` and `eval`.")
    on_nonfinite = checked(
        "on_nonfinite", checked_policy, "What a batch does that has NaN or infinity."
    )
    ghost_batch_size = checked(
        "ghost_batch_size", _ghosts.checked_size, "Examples of a group in training, or None."
    )
    gamma = entry("params", "gamma", "The scale, or None.")
    beta = entry("params", "beta", "The shift, or None.")
    dgamma = entry("grads", "gamma", "Gradient of the scale, or None.", "dgamma")
    dbeta = entry("grads", "beta", "Gradient of the shift, or None.", "dbeta")
    running_mean = entry("_running", "running_mean", "The running mean, or None.")
    running_var = entry("_running", "running_var", "The running variance, or None.")
    momentum = checked("momentum", checked_momentum, "Weight of the new batch, or None.")

    @property
    def num_batches_tracked(self):
        """Batches counted in the running statistics."""
        return self._tracked.item()

    @num_batches_tracked.setter
    def num_batches_tracked(self, value):
        self._tracked[()] = checked_tracked(value)

    @property
    def track_running_stats(self):
        """Whether there are running statistics."""
        return bool(self._running)

    def forward(self, x, *, out=None, residual=None, update=True, mask=None, lengths=None):
        """Normalize a batch; in training, update the running statistics.

        Parameters
        ----------
        x : array of float32 or float64, with `num_features` features along `axis`
            The batch. It must not change before the backward.
        out : array of x's shape and dtype, optional
            Where to write the result. It may not share memory with `x`, nor with the layer's own
            arrays; it may be `residual`.
        residual : array of x's shape and dtype, optional
            Added to the result, before the ReLU if there is one: a skip connection.
        update : bool, optional
            False: the batch's statistics are used and not counted, as where a step is computed
            again.
        mask, lengths : array, optional
            What counts of the batch, as in `batchnorm_forward`; in eval mode the rest becomes 0,
            too.

        Returns
        -------
        array of x's shape and dtype
            The result; `out`, if given.

        Raises
        ------
        FloatingPointError
            If a batch that is to be counted has a variance that is not finite, and `on_nonfinite`
            is "raise"; `out` has been written then.
        TypeError, ValueError
            As `batchnorm_forward`, and if `update` or the number of features does not fit. The
            layer is unchanged.
        """
        if update is not True:
            update = as_flag("update", update)
        check_apart_from_layer(out, self)
        if type(x) is not np.ndarray:
            x = as_plain("x", x)
        self._check_features(x)
        if mask is None and lengths is None:
            y, cache = self._normalize(x, out, residual, update)
        elif self._groups:
            raise ValueError(
                "mask and lengths do not go with ghost_batch_size in training: the groups are of "
                "whole examples"
            )
        else:
            kept = Kept(x, self._axis, mask, lengths)
            target = kept.target(out)
            measures = self._measures
            if measures:
                kept.check_variance()
            y, cache = self._normalize(*kept.gathered(x, residual), False)
            y = kept.scatter(y, target, out)
            cache._kept = kept
            if measures:  # last: nothing after it wants memory
                self._count(cache, update)
        self._cache, self._cached_mode = cache, self.training
        return y

    def __call__(self, x, **options):
        """Normalize a batch: `forward`, also that of a subclass."""
        return self.forward(x, **options)

    def _normalize(self, x, out, residual, update):
        """Return what follows from all of a batch, and its cache."""
        gamma, beta = self._params.get("gamma"), self._params.get("beta")
        measures = self._measures
        if measures and self._groups:
            return _ghosts.forward(self, x, out, residual, update)
        if measures and update and self._running:
            return self._track(x, gamma, beta, out, residual)
        given = {"axis": self._axis, "out": out, "relu": self.relu, "residual": residual}
        if measures:
            return functional.batchnorm_forward(x, gamma, beta, self._eps, **given)
        mean, var = self._running["running_mean"], self._running["running_var"]
        return functional.frozen_forward(x, mean, var, gamma, beta, self._eps, **given)

    def backward(self, dout, *, out=None, cache=None):
        """Gradients of the last forward; those of the parameters go to `grads`.

        Parameters
        ----------
        dout : array of x's shape and any floating-point dtype
            The gradient with respect to the forward's result, rounded to x's dtype.
        out : array of x's shape and dtype, optional
            Where to write `dx`. It may not share memory with `x`, nor with the layer's own arrays;
            it may be `dout` itself.
        cache : Cache, optional
            `layer.cache` as it was after the forward that is meant: for two forwards before their
            backwards, or for a second backward. By default the last forward's, which serves one
            backward and is let go by it.

        Returns
        -------
        dx : array of x's shape and dtype
            `out`, if given. After a forward in eval mode the statistics are constants:
            ``dx = gamma*invstd*dout``, where after a ReLU dout counts where y > 0.
        dresidual : array of x's shape and dtype
            Only after a forward with a residual: its gradient.

        Raises
        ------
        RuntimeError
            Without `cache`, if there was no forward since the last backward, or if the mode has
            changed since.
        TypeError, ValueError
            As `batchnorm_backward`, and if `cache` is of a layer with other parameters.
        """
        own = cache is None
        if own:
            cache = self._cache_for_backward()
        else:
            self._check_cache(cache)
        dx, dgamma, dbeta, *dresidual = self._gradients(dout, cache, out)
        result = (dx, *dresidual) if dresidual else dx
        self._keep_gradients(dgamma, dbeta)
        if own:
            self._cache = None
        return result

    def train(self, mode=True):
        """Switch to training mode, or to eval mode.

        Parameters
        ----------
        mode : bool, optional
            False: eval mode.

        Returns
        -------
        BatchNorm
            The layer itself.

        Raises
        ------
        TypeError
            If `mode` is not True or False, for which 1 and 0 pass.
        """
        self.training = as_flag("mode", mode)
        return self

    def eval(self):
        """Switch to eval mode; return the layer itself."""
        return self.train(False)

    def freeze(self):
        """Use the running statistics in training, too, and leave them as they are.

        `train` does not undo it; `unfreeze` does. gamma and beta still get gradients.

        Returns
        -------
        BatchNorm
            The layer itself.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics.
        """
        if not self._running:
            raise RuntimeError("this layer has no running statistics that could be frozen")
        self._frozen = True
        return self

    def unfreeze(self):
        """Undo `freeze`; return the layer itself."""
        self._frozen = False
        return self

    def affine(self):
        """Return the layer in eval mode as a scale and a shift: ``y = x*scale + shift``.

        For weights that take the layer over (`bn_cy.fold`), and for other code that has to be given
        two numbers a feature. A ReLU that follows is left out.

        Returns
        -------
        scale, shift : float64 array of shape (num_features,)
            ``gamma/sqrt(running_var + eps)`` and ``beta - running_mean*scale``.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics.
        ValueError
            If a running variance is negative, as only an operation in place can have made it.

        Notes
        -----
        Apply them in float64, or to float32 data whose mean is within some standard deviations of
        0: ``x*scale`` and ``shift`` are as large as the mean is in standard deviations, and their
        sum is not. In float32 it is off by 6e-8 times that number. `forward` subtracts the mean
        first, and has no such error.

        Examples
        --------
        >>> import bn_cy
        >>> layer = bn_cy.BatchNorm(1, eps=0)
        >>> layer.running_mean, layer.running_var = [3.0], [4.0]
        >>> layer.affine()
        (array([0.5]), array([-1.5]))
        """
        if not self._running:
            raise RuntimeError("this layer has no running statistics, which scale and shift need")
        state = self.state_dict()
        _calls.check_variance("running_var", state["running_var"])
        std = np.sqrt(state["running_var"] + self._eps)
        scale = np.zeros(self._num_features)  # where var and eps are 0, and y is beta
        np.divide(state.get("weight", 1.0), std, out=scale, where=std != 0)
        return scale, state.get("bias", 0.0) - state["running_mean"] * scale

    def __repr__(self):
        """As the expression that makes such a layer."""
        options = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        frozen = ".freeze()" if self._frozen else ""
        mode = "" if self.training else ".eval()"
        return f"{type(self).__name__}({self._num_features}, {options}){frozen}{mode}"

    def _arguments(self):
        """Return the keyword arguments that make such a layer."""
        return {
            "eps": self._eps,
            "momentum": self._momentum,
            "scale": self.gamma is not None,
            "shift": self.beta is not None,
            "track_running_stats": self.track_running_stats,
            "unbiased": self.unbiased,
            "axis": self._axis,
            "dtype": self._dtype.name,
            "relu": self.relu,
            "on_nonfinite": self._on_nonfinite,
            "ghost_batch_size": self._ghost_batch_size,
        }

    @property
    def _measures(self):
        """Whether a forward normalizes by the statistics of its batch."""
        return not self._running or (self.training and not self._frozen)

    @property
    def _groups(self):
        """Whether it does so in groups of the batch."""
        return self._ghost_batch_size is not None and self.training and self._measures

    def _check_features(self, x):
        shape = x.shape
        try:
            fits = len(shape) < 2 or shape[self._axis] == self._num_features
        except IndexError:
            return  # refused where the dimensions are known to be wrong, with their range
        if not fits:
            hint = ""
            if shape[-1] == self._num_features:
                hint = "; for features along the last axis: axis=-1"
            raise ValueError(
                f"x must have {self._num_features} features along axis {self._axis}, "
                f"got shape {shape}{hint}"
            )

    def _track(self, x, gamma, beta, out, residual):
        """Normalize by the batch's statistics and take them into the running ones.

        One thread at a time: the count, the weight and the update belong together.
        """
        mean, var = self._running["running_mean"], self._running["running_var"]
        # Nobody else's code runs under the lock.
        target = None if out is None else as_output(out)
        if residual is not None:
            residual = as_plain("residual", residual)
        with self._lock:
            result = _calls.training_forward(
                x,
                mean,
                var,
                self._tracked,
                self._momentum,
                self.unbiased,
                self._on_nonfinite == "update",
                gamma,
                beta,
                self._eps,
                self._axis,
                target,
                self.relu,
                residual,
            )
        y, cache, counted = result
        if not counted and not cache.empty and self._on_nonfinite == "raise":
            self._refuse_batch(cache.var)
        return y if out is None else out, cache

    def _count(self, cache, update):
        """Take the statistics of a batch that has been normalized into the running ones."""
        whole = Moments(cache.count, cache.mean, cache.var)
        if is_counted(self, whole, update):
            count_batches(self, [whole])

    def _refuse_batch(self, var):
        """Raise the error of a batch whose variance is not finite."""
        wrong = np.flatnonzero(~np.isfinite(var))
        error = FloatingPointError(
            f"x has NaN or infinity, or a variance that overflows, {places(wrong)}; the batch "
            'is not counted (on_nonfinite="skip" normalizes such a batch without an error)'
        )
        self._cache = None  # a backward would give the gradient of the batch before
        raise error

    def _gradients(self, dout, cache, out):
        """Return what `batchnorm_backward` does; the one step of a backward that looks at data."""
        check_apart_from_layer(out, self)
        if isinstance(cache, _ghosts.GhostCache):
            return _ghosts.backward(dout, cache, out=out)
        return functional.batchnorm_backward(dout, cache, out=out)

    def _keep_gradients(self, dgamma, dbeta):
        found = {"gamma": dgamma, "beta": dbeta}
        for name in self._params:  # a cache from elsewhere may have parameters of another shape
            found[name] = found[name].reshape(-1).astype(self._dtype, copy=False)
        for name in self._params:  # now that no memory can be lacking: all change or none
            self._grads[name] = found[name]

    def _check_cache(self, cache):
        if not isinstance(cache, self._cache_types):
            raise TypeError(f"cache must be a Cache, got {type(cache).__name__}")
        has = (cache.num_features, cache.scaled, cache.shifted)
        wanted = (self._num_features, "gamma" in self._params, "beta" in self._params)
        if has != wanted:
            raise ValueError(
                "cache must be of a forward of this layer: expected (features, scale, shift) "
                f"{wanted}, got {has}"
            )

    def _cache_for_backward(self):
        if self._cache is None:
            raise RuntimeError(
                "backward needs a forward before it, and each forward serves one backward: for "
                "more, keep layer.cache after the forward and pass it as cache="
            )
        if self._cached_mode != self.training:
            raise RuntimeError(
                f"the last forward was in {'training' if self._cached_mode else 'eval'} mode, and "
                "the layer no longer is: if its gradient is meant, keep layer.cache after the "
                "forward and pass it as cache="
            )
        return self._cache
