"""Batch norm as operators of PyTorch, for what records calls before it runs them.

torch.compile and torch.export see an operator's name, the shapes of its results and its derivative,
and not what is inside. An operator takes and returns tensors alone, so its backward has no `Cache`,
and uses `gradient_sums` and `input_gradient`. It costs more than a call of the functions: what runs
eagerly does without, see `functional.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor

import bn_cy
from bn_cy.torch import _arrays

__all__ = ["batch_norm", "batch_norm_backward", "traced", "track"]


@torch.library.custom_op("bn_cy::batch_norm", mutates_args=(), device_types="cpu")
def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and in float64 the mean and the variance that made it: the batch's for None."""
    y, cache = _arrays.forward(dense(x), mean, var, weight, bias, eps)
    return y, torch.from_numpy(cache.mean), torch.from_numpy(cache.var)


@torch.library.custom_op("bn_cy::batch_norm_backward", mutates_args=(), device_types="cpu")
def batch_norm_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, and in float64 dgamma and dbeta. Frozen statistics are constants."""
    count = math.inf if frozen else values_per_channel(x)
    return _arrays.gradients(dout, dense(x), weight, mean, var, eps, count)


@torch.library.custom_op(
    "bn_cy::track", mutates_args=("running_mean", "running_var"), device_types="cpu"
)
def track(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
) -> None:
    """Take the statistics of a batch into the running ones."""
    batch = bn_cy.Moments(count, mean.numpy(), var.numpy())
    _arrays.update_running(running_mean, running_var, batch, momentum)


@batch_norm.register_fake
def _(x, mean, var, weight, bias, eps):  # type: ignore[no-untyped-def]
    channels = x.size(1)
    row = x.new_empty(channels, dtype=torch.float64)
    return torch.empty_like(x), row, torch.empty_like(row)


@batch_norm_backward.register_fake
def _(dout, x, weight, mean, var, eps, frozen):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)


@track.register_fake
def _(running_mean, running_var, mean, var, count, momentum):  # type: ignore[no-untyped-def]
    return None


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what `batch_norm_backward` takes."""
    x, given, _, weight, _, ctx.eps = inputs
    ctx.frozen = given is not None
    ctx.save_for_backward(x, weight, *output[1:])


def differentiate(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Differentiate y; nothing depends on the gradients of the statistics."""
    x, weight, mean, var = ctx.saved_tensors
    found = batch_norm_backward(dout, x, weight, mean, var, ctx.eps, ctx.frozen)
    wanted = ctx.needs_input_grad
    dgamma, dbeta = (found[k] if wanted[k + 2] else None for k in (1, 2))
    return found[0], None, None, dgamma, dbeta, None


def refuse_second_derivative(ctx: Any, *_: Any) -> None:
    """Raise: nothing here is differentiated twice."""
    raise NotImplementedError(
        "the batch norm of bn_cy.torch has no second derivative; that of torch.nn has one"
    )


batch_norm.register_autograd(differentiate, setup_context=keep_for_backward)
batch_norm_backward.register_autograd(refuse_second_derivative)


def traced(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Compute `bn_cy.torch.batch_norm` by operators alone."""
    given = (None, None) if training else (running_mean, running_var)
    y: Tensor
    y, mean, var = batch_norm(x, *given, weight, bias, eps)
    if training and running_mean is not None and x.numel() > 0:
        count = values_per_channel(x)
        track(running_mean, running_var, mean.detach(), var.detach(), count, momentum)
    return y


def values_per_channel(x: Tensor) -> int:
    """Return how many values a mean is of."""
    count: int = x.numel() // max(x.size(1), 1)
    return count


def dense(x: Tensor) -> Tensor:
    """Return x, or a copy with the strides of ``torch.empty_like(x)``, which operators promise."""
    if x.stride() == torch.empty_like(x, device="meta").stride():
        return x
    return torch.empty_like(x).copy_(x)
