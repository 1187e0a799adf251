"""A residual convolutional network in NumPy: the sibling of mlp.py, whose layers it shares.

Images are (examples, channels, height, width) with ``axis=1``, or (examples, height, width,
channels) with ``axis=-1``: `axis` is that of the channels, as in `bn_cy.BatchNorm`. All that
layers take and return is C-contiguous, so that no layer has to copy it.

A network is built with a batch norm of choice: ``batchnorm(features, axis=axis, relu=relu)``
returns a layer of mlp.py's kind that knows of a skip connection and of the ReLU after it::

    forward(x, residual=None) -> y   gamma*xhat + beta, then + residual, then the ReLU
    backward(dout) -> dx             or (dx, dresidual) after a forward with a residual

`bn_cy.BatchNorm` does that in one pass over memory. `Bias` does all but normalize.
"""

import itertools

import numpy as np
from mlp import MLP, Layer, Linear, ReLU


def image_axes(axis):
    """Return the axes of height and width."""
    return (2, 3) if axis == 1 else (1, 2)


def every(stride, axis):
    """Return the index of the pixels that a stride keeps."""
    kept = slice(None, None, stride)
    return np.s_[:, :, kept, kept] if axis == 1 else np.s_[:, kept, kept]


def gather(x, size, stride, axis):
    """Give every pixel that the stride keeps the channels of its size x size neighbours, too.

    Its channels are then (row, column, channel of x), the last the fastest. Neighbours beyond
    the border are 0.
    """
    image = image_axes(axis)
    margins = np.zeros((4, 2), int)
    margins[list(image)] = size // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, margins), (size, size), image)
    windows = windows[every(stride, axis)]  # a view of (padded x) + (size, size)
    if axis == 1:
        windows = windows.transpose(0, 4, 5, 1, 2, 3)
        return windows.reshape(len(x), -1, *windows.shape[4:])
    windows = windows.transpose(0, 1, 2, 4, 5, 3)
    return windows.reshape(*windows.shape[:3], -1)


def mix(x, matrix, axis):
    """Multiply the channels of every pixel by a matrix: channels @ matrix."""
    if axis == 1:
        n, channels, height, width = x.shape
        return (matrix.T @ x.reshape(n, channels, -1)).reshape(n, -1, height, width)
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def mix_gradient(x, dout, axis):
    """Return the gradient of the matrix of `mix`."""
    if axis == 1:
        n = len(x)
        x, dout = x.reshape(n, x.shape[1], -1), dout.reshape(n, dout.shape[1], -1)
        return (x @ dout.swapaxes(1, 2)).sum(axis=0)
    return x.reshape(-1, x.shape[-1]).T @ dout.reshape(-1, dout.shape[-1])


class Conv2d(Layer):
    """A convolution without bias around every `stride`-th pixel; `size` is odd::

        y[i, j, o] = sum over a, b, c of weight[a, b, c, o]
                     * x[stride*i + a - size//2, stride*j + b - size//2, c]

    where x is 0 beyond its border. It is `gather`, whose result is kept for the backward, and
    one matrix product. The weights are Gaussian with the deviation of He et al. (2015).
    """

    def __init__(self, n_in, n_out, *, rng, size=3, stride=1, axis=1, dtype=np.float32):
        super().__init__()
        self.size, self.stride, self.axis = size, stride, axis
        std = np.sqrt(2 / (size * size * n_in))
        self.params["weight"] = rng.normal(0.0, std, (size, size, n_in, n_out)).astype(dtype)

    def forward(self, x):
        weight = self.params["weight"]
        self._shape = x.shape
        self._gathered = gather(x, self.size, self.stride, self.axis)
        return mix(self._gathered, weight.reshape(-1, weight.shape[-1]), self.axis)

    def backward(self, dout):
        weight = self.params["weight"]
        self.grads["weight"] = mix_gradient(self._gathered, dout, self.axis).reshape(weight.shape)
        # A neighbour to the left sees this pixel to its right: dx is the convolution of dout with
        # the weights turned by half a circle, from the channels of y to those of x.
        turned = weight[::-1, ::-1].swapaxes(2, 3).reshape(-1, weight.shape[2])
        return mix(gather(self._put_apart(dout), self.size, 1, self.axis), turned, self.axis)

    def _put_apart(self, dout):
        """Put the pixels of dout where they were in x, and zeros where the stride left out one."""
        if self.stride == 1:
            return dout
        shape = list(self._shape)
        shape[self.axis] = dout.shape[self.axis]
        apart = np.zeros(shape, dout.dtype)
        apart[every(self.stride, self.axis)] = dout
        return apart


class GlobalAveragePool(Layer):
    """The mean of every channel over the pixels: from images to (examples, channels)."""

    def __init__(self, axis=1):
        super().__init__()
        self._image = image_axes(axis)

    def forward(self, x):
        self._shape = x.shape
        return x.mean(axis=self._image)

    def backward(self, dout):
        height, width = (self._shape[axis] for axis in self._image)
        dpixel = np.expand_dims(dout / (height * width), self._image)
        return np.broadcast_to(dpixel, self._shape).copy()


class Bias(Layer):
    """In the place of a batch norm: y = x + beta, then + residual, then the ReLU."""

    def __init__(self, features, *, axis=1, relu=False, dtype=np.float32):
        super().__init__()
        self.params["beta"] = np.zeros(features, dtype)
        self._per_channel = (features, 1, 1) if axis == 1 else (features,)
        self._others = (0, *image_axes(axis))
        self._relu = ReLU() if relu else MLP([])

    def forward(self, x, residual=None):
        self._added = residual is not None
        y = x + self.params["beta"].reshape(self._per_channel)
        if self._added:
            y += residual
        return self._relu.forward(y)

    def backward(self, dout):
        dout = self._relu.backward(dout)
        self.grads["beta"] = dout.sum(axis=self._others)
        return (dout, dout) if self._added else dout


class ResidualBlock:
    """Two convolutions, and a skip connection past them that is added before the last ReLU.

    The skip connection is the input itself or, where the number of channels or pixels changes,
    a 1x1 convolution of it with a batch norm (He et al., "Deep Residual Learning", 2016).
    """

    def __init__(self, n_in, n_out, batchnorm, *, rng, stride=1, axis=1, dtype=np.float32):
        kind = {"rng": rng, "axis": axis, "dtype": dtype}
        self.path = MLP(
            [
                Conv2d(n_in, n_out, stride=stride, **kind),
                batchnorm(n_out, axis=axis, relu=True),
                Conv2d(n_out, n_out, **kind),
            ]
        )
        self.skip = MLP([])  # the input as it is
        if stride != 1 or n_in != n_out:
            convolution = Conv2d(n_in, n_out, size=1, stride=stride, **kind)
            self.skip = MLP([convolution, batchnorm(n_out, axis=axis, relu=False)])
        self.join = batchnorm(n_out, axis=axis, relu=True)
        self.layers = [*self.path.layers, *self.skip.layers, self.join]

    def forward(self, x):
        return self.join.forward(self.path.forward(x), residual=self.skip.forward(x))

    def backward(self, dout):
        dpath, dskip = self.join.backward(dout)
        return self.path.backward(dpath) + self.skip.backward(dskip)


class CNN(MLP):
    """Layers and residual blocks one after the other.

    `layers` lists them without the blocks around them, as SGD and `train` want them.
    """

    def __init__(self, stages):
        self.stages = list(stages)
        super().__init__(
            layer for stage in self.stages for layer in getattr(stage, "layers", [stage])
        )

    def forward(self, x):
        for stage in self.stages:
            x = stage.forward(x)
        return x

    def backward(self, dout):
        for stage in reversed(self.stages):
            dout = stage.backward(dout)
        return dout


def build(batchnorm, widths=(16, 32), *, rng, channels=1, classes=10, axis=1, dtype=np.float32):
    """Build a network with a residual block for each of `widths`, which are numbers of channels.

    A block whose width is not the one before halves the image. The initial weights depend on
    `rng` alone, not on `batchnorm`.
    """
    kind = {"rng": rng, "axis": axis, "dtype": dtype}
    first = widths[0]
    stages = [Conv2d(channels, first, **kind), batchnorm(first, axis=axis, relu=True)]
    for n_in, n_out in itertools.pairwise([first, *widths]):
        stride = 1 if n_in == n_out else 2
        stages.append(ResidualBlock(n_in, n_out, batchnorm, stride=stride, **kind))
    head = Linear(widths[-1], classes, rng=rng, std=widths[-1] ** -0.5, dtype=dtype)
    return CNN([*stages, GlobalAveragePool(axis), head])
