"""What `why_it_works.py` measures, and the noise that it makes: small tools for networks of mlp.py.

All gradients are of one mini-batch and are laid out as one vector: the parameters of the layers in
their order. A probe leaves the network as it was.
"""

import contextlib

import numpy as np
from mlp import Layer


class Noise(Layer):
    """Noise that is never of mean 0 and variance 1, and another one at every step.

    y = scale*x + shift. At every step each unit draws a shift from -0.5 to 0.5 and a scale from 1
    to 1.25, and each example its own about these, in the manner of Santurkar and others. In
    evaluation there is none.
    """

    SHIFT, SCALE, SPREAD = 0.5, 1.25, 0.1

    def __init__(self, rng):
        super().__init__()
        self._rng, self._training = rng, True

    def train(self, mode=True):
        self._training = mode

    def forward(self, x):
        if not self._training:
            return x
        shift = self._rng.uniform(-self.SHIFT, self.SHIFT, x.shape[1])
        scale = self._rng.uniform(1, self.SCALE, x.shape[1])
        self._scale = (scale + self.SPREAD * self._rng.standard_normal(x.shape)).astype(x.dtype)
        shift = shift + self._rng.uniform(-self.SPREAD, self.SPREAD, x.shape)
        return self._scale * x + shift.astype(x.dtype)

    def backward(self, dout):
        return dout * self._scale


class Meter(Layer):
    """Nothing but a look at what passes: mean and deviation of every unit over the last batch."""

    def forward(self, x):
        self.mean, self.std = x.mean(axis=0), x.std(axis=0)
        return x

    def backward(self, dout):
        return dout


def slots(network):
    """Return every (layer, name) of a parameter, in order."""
    return [(layer, name) for layer in network.layers for name in layer.params]


def gradient(network, loss, x, labels):
    """Return the loss of a mini-batch and its gradient as one vector."""
    value = loss.forward(network.forward(x), labels)
    network.backward(loss.backward())
    return value, np.concatenate([layer.grads[name].ravel() for layer, name in slots(network)])


@contextlib.contextmanager
def moved(network, direction, *, below=None):
    """Add a vector to the parameters, or to those of the layers below one alone; take it back."""
    kept = [layer.params[name].copy() for layer, name in slots(network)]
    layers = network.layers if below is None else network.layers[:below]
    ends = np.cumsum([array.size for array in kept])
    for (layer, name), part in zip(slots(network), np.split(direction, ends[:-1]), strict=True):
        if any(layer is one for one in layers):
            layer.params[name] += part.reshape(layer.params[name].shape)
    try:
        yield
    finally:
        for (layer, name), array in zip(slots(network), kept, strict=True):
            layer.params[name][...] = array


def along_gradient(network, loss, x, labels, rates):
    """Look ahead along the gradient, as far as a step at each of the rates goes.

    Returns, for each place, the loss, how far the gradient there is from the one here, and the same
    divided by how far the place is.
    """
    _, here = gradient(network, loss, x, labels)
    losses, differences = np.empty((2, len(rates)))
    for i, rate in enumerate(rates):
        with moved(network, -rate * here):
            losses[i], there = gradient(network, loss, x, labels)
        differences[i] = np.linalg.norm(there - here)
    return losses, differences, differences / (rates * np.linalg.norm(here))


def covariate_shift(network, loss, x, labels, rate):
    """Compare the gradient of each weight before and after the layers below it make their step.

    Returns, for every weight matrix but the first, the cosine of the two gradients and their
    distance, relative to the length of the first: the internal covariate shift of Santurkar et al.
    """
    _, here = gradient(network, loss, x, labels)
    before = {i: layer.grads["weight"] for i, layer in weights(network)}
    cosines, distances = [], []
    for i, layer in weights(network)[1:]:
        with moved(network, -rate * here, below=i):
            gradient(network, loss, x, labels)
            after = layer.grads["weight"]
        lengths = np.linalg.norm(before[i]), np.linalg.norm(after)
        cosines.append(np.sum(before[i] * after) / (lengths[0] * lengths[1]))
        distances.append(np.linalg.norm(after - before[i]) / lengths[0])
    return np.array(cosines), np.array(distances)


def weights(network):
    """Return (index, layer) of every layer with a weight."""
    return [(i, layer) for i, layer in enumerate(network.layers) if "weight" in layer.params]
