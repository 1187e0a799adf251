"""The network of examples/mlp.py, three times, as what a worker serves.

With bn_cy's layer, with the staged NumPy formula in its place, and the same network in
PyTorch: the same initial weights, input and labels. Three hidden layers, as wide as the input.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import mlp

HIDDEN_LAYERS, CLASSES = 3, 10
RATE, MOMENTUM = 0.1, 0.9


class StagedBatchNorm(mlp.Layer):
    """Batch norm in training as written in NumPy: the staged formula, running statistics."""

    def __init__(self, features):
        super().__init__()
        from bn_cy import reference

        self._reference = reference
        self.params = {
            "gamma": np.ones(features, np.float32),
            "beta": np.zeros(features, np.float32),
        }
        self.running_mean, self.running_var = np.zeros(features), np.ones(features)

    def forward(self, x):
        n = len(x)
        y, self._cache = self._reference.staged_forward(x, *self.params.values(), 1e-5)
        mean, var = self._cache["mu"], self._cache["var"]
        self.running_mean += 0.1 * (mean - self.running_mean)
        self.running_var += 0.1 * (var * n / (n - 1) - self.running_var)
        return y

    def backward(self, dout):
        dx, self.grads["gamma"], self.grads["beta"] = self._reference.staged_backward(
            dout, self._cache
        )
        return dx


def bn_cy_layer(features):
    import bn_cy

    return bn_cy.BatchNorm(features)


def build(batchnorm, width):
    """Build the network of examples/mlp.py; its weights depend on `width` alone."""
    rng = np.random.default_rng(width)
    layers = []
    for _ in range(HIDDEN_LAYERS):
        layers.append(mlp.Linear(width, width, rng=rng, std=width**-0.5, bias=False))
        layers += [batchnorm(width), mlp.Sigmoid()]
    return mlp.MLP([*layers, mlp.Linear(width, CLASSES, rng=rng, std=width**-0.5)])


def labels_for(p):
    return np.random.default_rng(len(p.x)).integers(0, CLASSES, len(p.x))


class NumPyNetwork:
    """The network of examples/mlp.py with a batch norm layer of choice."""

    tolerance = None  # the losses are compared instead

    def __init__(self, batchnorm):
        batchnorm(1)  # is it installed?
        self.batchnorm = batchnorm

    def bind(self, p):
        network = build(self.batchnorm, p.case.features)
        loss, optimizer = mlp.SoftmaxCrossEntropy(), mlp.SGD(network, RATE, MOMENTUM)
        labels = labels_for(p)
        return {"step": lambda: mlp.train_step(network, loss, optimizer, p.x, labels)}


class TorchNetwork:
    """The same network in PyTorch, with autograd."""

    tolerance = None

    def __init__(self, threads):
        import torch

        torch.set_num_threads(threads)
        self.torch = torch

    def bind(self, p):
        nn, width = self.torch.nn, p.case.features
        hidden = [
            (nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.Sigmoid())
            for _ in range(HIDDEN_LAYERS)
        ]
        layers = [layer for block in hidden for layer in block]
        network = nn.Sequential(*layers, nn.Linear(width, CLASSES))
        self._copy_weights(network, build(StagedBatchNorm, width))
        optimizer = self.torch.optim.SGD(network.parameters(), RATE, MOMENTUM)
        x, labels = self.torch.from_numpy(p.x), self.torch.from_numpy(labels_for(p))
        loss_of = nn.CrossEntropyLoss()

        def step():
            optimizer.zero_grad()
            loss = loss_of(network(x), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return {"step": step}

    def _copy_weights(self, network, numpy_network):
        with self.torch.no_grad():
            for theirs, ours in zip(network, numpy_network.layers, strict=True):
                if isinstance(ours, mlp.Linear):
                    theirs.weight.copy_(self.torch.from_numpy(ours.params["weight"].T))
                    if "bias" in ours.params:
                        theirs.bias.copy_(self.torch.from_numpy(ours.params["bias"]))


NETWORKS = {
    "step bn_cy": lambda threads: NumPyNetwork(bn_cy_layer),
    "step numpy": lambda threads: NumPyNetwork(StagedBatchNorm),
    "step torch": TorchNetwork,
}
