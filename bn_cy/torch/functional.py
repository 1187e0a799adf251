"""`batch_norm`: torch.nn.functional's batch norm on the loops of bn_cy."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import bn_cy
from bn_cy.torch import _arrays
from bn_cy.torch.operators import batch_norm_backward, traced

__all__ = ["batch_norm"]

FLOATS = (torch.float32, torch.float64)
ROWS = ("running_mean", "running_var", "weight", "bias")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize every channel, as ``torch.nn.functional.batch_norm`` does.

    Parameters
    ----------
    input : tensor of float32 or float64, shape (N, C) or (N, C, ...), on the CPU
        The batch. Its memory is used as it is if it has no gaps, in any memory format.
    running_mean, running_var : tensor of shape (C,), or None
        In training they take in the statistics of the batch, of which the variance is the unbiased
        one; else they normalize it.
    weight, bias : tensor of shape (C,), or None
        Scale and shift. Each may be float32 or float64, whatever the input is.
    training : bool, optional
        Whether the statistics of the batch normalize it.
    momentum : float, optional
        Weight of the batch in the running statistics.
    eps : float, optional
        Added to the variance; positive, or 0 if not in training.

    Returns
    -------
    tensor of the input's shape, dtype and memory format
        ``weight*(input - mean)/sqrt(var + eps) + bias``. It has first derivatives, no second ones,
        with respect to input, weight and bias.

    Raises
    ------
    TypeError
        If a tensor is not of float32 or float64.
    ValueError
        If a tensor is not on the CPU or has another number of channels, if there is one value per
        channel in training or no running statistics out of it, or if eps does not fit.

    Notes
    -----
    Under torch.compile and torch.export it is an operator, ``bn_cy::batch_norm``. The transforms of
    torch.func (grad, vmap, ...) are refused by a NotImplementedError.

    NaN and infinity are no error, and go into the running statistics, as in PyTorch.
    """
    check(input, running_mean, running_var, weight, bias, training, eps)
    settings = (running_mean, running_var, training, momentum, eps)
    if torch.compiler.is_compiling() or is_recorded(input):
        return traced(input, weight, bias, *settings)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "the batch norm of bn_cy.torch has no rules for the transforms of torch.func; that of "
            "torch.nn has them"
        )
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # there are no tangents
        return compute(input, weight, bias, *settings)[0]
    return BatchNormalization.apply(input, weight, bias, settings)  # type: ignore[no-untyped-call, no-any-return]


def compute(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, bn_cy.Cache]:
    """Return y and the cache, and update the running statistics."""
    if not training:
        return _arrays.forward(x, running_mean, running_var, weight, bias, eps)
    y, cache = _arrays.forward(x, None, None, weight, bias, eps)
    if running_mean is not None and running_var is not None and not cache.empty:
        _arrays.update_running(running_mean, running_var, cache, momentum)
    return y, cache


class BatchNormalization(torch.autograd.Function):
    """Batch norm with a `Cache` between its forward and its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: tuple[Any, ...],  # in one, as each argument of a Function takes its time
    ) -> Tensor:
        """Compute y."""
        y, cache = compute(x, weight, bias, *settings)
        ctx.statistics = (cache.mean, cache.var, settings[-1], math.isinf(cache.count))
        # PyTorch lets saved tensors go after the backward, and also in between where it computes
        # a forward again (torch.utils.checkpoint). What else a graph has lives as long as it. So
        # the cache, which holds the batch, goes with a saved tensor, as its attribute.
        carrier = torch.empty(0)
        carrier.cache = cache  # type: ignore[attr-defined]
        ctx.save_for_backward(x, weight, carrier)
        return y

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, weight and bias; by the operator where there is no cache.

        That is where hooks have put other tensors in the place of the saved ones. The operator also
        refuses to be differentiated, by name.
        """
        x, weight, carrier = ctx.saved_tensors
        cache = getattr(carrier, "cache", None)
        if cache is not None and not torch.is_grad_enabled():
            return *_arrays.backward(dout, cache), None
        mean, var, eps, frozen = ctx.statistics
        rows = torch.from_numpy(mean), torch.from_numpy(var)
        found = batch_norm_backward(dout, x, weight, *rows, eps, frozen)
        wanted = ctx.needs_input_grad
        return *(found[k] if wanted[k] else None for k in range(3)), None


def is_recorded(x: Tensor) -> bool:
    """Tell whether somebody needs operators to see the call: a special tensor, or a mode."""
    return type(x) is not Tensor or x.is_meta or torch._C._len_torch_dispatch_stack() > 0


def check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """Refuse what PyTorch refuses and what the kernels cannot take."""
    check_floats(input)
    channels = input.shape[1:2]
    for name, row in zip(ROWS, (running_mean, running_var, weight, bias), strict=True):
        if row is not None and (row.dtype not in FLOATS or row.shape != channels):
            raise unfit(name, row, input)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or both be None")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var must be given where training is False")
    if training and input.dim() > 1 and input.numel() == input.size(1) > 0:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}"
        )
    check_eps(eps, training)


def unfit(name: str, row: Tensor, input: Tensor) -> TypeError | ValueError:
    """Return the error of what is not one number for each channel."""
    if row.dtype not in FLOATS:
        return TypeError(f"{name} must be of torch.float32 or torch.float64, got {row.dtype}")
    if input.dim() < 2:
        return ValueError(f"input must have two dimensions or more, got {tuple(input.shape)}")
    return ValueError(
        f"{name} must have shape ({input.size(1)},), one for each channel of the input of shape "
        f"{tuple(input.shape)}, got {tuple(row.shape)}"
    )


def check_floats(input: Tensor) -> None:
    """Refuse what the kernels cannot take."""
    if input.dtype not in FLOATS:
        raise TypeError(f"input must be of torch.float32 or torch.float64, got {input.dtype}")
    if not (input.is_cpu or input.is_meta):  # a meta tensor is a shape alone, as is its result
        raise ValueError(f"input must be on the CPU, got {input.device}")


def check_eps(eps: float, training: bool) -> None:
    """Refuse what PyTorch refuses."""
    if training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
