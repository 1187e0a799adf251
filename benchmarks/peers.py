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

import dataclasses

import numpy as np
from onednn import OneDNN
from problem import aligned_empty
from streaming import Streaming

PEER_TOLERANCE = 1e-3
FEW = 32  # values of a feature


def followed_by(p):
    """Return the arguments of bn_cy's functions for what follows the batch norm of a case."""
    return {"relu": True, "residual": p.residual} if p.case.after else {}


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
        after = followed_by(p)
        _, cache = forward(x, gamma, beta, eps, axis=axis, **after)
        return {
            "forward": lambda: forward(x, gamma, beta, eps, axis=axis, **after),
            "backward": lambda: backward(dout, cache),
        }

    def results(self, verbs):
        return verbs["forward"]()[0], *verbs["backward"]()


class BnCyOut(BnCy):
    """The functions with outputs given."""

    def bind(self, p):
        forward, backward = self.bn_cy.batchnorm_forward, self.bn_cy.batchnorm_backward
        x, dout, gamma, beta, eps, axis = p.x, p.dout, p.gamma, p.beta, p.eps, p.axis
        after = followed_by(p)
        y, dx = (aligned_empty(x.shape, x.dtype) for _ in range(2))
        _, cache = forward(x, gamma, beta, eps, axis=axis, out=y, **after)
        return {
            "forward": lambda: forward(x, gamma, beta, eps, axis=axis, out=y, **after),
            "backward": lambda: backward(dout, cache, out=dx),
        }


class BnCyBare(BnCyOut):
    """The same without what follows in the case: what the rest is held against."""

    tolerance = None

    def bind(self, p):
        return super().bind(dataclasses.replace(p, case=p.case.bare))


class BnCyThenNumPy(BnCy):
    """The functions with outputs given, and NumPy for what follows, in place where it can be."""

    def bind(self, p):
        forward, backward = self.bn_cy.batchnorm_forward, self.bn_cy.batchnorm_backward
        x, gamma, beta, eps, axis = p.x, p.gamma, p.beta, p.eps, p.axis
        y, dx, opened = (aligned_empty(x.shape, x.dtype) for _ in range(3))
        positive = aligned_empty(x.shape, np.bool_)
        _, cache = forward(x, gamma, beta, eps, axis=axis, out=y)

        def run_forward():
            forward(x, gamma, beta, eps, axis=axis, out=y)
            if p.case.adds:
                np.add(y, p.residual, out=y)
            return np.maximum(y, 0, out=y), cache

        def run_backward():
            np.greater(y, 0, out=positive)
            np.multiply(p.dout, positive, out=opened)
            gradients = backward(opened, cache, out=dx)
            return (*gradients, opened) if p.case.adds else gradients

        return {"forward": run_forward, "backward": run_backward}


class BnCyLayer(BnCy):
    """The layer's methods in training, with fresh outputs."""

    def bind(self, p):
        layer = self.bn_cy.BatchNorm(
            p.case.features, eps=p.eps, axis=p.axis, dtype=p.x.dtype, relu=bool(p.case.after)
        )
        layer.gamma[...], layer.beta[...] = p.gamma, p.beta
        self.layer, x, dout = layer, p.x, p.dout
        added = {"residual": p.residual} if p.case.adds else {}
        layer.forward(x, **added)
        cache = layer.cache  # which serves more than one backward where it is given
        return {
            "forward": lambda: layer.forward(x, **added),
            "backward": lambda: layer.backward(dout, cache=cache),
        }

    def results(self, verbs):
        y, gradients = verbs["forward"](), verbs["backward"]()
        dx, *dresidual = gradients if isinstance(gradients, tuple) else (gradients,)
        return y, dx, self.layer.dgamma, self.layer.dbeta, *dresidual


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
        if p.case.after:
            raise NotImplementedError("the staged formula is timed bare")
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

    def compiled(self, function):
        """Return a function ready to be timed; here as it is."""
        return function

    def bind(self, p):
        self.from_torch = _from_torch(p.case)
        forward, backward = map(self.compiled, self._functions(p.case, p.eps))
        x, dout = (_to_torch(self._tensor(a), p.case) for a in (p.x, p.dout))
        gamma, beta = self._tensor(p.gamma), self._tensor(p.beta)
        residual = _to_torch(self._tensor(p.residual), p.case) if p.case.adds else None
        y, mean, invstd = forward(x, gamma, beta, residual)
        return {
            "forward": lambda: forward(x, gamma, beta, residual),
            "backward": lambda: backward(dout, y, x, gamma, mean, invstd),
        }

    def _functions(self, case, eps):
        """Return forward and backward: batch norm, and in place what follows it."""
        normalize = self.torch.native_batch_norm
        gradients = self.torch.ops.aten.native_batch_norm_backward
        open_gate = self.torch.ops.aten.threshold_backward
        mask = [True, True, True]

        def forward(x, gamma, beta, residual):
            y, mean, invstd = normalize(x, gamma, beta, None, None, True, 0.1, eps)
            if case.adds:
                y.add_(residual)
            if case.after:
                y.relu_()
            return y, mean, invstd

        def backward(dout, y, x, gamma, mean, invstd):
            if case.after:
                dout = open_gate(dout, y, 0)
            of_bn = gradients(dout, x, gamma, None, None, mean, invstd, True, eps, mask)
            return (*of_bn, dout) if case.adds else of_bn

        return forward, backward

    def results(self, verbs):
        y, (dx, dgamma, dbeta, *dresidual) = verbs["forward"]()[0], verbs["backward"]()
        arrays = map(self.from_torch, (y, dx, *dresidual))
        y, dx, *dresidual = arrays
        return y, dx, dgamma.numpy(), dbeta.numpy(), *dresidual

    def _tensor(self, array):
        return self.torch.from_numpy(array)


class TorchCompiled(Torch):
    """The same functions through torch.compile, which fuses them to loops of its own."""

    def compiled(self, function):
        return self.torch.compile(function, dynamic=False)

    def bind(self, p):
        self.torch.compiler.reset()  # else it would give up after a few shapes
        return super().bind(p)


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
        arrays = (p.x, p.dout, p.gamma, p.beta, *([p.residual] if p.case.adds else []))
        x, dout, gamma, beta, *residual = map(self.jax.device_put, arrays)
        wait = self.jax.block_until_ready
        y, mean, invstd = wait(forward(x, gamma, beta, *residual))
        return {
            "forward": lambda: wait(forward(x, gamma, beta, *residual)),
            "backward": lambda: wait(backward(dout, y, x, gamma, mean, invstd)),
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
    def forward(x, gamma, beta, *residual):
        mean = x.mean(others, keepdims=True)
        if n < FEW:  # a feature's values may lie together by chance, and E[x^2] - E[x]^2 fails
            var = jnp.square(x - mean).mean(others, keepdims=True)
        else:  # as Flax does by default: less accurate, and up to three times faster
            var = jnp.maximum(0, jnp.square(x).mean(others, keepdims=True) - jnp.square(mean))
        invstd = jax.lax.rsqrt(var + eps)
        y = (x - mean) * (gamma.reshape(along) * invstd) + beta.reshape(along)
        if p.case.after:
            y = jnp.maximum(sum(residual, y), 0)
        return y, mean, invstd

    @jax.jit
    def backward(dout, y, x, gamma, mean, invstd):
        if p.case.after:
            dout = jnp.where(y > 0, dout, 0)
        xhat = (x - mean) * invstd
        dbeta = dout.sum(others, keepdims=True)
        dgamma = (dout * xhat).sum(others, keepdims=True)
        dx = gamma.reshape(along) * invstd * (dout - dbeta / n - xhat * (dgamma / n))
        return dx, dgamma.ravel(), dbeta.ravel(), *([dout] if p.case.adds else [])

    return forward, backward


PEERS = {"numpy": NumPy, "torch": Torch, "jax": Jax, "onednn": OneDNN}
OURS = {"bn_cy": BnCy, "bn_cy out=": BnCyOut}
LAYER = "bn_cy layer"
LIBRARIES = {
    **OURS,
    **PEERS,
    "bn_cy bare": BnCyBare,
    "bn_cy, then NumPy": BnCyThenNumPy,
    "torch.compile": TorchCompiled,
    LAYER: BnCyLayer,
    "bn_cy eval": BnCyEval,
    "streaming": Streaming,
}

# Fresh outputs are compared with fresh outputs, given ones with given ones.
COUNTERPART = {"numpy": "bn_cy", "torch": "bn_cy", "jax": "bn_cy", "onednn": "bn_cy out="}
