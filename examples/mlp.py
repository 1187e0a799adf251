"""A multilayer perceptron in NumPy, short enough to read in one sitting.

A layer is any object with these members::

    forward(x) -> y        keeps what the backward pass needs
    backward(dout) -> dx   takes dl/dy, fills grads, returns dl/dx
    params, grads          arrays by name, the same names in both
    train(mode=True)       switches between training and evaluation

`bn_cy.BatchNorm` has all of them, so it stands in a network like the layers below.
Inputs are (examples, features); weights, inputs and gradients share one dtype.
"""

import numpy as np


class Layer:
    """A layer without parameters that does the same in training and in evaluation."""

    def __init__(self):
        self.params = {}
        self.grads = {}

    def train(self, mode=True):
        """Change nothing: only layers such as BatchNorm have two modes."""


class Linear(Layer):
    """y = x @ weight + bias, with Gaussian weights of standard deviation `std`.

    Before a BatchNorm use ``bias=False``: the normalization subtracts any constant,
    and beta takes the place of the bias.
    """

    def __init__(self, n_in, n_out, *, rng, std, bias=True, dtype=np.float32):
        super().__init__()
        self.params["weight"] = rng.normal(0.0, std, (n_in, n_out)).astype(dtype)
        if bias:
            self.params["bias"] = np.zeros(n_out, dtype)

    def forward(self, x):
        self._x = x
        y = x @ self.params["weight"]
        if "bias" in self.params:
            y += self.params["bias"]
        return y

    def backward(self, dout):
        self.grads["weight"] = self._x.T @ dout
        if "bias" in self.params:
            self.grads["bias"] = dout.sum(axis=0)
        return dout @ self.params["weight"].T


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x)), through tanh, which cannot overflow."""

    def forward(self, x):
        self._y = 0.5 * np.tanh(0.5 * x) + 0.5
        return self._y

    def backward(self, dout):
        return dout * self._y * (1.0 - self._y)


class ReLU(Layer):
    """y = max(x, 0)."""

    def forward(self, x):
        self._positive = x > 0
        return x * self._positive

    def backward(self, dout):
        return dout * self._positive


class SoftmaxCrossEntropy:
    """The mean over the batch of -log softmax(logits)[label]."""

    def forward(self, logits, labels):
        # softmax does not change when a constant is subtracted; the maximum keeps exp finite.
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        self._p, self._labels = np.exp(log_p), labels
        return -log_p[np.arange(len(labels)), labels].mean()

    def backward(self):
        """dl/dlogits = (softmax - one_hot(label)) / batch size."""
        dlogits = self._p.copy()
        dlogits[np.arange(len(dlogits)), self._labels] -= 1.0
        return dlogits / len(dlogits)


class MLP:
    """Layers one after the other."""

    def __init__(self, layers):
        self.layers = list(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dout):
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout

    def train(self, mode=True):
        for layer in self.layers:
            layer.train(mode)

    def eval(self):
        self.train(False)


class SGD:
    """Stochastic gradient descent with momentum: v = momentum*v - rate*grad, param += v."""

    def __init__(self, network, rate, momentum=0.9):
        self.layers, self.rate, self.momentum = network.layers, rate, momentum
        self._velocity = {
            (i, name): np.zeros_like(param)
            for i, layer in enumerate(self.layers)
            for name, param in layer.params.items()
        }

    def step(self):
        for (i, name), velocity in self._velocity.items():
            velocity *= self.momentum
            velocity -= self.rate * self.layers[i].grads[name]
            # In place: the layer and this optimizer hold the same array.
            param = self.layers[i].params[name]
            param += velocity


def train_step(network, loss, optimizer, x, labels):
    """One step on one mini-batch; returns its loss."""
    value = loss.forward(network.forward(x), labels)
    network.backward(loss.backward())
    optimizer.step()
    return value
