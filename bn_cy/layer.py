"""`BatchNorm`: batch normalization as a layer, with parameters, running statistics and modes."""

import operator

import numpy as np

from bn_cy import functional
from bn_cy._layout import as_float_dtype, as_index, as_number, as_plain, as_real

__all__ = ["BatchNorm"]


def _entry(store, name, doc, check):
    """Return a property that reads and assigns an entry of one of the layer's dictionaries.

    What is stored is what `check` returns for the name, the new value and the current one.
    """

    def get(layer):
        return getattr(layer, store).get(name)

    def assign(layer, value):
        entries = getattr(layer, store)
        if name not in entries:
            raise AttributeError(f"this layer has no {name}")
        entries[name] = check(name, value, entries[name])

    return property(get, assign, doc=doc)


def _checked(name, check, doc):
    """Return a property that stores what `check` returns for a new value."""
    private = f"_{name}"
    return property(
        operator.attrgetter(private),
        lambda layer, value: setattr(layer, private, check(value)),
        doc=doc,
    )


def as_is(name, value, current):
    """Return the value."""
    return value


def copied(name, value, current):
    """Copy a value into the layer's own array and return that: no array is shared."""
    current[...] = fitted(name, value, current)
    return current


def fitted(name, value, current):
    """Return a value as an array that can take the place of the layer's own."""
    array = np.require(as_real(name, value), current.dtype, ["C", "W", "A"])
    if array.shape != current.shape:
        raise ValueError(f"{name} must have shape {current.shape}, got {array.shape}")
    if name == "running_var":
        functional._check_variance(name, array)
    return array


def checked_momentum(momentum):
    """Return a momentum from 0 to 1, or None."""
    if momentum is None:
        return None
    value = as_number("momentum", momentum)
    if not 0 <= value <= 1:
        raise ValueError(f"momentum must be from 0 to 1, got {momentum!r}")
    return value


def checked_tracked(value):
    """Return num_batches_tracked as an int."""
    array = as_real("num_batches_tracked", value)
    if array.size != 1 or not array.item() >= 0 or array.item() % 1 != 0:
        raise ValueError(f"num_batches_tracked must be one integer, 0 or more, got {value!r}")
    return int(array.item())


class BatchNorm:
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

    Attributes
    ----------
    params, grads : dict
        ``{"gamma": ..., "beta": ...}`` as far as present, for an optimizer: update the arrays
        of `params` in place. `grads` is filled by `backward`, None before.
    gamma, beta, dgamma, dbeta : array of shape (num_features,) or None
        The same, one by one.
    running_mean, running_var : float64 array of shape (num_features,) or None
        The running statistics. Always float64, whatever is assigned: a float32 mean of 1e6 would
        ruin eval.
    num_batches_tracked : int
        Training batches seen.
    training : bool
        The mode.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Notes
    -----
    S. Ioffe and C. Szegedy, *Batch Normalization*, 2015. Pickles and copies leave out the
    cached batch.

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
    ):
        self.num_features = as_index("num_features", num_features)
        if self.num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        functional._checked_eps(eps)
        self.eps = eps
        self.momentum = momentum
        self.unbiased = bool(unbiased)
        self.axis = as_index("axis", axis)
        self.dtype = as_float_dtype("dtype", dtype)
        self.relu = bool(relu)
        self.training = True
        self.params = {}
        if scale:
            self.params["gamma"] = np.ones(self.num_features, self.dtype)
        if shift:
            self.params["beta"] = np.zeros(self.num_features, self.dtype)
        self.grads = dict.fromkeys(self.params)
        self._running = {}
        if track_running_stats:
            self._running["running_mean"] = np.zeros(self.num_features)
            self._running["running_var"] = np.ones(self.num_features)
        self.num_batches_tracked = 0
        self._cache = None

    gamma = _entry("params", "gamma", "The scale, or None.", copied)
    beta = _entry("params", "beta", "The shift, or None.", copied)
    dgamma = _entry("grads", "gamma", "Gradient of the scale, or None.", as_is)
    dbeta = _entry("grads", "beta", "Gradient of the shift, or None.", as_is)
    running_mean = _entry("_running", "running_mean", "The running mean, or None.", copied)
    running_var = _entry("_running", "running_var", "The running variance, or None.", copied)
    momentum = _checked("momentum", checked_momentum, "Weight of the new batch, or None.")
    num_batches_tracked = _checked("num_batches_tracked", checked_tracked, "Batches seen.")

    @property
    def track_running_stats(self):
        """Whether there are running statistics."""
        return bool(self._running)

    def forward(self, x, *, out=None, residual=None):
        """Normalize a batch; in training, update the running statistics.

        Parameters
        ----------
        x : array of float32 or float64, with `num_features` features along `axis`
            The batch. It must not change before the backward.
        out : array of x's shape and dtype, optional
            Where to write the result. It may not share memory with `x`; it may be `residual`.
        residual : array of x's shape and dtype, optional
            Added to the result, before the ReLU if there is one: a skip connection.

        Returns
        -------
        array of x's shape and dtype
            The result; `out`, if given.

        Raises
        ------
        TypeError, ValueError
            As `batchnorm_forward`, and if the number of features does not fit. The layer is
            unchanged.
        """
        if type(x) is not np.ndarray:
            x = as_plain("x", x)
        self._check_features(x)
        gamma, beta = self.params.get("gamma"), self.params.get("beta")
        if not self._running:
            y, cache = functional.batchnorm_forward(
                x, gamma, beta, self.eps, axis=self.axis, out=out, relu=self.relu, residual=residual
            )
        elif self.training:
            y, cache = self._track(x, gamma, beta, out, residual)
        else:
            mean, var = self._running["running_mean"], self._running["running_var"]
            y, cache = functional.frozen_forward(
                x,
                mean,
                var,
                gamma,
                beta,
                self.eps,
                axis=self.axis,
                out=out,
                relu=self.relu,
                residual=residual,
            )
        self._cache = cache
        return y

    __call__ = forward

    def backward(self, dout, *, out=None):
        """Gradients of the last forward; those of the parameters go to `grads`.

        Parameters
        ----------
        dout : array of x's shape and dtype
            The gradient with respect to the forward's result.
        out : array of x's shape and dtype, optional
            Where to write `dx`. It may be `dout` itself.

        Returns
        -------
        dx : array of x's shape and dtype
            `out`, if given. After a forward in eval mode the statistics are constants:
            ``dx = gamma*invstd*dout``.
        dresidual : array of x's shape and dtype
            Only after a forward with a residual: its gradient.

        Raises
        ------
        RuntimeError
            If there was no forward.
        TypeError, ValueError
            As `batchnorm_backward`.
        """
        if self._cache is None:
            raise RuntimeError("backward needs a forward before it")
        dx, dgamma, dbeta, *dresidual = functional.batchnorm_backward(dout, self._cache, out=out)
        if dgamma is not None:
            self.grads["gamma"] = dgamma.astype(self.dtype, copy=False)
        if dbeta is not None:
            self.grads["beta"] = dbeta.astype(self.dtype, copy=False)
        return (dx, *dresidual) if dresidual else dx

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
        """
        self.training = bool(mode)
        return self

    def eval(self):
        """Switch to eval mode; return the layer itself."""
        return self.train(False)

    def reset_running_stats(self):
        """Set the running mean to 0, the running variance to 1 and the count of batches to 0."""
        self.num_batches_tracked = 0
        if self._running:
            self.running_mean[:] = 0
            self.running_var[:] = 1

    def state_dict(self):
        """Return copies of the parameters and running statistics under PyTorch's names.

        Returns
        -------
        dict
            ``weight``, ``bias``, ``running_mean``, ``running_var`` and ``num_batches_tracked``,
            as far as the layer has them.
        """
        state = {name: array.copy() for name, array in self._state_arrays().items()}
        if self.track_running_stats:
            state["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
        return state

    def load_state_dict(self, state):
        """Load what `state_dict` of this class or of ``torch.nn.BatchNorm*d`` gave: all or nothing.

        Parameters
        ----------
        state : mapping of str to array
            With exactly the keys of this layer's own `state_dict`.

        Raises
        ------
        KeyError
            If a key is missing or unknown.
        TypeError, ValueError
            If a value has another shape, or is not of real numbers, if a variance is negative, or
            if an array of the layer is read-only. The layer is unchanged.
        """
        arrays = self._state_arrays()
        expected = [*arrays, "num_batches_tracked"] if self.track_running_stats else list(arrays)
        if set(state) != set(expected):
            raise KeyError(f"state must have the keys {expected}, got {list(state)}")
        loaded = {name: fitted(name, state[name], array).copy() for name, array in arrays.items()}
        for name, array in arrays.items():
            if not array.flags.writeable:
                raise ValueError(f"{name} cannot be loaded: the layer's array is read-only")
        if self.track_running_stats:
            self.num_batches_tracked = state["num_batches_tracked"]
        for name, array in arrays.items():
            array[...] = loaded[name]

    def __getstate__(self):
        """Everything but the cached batch."""
        return {**self.__dict__, "_cache": None}

    def __repr__(self):
        """As the call that makes such a layer."""
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"scale={self.gamma is not None}, shift={self.beta is not None}, "
            f"track_running_stats={self.track_running_stats}, unbiased={self.unbiased}, "
            f"axis={self.axis}, dtype={self.dtype}, relu={self.relu})"
        )

    def _check_features(self, x):
        shape = x.shape
        try:
            fits = len(shape) < 2 or shape[self.axis] == self.num_features
        except IndexError:
            return  # refused where the dimensions are known to be wrong, with their range
        if not fits:
            raise ValueError(
                f"x must have {self.num_features} features along axis {self.axis}, "
                f"got shape {shape}"
            )

    def _track(self, x, gamma, beta, out, residual):
        """Normalize by the batch's statistics and take them into the running ones."""
        tracked = self._num_batches_tracked + 1
        momentum = 1 / tracked if self._momentum is None else self._momentum
        mean, var = self._running["running_mean"], self._running["running_var"]
        y, cache = functional._training_forward(
            x,
            mean,
            var,
            momentum,
            self.unbiased,
            gamma,
            beta,
            self.eps,
            self.axis,
            out,
            self.relu,
            residual,
        )
        if not cache.empty:
            self._num_batches_tracked = tracked
        return y, cache

    def _state_arrays(self):
        arrays = {
            "weight": self.gamma,
            "bias": self.beta,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
        }
        return {name: array for name, array in arrays.items() if array is not None}
