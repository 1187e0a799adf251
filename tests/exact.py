"""Batch normalization in 80-bit arithmetic, and arrays of every memory layout, for the tests."""

import gc

import numpy as np
import pytest

if np.finfo(np.longdouble).nmant < 63:
    pytest.skip("the reference needs 80-bit long doubles", allow_module_level=True)

TOLERANCE = {np.dtype(np.float32): 5e-7, np.dtype(np.float64): 1e-14}

COMBINATIONS = [(True, True), (True, False), (False, True), (False, False)]


def per_feature(values, ndim, axis):
    """Reshape one value per feature so that it broadcasts along `axis` of `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(values, np.longdouble).reshape(shape)


def other_axes(ndim, axis):
    """Return every axis but the feature axis."""
    return tuple(i for i in range(ndim) if i != axis % ndim)


def statistics(x, axis=1):
    """Return (count, mean, var) of every feature, var divided by count."""
    x = np.asarray(x, np.longdouble)
    axes = other_axes(x.ndim, axis)
    mean = x.mean(axis=axes)
    var = ((x - per_feature(mean, x.ndim, axis)) ** 2).mean(axis=axes)
    return x.size // x.shape[axis], mean, var


def standardize(x, mean, var, eps=1e-5, axis=1):
    """Return xhat, and invstd shaped to broadcast with it."""
    x = np.asarray(x, np.longdouble)
    invstd = 1 / np.sqrt(per_feature(var, x.ndim, axis) + np.longdouble(eps))
    return (x - per_feature(mean, x.ndim, axis)) * invstd, invstd


def normalize(x, mean, var, gamma=None, beta=None, eps=1e-5, axis=1):
    """Return y = gamma*xhat + beta for given statistics."""
    y, _ = standardize(x, mean, var, eps, axis)
    if gamma is not None:
        y = y * per_feature(gamma, y.ndim, axis)
    if beta is not None:
        y = y + per_feature(beta, y.ndim, axis)
    return y


def forward(x, gamma=None, beta=None, eps=1e-5, axis=1):
    """Return y with the statistics of the batch."""
    _, mean, var = statistics(x, axis)
    return normalize(x, mean, var, gamma, beta, eps, axis)


def gradient_sums(dout, x, mean, var, eps=1e-5, axis=1):
    """Return sum(dout) and sum(dout*xhat) of every feature: dbeta and dgamma."""
    xhat, _ = standardize(x, mean, var, eps, axis)
    axes = other_axes(xhat.ndim, axis)
    dout = np.asarray(dout, np.longdouble)
    return dout.sum(axis=axes), (dout * xhat).sum(axis=axes)


def frozen_gradient(dout, x, var, gamma=None, eps=1e-5, axis=1):
    """Return gamma*invstd*dout: dx for frozen statistics, the measure of dx's error."""
    _, invstd = standardize(x, 0, var, eps, axis)
    if gamma is not None:
        invstd = invstd * per_feature(gamma, invstd.ndim, axis)
    return np.asarray(dout, np.longdouble) * invstd


def backward(dout, x, gamma=None, eps=1e-5, axis=1):
    """Return (dx, dgamma, dbeta) through the statistics of the batch."""
    count, mean, var = statistics(x, axis)
    dbeta, dgamma = gradient_sums(dout, x, mean, var, eps, axis)
    xhat, _ = standardize(x, mean, var, eps, axis)
    ndim = xhat.ndim
    centred = np.asarray(dout, np.longdouble) - per_feature(dbeta / count, ndim, axis)
    centred = centred - xhat * per_feature(dgamma / count, ndim, axis)
    return frozen_gradient(centred, x, var, gamma, eps, axis), dgamma, dbeta


def sum_scales(dout, x, mean, var, eps=1e-5, axis=1):
    """Return the roots of the summed squares of the terms of dbeta and of dgamma.

    It is the expected size of a sum of terms of random sign. An error is measured against it where
    a sum happens to be close to zero, which says nothing about the way it was computed.
    """
    xhat, _ = standardize(x, mean, var, eps, axis)
    return norm(dout), norm(xhat * dout)


def norm(values):
    """Return the Euclidean norm in extended precision."""
    return np.sqrt(np.sum(np.asarray(values, np.longdouble) ** 2))


def error(actual, expected, scale=0.0):
    """Return the L2 error relative to the norm of `expected`, or to `scale` where larger."""
    difference = norm(np.asarray(actual, np.longdouble) - expected)
    return float(difference / max(norm(expected), scale)) if difference else 0.0


def ordinary(rng, shape, axis=1, dtype=np.float32):
    """Return random data whose features have means and deviations of about one.

    Values alternate between both sides of the feature's centre, at least half a unit away, so that
    the deviation is not close to zero even for two rows, where a normal distribution's often is.
    """
    features = shape[axis]
    count = np.prod(shape, dtype=int) // features
    side = np.where(np.arange(count) % 2, 1.0, -1.0)
    values = side * (0.5 + np.abs(rng.standard_normal((features, count))))
    values += rng.standard_normal((features, 1))
    moved = np.moveaxis(np.empty(shape), axis, 0)
    x = np.moveaxis(rng.permuted(values, axis=1).reshape(moved.shape), 0, axis)
    return np.ascontiguousarray(x, dtype)


def parameters(rng, features, dtype=np.float32, scale=True, shift=True):
    """Return a random gamma and beta, None where they are absent."""
    gamma = rng.uniform(0.5, 2, features).astype(dtype) if scale else None
    beta = rng.standard_normal(features).astype(dtype) if shift else None
    return gamma, beta


def trained(rng, layer):
    """Give a layer random parameters, of both signs, and running statistics; return it."""
    features = layer.num_features
    for parameter in layer.params.values():
        parameter[:] = rng.uniform(0.5, 2, features) * rng.choice([-1, 1], features)
    layer.running_mean = rng.normal(0, 2, features)
    layer.running_var = rng.uniform(0.1, 3, features)
    return layer


def finite_differences(function, x, step=1e-3):
    """Return the gradient of a scalar function of a float64 array, by 4th-order differences."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        kept = x[index]
        values = []
        for k in (-2, -1, 1, 2):
            x[index] = kept + k * step
            values.append(function(x))
        x[index] = kept
        gradient[index] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    return gradient


def _strided(x):
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _reversed(x):
    return np.ascontiguousarray(x[::-1])[::-1]


def _channels_last(x):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def _shifted(x, offset):
    raw = np.zeros(offset + x.nbytes, np.uint8)
    shifted = raw[offset:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    return shifted


def _read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = {
    "c": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "channels_last": _channels_last,
    "strided": _strided,
    "reversed": _reversed,
    "sliced_rows": lambda x: np.repeat(x, 2, axis=0)[::2],
    "swapped_axes": lambda x: np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 0, -1)), 0, -1),
    "one_element_off": lambda x: _shifted(x, x.itemsize),
    "one_byte_off": lambda x: _shifted(x, 1),
    "read_only": _read_only,
}


def over(array, x):
    """Return an array of x's shape and dtype whose memory is that of a one-dimensional array."""
    strides = (0,) * (x.ndim - 1) + (x.itemsize,)
    assert x.shape[-1] * x.itemsize <= array.nbytes
    return np.lib.stride_tricks.as_strided(array.view(x.dtype), x.shape, strides)


def arrays_within(thing, seen=None):
    """Yield every array that a cache holds, however it is built."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type) or callable(thing):
        return
    seen.add(id(thing))
    if isinstance(thing, np.ndarray):
        yield thing
    for inner in gc.get_referents(thing):
        yield from arrays_within(inner, seen)


class Layer:
    """The running statistics and the modes of a batch norm layer, in 80-bit arithmetic."""

    def __init__(self, features, eps=1e-5, momentum=0.1, unbiased=True, axis=1):
        self.eps, self.momentum, self.unbiased, self.axis = eps, momentum, unbiased, axis
        self.running_mean = np.zeros(features, np.longdouble)
        self.running_var = np.ones(features, np.longdouble)
        self.num_batches_tracked = 0

    @property
    def running(self):
        """The running mean and variance."""
        return self.running_mean, self.running_var

    def forward(self, x, gamma=None, beta=None, training=True):
        """Return y, after a step of the running statistics in training."""
        if training:
            self._track(x)
            return forward(x, gamma, beta, self.eps, self.axis)
        return normalize(x, *self.running, gamma, beta, self.eps, self.axis)

    def backward(self, dout, x, gamma=None, training=True):
        """Return (dx, dgamma, dbeta), the statistics frozen when not in training."""
        if training:
            return backward(dout, x, gamma, self.eps, self.axis)
        dbeta, dgamma = gradient_sums(dout, x, *self.running, self.eps, self.axis)
        dx = frozen_gradient(dout, x, self.running_var, gamma, self.eps, self.axis)
        return dx, dgamma, dbeta

    def _track(self, x):
        n, mean, var = statistics(x, self.axis)
        self.num_batches_tracked += 1
        weight = np.longdouble(1) / self.num_batches_tracked
        if self.momentum is not None:
            weight = np.longdouble(self.momentum)
        if self.unbiased:
            var = var * n / (n - 1)
        self.running_mean = (1 - weight) * self.running_mean + weight * mean
        self.running_var = (1 - weight) * self.running_var + weight * var
