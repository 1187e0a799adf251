"""The networks of examples/mlp.py and examples/cnn.py, as what a worker serves: a training step.

Each with ReLUs, four times: with bn_cy's layer that does the ReLU and the skip connection in its
pass; with its bare layer and NumPy for these; with the staged NumPy formula and NumPy for these;
and in PyTorch. The same initial weights, input and labels.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cnn
import mlp

HIDDEN_LAYERS, CLASSES = 3, 10
RATE, MOMENTUM = 0.01, 0.9


class Followed(mlp.Layer):
    """A batch norm, and NumPy for a residual and a ReLU after it."""

    def __init__(self, batchnorm, relu):
        self._batchnorm = batchnorm
        self._relu = mlp.ReLU() if relu else mlp.MLP([])
        self.params, self.grads = batchnorm.params, batchnorm.grads

    def forward(self, x, residual=None):
        self._added = residual is not None
        y = self._batchnorm.forward(x)
        if self._added:
            y += residual
        return self._relu.forward(y)

    def backward(self, dout):
        dout = self._relu.backward(dout)
        dx = self._batchnorm.backward(dout)
        return (dx, dout) if self._added else dx

    def train(self, mode=True):
        self._batchnorm.train(mode)


class StagedBatchNorm(mlp.Layer):
    """Batch norm in training as written in NumPy: the staged formula, running statistics."""

    def __init__(self, features, axis):
        super().__init__()
        from bn_cy import reference

        self._reference, self._axis = reference, axis
        self.params = {
            "gamma": np.ones(features, np.float32),
            "beta": np.zeros(features, np.float32),
        }
        self.running_mean, self.running_var = np.zeros(features), np.ones(features)

    def forward(self, x):
        n = x.size // len(self.running_mean)
        y, self._cache = self._reference.staged_forward(
            x, *self.params.values(), 1e-5, axis=self._axis
        )
        mean, var = self._cache["mu"].ravel(), self._cache["var"].ravel()
        self.running_mean += 0.1 * (mean - self.running_mean)
        self.running_var += 0.1 * (var * n / (n - 1) - self.running_var)
        return y

    def backward(self, dout):
        dx, self.grads["gamma"], self.grads["beta"] = self._reference.staged_backward(
            dout, self._cache
        )
        return dx


def fused(features, *, axis=1, relu=False):
    import bn_cy

    return bn_cy.BatchNorm(features, axis=axis, relu=relu)


def bare(features, *, axis=1, relu=False):
    return Followed(fused(features, axis=axis), relu)


def staged(features, *, axis=1, relu=False):
    return Followed(StagedBatchNorm(features, axis), relu)


def build(batchnorm, case):
    """Build the network for a case; its weights depend on the case alone."""
    rng = np.random.default_rng(case.features)
    if case.layout != "rows":
        return cnn.build(batchnorm, rng=rng, channels=case.features, classes=CLASSES)
    width, layers = case.features, []
    for _ in range(HIDDEN_LAYERS):
        layers.append(mlp.Linear(width, width, rng=rng, std=width**-0.5, bias=False))
        layers.append(batchnorm(width, relu=True))
    return mlp.MLP([*layers, mlp.Linear(width, CLASSES, rng=rng, std=width**-0.5)])


def labels_for(p):
    return np.random.default_rng(len(p.x)).integers(0, CLASSES, len(p.x))


class NumPyNetwork:
    """A network of the examples with a batch norm layer of choice."""

    tolerance = None  # the losses are compared instead

    def __init__(self, batchnorm):
        batchnorm(1)  # is it installed?
        self.batchnorm = batchnorm

    def bind(self, p):
        network = build(self.batchnorm, p.case)
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
        ours = build(staged, p.case)
        network = self._network(ours, p.case)
        self._copy_weights(network, ours)
        optimizer = self.torch.optim.SGD(network.parameters(), RATE, MOMENTUM)
        x, labels = self.torch.from_numpy(p.x), self.torch.from_numpy(labels_for(p))
        loss_of = self.torch.nn.CrossEntropyLoss()

        def step():
            optimizer.zero_grad()
            loss = loss_of(network(x), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return {"step": step}

    def _network(self, ours, case):
        nn = self.torch.nn
        if case.layout != "rows":
            return nn.Sequential(*map(self._stage, ours.stages))
        width = case.features
        hidden = [
            (nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
            for _ in range(HIDDEN_LAYERS)
        ]
        layers = [layer for block in hidden for layer in block]
        return nn.Sequential(*layers, nn.Linear(width, CLASSES))

    def _stage(self, ours):
        """Translate a stage of examples/cnn.py."""
        nn = self.torch.nn
        if isinstance(ours, cnn.ResidualBlock):
            return self._block(ours)
        if isinstance(ours, cnn.Conv2d):
            size, _, n_in, n_out = ours.params["weight"].shape
            return nn.Conv2d(n_in, n_out, size, ours.stride, size // 2, bias=False)
        if isinstance(ours, mlp.Linear):
            return nn.Linear(*ours.params["weight"].shape)
        if isinstance(ours, cnn.GlobalAveragePool):
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        norm = nn.BatchNorm2d(len(ours.params["gamma"]))
        relu = isinstance(ours._relu, mlp.ReLU)
        return nn.Sequential(norm, nn.ReLU(inplace=True)) if relu else norm

    def _block(self, ours):
        nn = self.torch.nn

        class Block(nn.Module):
            def __init__(self, path, skip, norm):
                super().__init__()
                self.path, self.skip, self.norm = path, skip, norm

            def forward(self, x):
                return self.norm(self.path(x)).add_(self.skip(x)).relu_()

        path, skip = (
            nn.Sequential(*map(self._stage, part.layers)) for part in (ours.path, ours.skip)
        )
        return Block(path, skip, nn.BatchNorm2d(len(ours.join.params["gamma"])))

    def _copy_weights(self, network, ours):
        """Copy what is not at its initial value in both: the weights, in the order of layers."""
        nn = self.torch.nn
        theirs = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        weighted = [layer for layer in ours.layers if "weight" in layer.params]
        with self.torch.no_grad():
            for module, layer in zip(theirs, weighted, strict=True):
                weight = layer.params["weight"]
                to = (3, 2, 0, 1) if weight.ndim == 4 else (1, 0)
                module.weight.copy_(self.torch.from_numpy(weight.transpose(to)))
                if "bias" in layer.params:
                    module.bias.copy_(self.torch.from_numpy(layer.params["bias"]))


NETWORKS = {
    "step bn_cy": lambda threads: NumPyNetwork(fused),
    "step bn_cy, NumPy's ReLU": lambda threads: NumPyNetwork(bare),
    "step numpy": lambda threads: NumPyNetwork(staged),
    "step torch": TorchNetwork,
}
