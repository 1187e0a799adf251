"""The libraries that are timed: bn_cy and what it is held against.

A library is a class with

    __init__(threads)   imports it (ImportError: the library is named as absent)
    tolerance           largest relative L2 error of a float32 result before it counts as wrong
    bind(problem)       its verbs, by name: functions without arguments, ready to be timed
    results(verbs)      y, dx, dgamma and dbeta in the case's layout, as many as it computes

Tolerances: bn_cy must be right to 1e-6. The others sum in float32 and lose digits with the
number of rows: over a million rows NumPy is off by 2.5e-4, PyTorch and oneDNN by 9e-5. A wrong
formula is off by far more than the 1e-3 that they are allowed.
"""

import numpy as np
from onednn import OneDNN
from problem import aligned_empty
from streaming import Streaming

PEER_TOLERANCE = 1e-3
FEW = 32  # values of a feature


class BnCy:
    """The functions with fresh outputs."""

    tolerance = 1e-6

    def __init__(self, threads):
        import bn_cy

        bn_cy.set_num_threads(threads)
        self.bn_cy = bn_cy

    def bind(self, p):
        forward, backward = self.bn_cy.batchnorm_forward, self.bn_cy.batchnorm_backward
        x, dout, gamma, beta, eps, axis = p.x, p.dout, p.gamma, p.beta, p.eps, p.axis
        _, cache = forward(x, gamma, beta, eps, axis=axis)
        return {
            "forward": lambda: forward(x, gamma, beta, eps, axis=axis),
            "backward": lambda: backward(dout, cache),
        }

    def results(self, verbs):
        return verbs["forward"]()[0], *verbs["backward"]()


class BnCyOut(BnCy):
    """The functions with outputs given."""

    def bind(self, p):
        forward, backward = self.bn_cy.batchnorm_forward, self.bn_cy.batchnorm_backward
        x, dout, gamma, beta, eps, axis = p.x, p.dout, p.gamma, p.beta, p.eps, p.axis
        y, dx = (aligned_empty(x.shape, x.dtype) for _ in range(2))
        _, cache = forward(x, gamma, beta, eps, axis=axis, out=y)
        return {
            "forward": lambda: forward(x, gamma, beta, eps, axis=axis, out=y),
            "backward": lambda: backward(dout, cache, out=dx),
        }


class BnCyLayer(BnCy):
    """The layer's methods in training, with fresh outputs."""

    def bind(self, p):
        layer = self.bn_cy.BatchNorm(p.case.features, eps=p.eps, axis=p.axis, dtype=p.x.dtype)
        layer.gamma[...], layer.beta[...] = p.gamma, p.beta
        self.layer, x, dout = layer, p.x, p.dout
        layer.forward(x)
        return {"forward": lambda: layer.forward(x), "backward": lambda: layer.backward(dout)}

    def results(self, verbs):
        return verbs["forward"](), verbs["backward"](), self.layer.dgamma, self.layer.dbeta


class BnCyEval(BnCy):
    """Normalization with the batch's own statistics given, output given: eval's work."""

    def bind(self, p):
        normalize = self.bn_cy.normalize
        x, gamma, beta, eps, axis = p.x, p.gamma, p.beta, p.eps, p.axis
        _, mean, var = self.bn_cy.moments(x, axis=axis)
        y = aligned_empty(x.shape, x.dtype)
        return {"eval": lambda: normalize(x, mean, var, gamma, beta, eps, axis=axis, out=y)}

    def results(self, verbs):
        return (verbs["eval"](),)


class NumPy:
    """The staged formula as one writes it in NumPy."""

    tolerance = PEER_TOLERANCE

    def __init__(self, threads):
        from bn_cy import reference

        self.reference = reference

    def bind(self, p):
        staged_forward = self.reference.staged_forward
        staged_backward = self.reference.staged_backward
        x, dout, gamma, beta, eps, axis = p.x, p.dout, p.gamma, p.beta, p.eps, p.axis
        _, cache = staged_forward(x, gamma, beta, eps, axis=axis)
        return {
            "forward": lambda: staged_forward(x, gamma, beta, eps, axis=axis),
            "backward": lambda: staged_backward(dout, cache),
        }

    results = BnCy.results


class Torch:
    """PyTorch's own kernels, without autograd."""

    tolerance = PEER_TOLERANCE

    def __init__(self, threads):
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch

    def bind(self, p):
        forward = self.torch.native_batch_norm
        backward = self.torch.ops.aten.native_batch_norm_backward
        self.from_torch = _from_torch(p.case)
        x, dout = (_to_torch(self._tensor(a), p.case) for a in (p.x, p.dout))
        gamma, beta, eps = self._tensor(p.gamma), self._tensor(p.beta), p.eps
        _, mean, invstd = forward(x, gamma, beta, None, None, True, 0.1, eps)
        mask = [True, True, True]
        return {
            "forward": lambda: forward(x, gamma, beta, None, None, True, 0.1, eps),
            "backward": lambda: backward(dout, x, gamma, None, None, mean, invstd, True, eps, mask),
        }

    def results(self, verbs):
        y, (dx, dgamma, dbeta) = verbs["forward"]()[0], verbs["backward"]()
        return self.from_torch(y), self.from_torch(dx), dgamma.numpy(), dbeta.numpy()

    def _tensor(self, array):
        return self.torch.from_numpy(array)


def _to_torch(tensor, case):
    """View a case's memory as PyTorch's (examples, channels, ...)."""
    if case.layout == "nhwc":
        return tensor.permute(0, 3, 1, 2)  # strides of channels_last
    if case.layout == "axis0":
        # One example of features channels: faster than the view .t() and than a copy of it.
        return tensor.unsqueeze(0)
    return tensor


def _from_torch(case):
    if case.layout == "nhwc":
        return lambda tensor: tensor.permute(0, 2, 3, 1).numpy()
    return lambda tensor: tensor.numpy().reshape(case.shape)


class Jax:
    """Jitted forward and closed-form backward; the arrays stay on the device."""

    tolerance = PEER_TOLERANCE

    def __init__(self, threads):
        import jax

        self.jax = jax

    def bind(self, p):
        if p.x.dtype != np.float32:
            raise NotImplementedError("JAX computes in float32 unless told otherwise")
        forward, backward = _jax_functions(self.jax, p)
        x, dout, gamma, beta = (self.jax.device_put(a) for a in (p.x, p.dout, p.gamma, p.beta))
        wait = self.jax.block_until_ready
        _, mean, invstd = wait(forward(x, gamma, beta))
        return {
            "forward": lambda: wait(forward(x, gamma, beta)),
            "backward": lambda: wait(backward(dout, x, gamma, mean, invstd)),
        }

    def results(self, verbs):
        y, gradients = verbs["forward"]()[0], verbs["backward"]()
        return [np.asarray(array) for array in (y, *gradients)]


def _jax_functions(jax, p):
    jnp, eps = jax.numpy, p.eps
    others = tuple(i for i in range(p.x.ndim) if i != p.axis)
    along = [-1 if i == p.axis else 1 for i in range(p.x.ndim)]
    n = p.x.size // p.case.features

    @jax.jit
    def forward(x, gamma, beta):
        mean = x.mean(others, keepdims=True)
        if n < FEW:  # a feature's values may lie together by chance, and E[x^2] - E[x]^2 fails
            var = jnp.square(x - mean).mean(others, keepdims=True)
        else:  # as Flax does by default: less accurate, and up to three times faster
            var = jnp.maximum(0, jnp.square(x).mean(others, keepdims=True) - jnp.square(mean))
        invstd = jax.lax.rsqrt(var + eps)
        y = (x - mean) * (gamma.reshape(along) * invstd) + beta.reshape(along)
        return y, mean, invstd

    @jax.jit
    def backward(dout, x, gamma, mean, invstd):
        xhat = (x - mean) * invstd
        dbeta = dout.sum(others, keepdims=True)
        dgamma = (dout * xhat).sum(others, keepdims=True)
        dx = gamma.reshape(along) * invstd * (dout - dbeta / n - xhat * (dgamma / n))
        return dx, dgamma.ravel(), dbeta.ravel()

    return forward, backward


PEERS = {"numpy": NumPy, "torch": Torch, "jax": Jax, "onednn": OneDNN}
OURS = {"bn_cy": BnCy, "bn_cy out=": BnCyOut}
LIBRARIES = {
    **OURS,
    **PEERS,
    "bn_cy layer": BnCyLayer,
    "bn_cy eval": BnCyEval,
    "streaming": Streaming,
}

# Fresh outputs are compared with fresh outputs, given ones with given ones.
COUNTERPART = {"numpy": "bn_cy", "torch": "bn_cy", "jax": "bn_cy", "onednn": "bn_cy out="}
