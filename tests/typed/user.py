"""What a user writes, as mypy and pyright must read it, both as strict as they can be.

Whatever carries an `ignore` must be refused: mypy complains of one that is not needed.
"""

from typing import assert_type

import numpy as np
from numpy.typing import NDArray

from bn_cy import (
    BatchNorm,
    Cache,
    MicroBatch,
    batchnorm_backward,
    batchnorm_forward,
    moments,
    normalize,
)

rng = np.random.default_rng()
x: NDArray[np.float32] = rng.standard_normal((32, 8)).astype(np.float32)
wide: NDArray[np.float64] = rng.standard_normal((32, 8))

layer = BatchNorm(8).train()
y = layer(x)
assert_type(y, NDArray[np.float32])
dx = layer.backward(2 * y)
for name, parameter in layer.params.items():
    parameter -= 0.1 * layer.grads[name]
layer.gamma *= 2
step = layer.grads["gamma"] * 0.1
assert_type(layer.eval()(wide), NDArray[np.float64])
assert_type(layer.freeze(), BatchNorm)

micro = MicroBatch(BatchNorm(8, ghost_batch_size=None))
ys = micro.forward([x, x[:3]], out=[np.empty_like(x), np.empty_like(x[:3])])
assert_type(ys, list[NDArray[np.float32]])
dxs = micro.backward([2 * y for y in ys])


class Scaled(BatchNorm):
    """A layer of one's own: its methods return it."""

    rate: float = 0.1


scaled = Scaled(8).train().eval()
print(scaled.rate)

result, cache = batchnorm_forward(x, layer.gamma, layer.beta, mask=np.ones(32, bool))
assert_type(result, NDArray[np.float32])
kept: Cache = cache
dx, dgamma, dbeta = batchnorm_backward(result, kept)
count, mean, var = moments(wide)
assert_type(normalize(wide, mean, var), NDArray[np.float64])
print(mean / np.sqrt(var), count + 1, cache.mean, cache.var, cache.count)


def refused() -> None:
    """Never called."""
    batchnorm_forward(np.arange(6).reshape(2, 3))  # type: ignore[type-var]  # pyright: ignore
    batchnorm_forward(np.ones((2, 3), np.complex64))  # type: ignore[type-var]  # pyright: ignore
    layer(np.ones((2, 3), np.float16))  # type: ignore[type-var]  # pyright: ignore
    moments(3.0)  # type: ignore[arg-type]  # pyright: ignore
    micro.forward(3.0)  # type: ignore[call-overload]  # pyright: ignore
    BatchNorm(8, ghost_batch_size=0.5)  # type: ignore[arg-type]  # pyright: ignore
    BatchNorm(8, on_nonfinite="ignore")  # type: ignore[arg-type]  # pyright: ignore
