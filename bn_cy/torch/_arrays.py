"""The functions of bn_cy on tensors: their memory as arrays, zero-copy both ways."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

import bn_cy
from bn_cy._running import take_in

__all__ = ["array_of", "backward", "forward", "gradients", "tensor_of", "update_running"]


def array_of(tensor: Tensor | None) -> Any:
    """Return the memory of a tensor as an array, whether or not it requires a gradient."""
    return None if tensor is None else tensor.detach().numpy()


def tensor_of(array: NDArray[Any] | None) -> Tensor | None:
    """Return a tensor of the memory of an array."""
    return None if array is None else torch.from_numpy(array)


def forward(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, bn_cy.Cache]:
    """Normalize by given statistics, or, where these are None, by those of the batch."""
    gamma, beta = array_of(weight), array_of(bias)
    if mean is None:
        y, cache = bn_cy.batchnorm_forward(array_of(x), gamma, beta, eps)
    else:
        y, cache = bn_cy.frozen_forward(
            array_of(x), array_of(mean), array_of(var), gamma, beta, eps
        )
    return torch.from_numpy(y), cache


def backward(dout: Tensor, cache: bn_cy.Cache) -> tuple[Tensor | None, ...]:
    """Return dx, dgamma and dbeta."""
    dx, dgamma, dbeta = bn_cy.batchnorm_backward(array_of(dout), cache)
    return tensor_of(dx), tensor_of(dgamma), tensor_of(dbeta)


def gradients(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    count: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dgamma and dbeta without a cache; the latter in float64."""
    given = array_of(dout), array_of(x), array_of(mean), array_of(var)
    dbeta, dgamma = bn_cy.gradient_sums(*given, eps)
    dx = bn_cy.input_gradient(*given, array_of(weight), eps, dbeta, dgamma, count)
    return torch.from_numpy(dx), torch.from_numpy(dgamma), torch.from_numpy(dbeta)


def update_running(
    running_mean: Tensor, running_var: Tensor, batch: bn_cy.Cache | bn_cy.Moments, momentum: float
) -> None:
    """Take a batch into the running statistics, as PyTorch does: with the unbiased variance.

    In float64, rounded once. What is too large for float32 becomes infinite, in silence.
    """
    correction = batch.count / (batch.count - 1)
    running = running_mean.numpy(), running_var.numpy()
    take_in(*running, batch.mean, batch.var, momentum, correction)
