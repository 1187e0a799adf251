"""`SyncBatchNorm`: batch norm by the statistics of the batches of all processes, on CPUs.

The four verbs, and between them what the processes tell each other, C being the channels:

    moments(x)         all-gather of count, mean and variance, 2C + 4 numbers    normalize
    gradient_sums      all-gather of the sums, 2C + 1 numbers                    input_gradient

Each process combines what it has gathered in the order of the ranks, in float64. So all have the
same bits, and a run repeats bit for bit; an all-reduce may add up in any order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._compile import _disable_dynamo

import bn_cy
from bn_cy.torch._arrays import array_of, update_running
from bn_cy.torch.functional import check_eps, check_floats
from bn_cy.torch.modules import BatchNorm

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` whose statistics in training are those of the batches of all processes.

    In training every process of the group calls it at the same time, with a batch of any size: an
    empty one, too. The gradient of the input is that through the statistics of all; those of
    `weight` and `bias` are the process's own, as in PyTorch, and DistributedDataParallel averages
    them. In eval mode, in a group of one, and without a group no process waits for another.

    It runs over torch.distributed on CPUs (gloo), where ``torch.nn.SyncBatchNorm`` wants a GPU.
    (It is no subclass of that: DistributedDataParallel refuses one on a CPU.)

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats
        As in `BatchNorm`.
    process_group : torch.distributed.ProcessGroup, optional
        Whose batches count. By default those of all processes.
    device, dtype, bias
        As in `BatchNorm`.

    Raises
    ------
    TypeError, ValueError
        In the forward, as `BatchNorm`; if the inputs of the processes differ in dtype or in whether
        they require a gradient; or if there is one value per channel in all of them together. What
        is wrong in one process is raised in every one, with its rank in the group.
    NotImplementedError
        In a backward with ``create_graph=True``.

    Notes
    -----
    A process that does not call it, does not call the backward, or is in another mode lets the
    others wait until the group's timeout. torch.compile leaves it out of its graphs.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: Any = None,
        dtype: Any = None,
        **bias: bool,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **bias
        )
        self.process_group = process_group

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
    ) -> Tensor:
        if not self.training or not has_others(self.process_group):
            return super()._batch_norm(input, running_mean, running_var, training, momentum)
        return self._across(input, running_mean, running_var, momentum)

    @_disable_dynamo  # torch.compiler.disable, which would import the compiler here
    def _across(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
    ) -> Tensor:
        group = self.process_group

        def own_moments() -> list[Any]:
            if not isinstance(input, Tensor):
                raise TypeError(f"input must be a tensor, got {type(input).__name__}")
            check_floats(input)
            check_eps(self.eps, training=True)
            if input.dim() < 2 or input.size(1) != self.num_features:
                raise ValueError(
                    f"input must have {self.num_features} channels along dimension 1, got shape "
                    f"{tuple(input.shape)}"
                )
            needs_gradient = torch.is_grad_enabled() and input.requires_grad
            return [input.element_size(), needs_gradient, *bn_cy.moments(array_of(input))]

        rows = gathered(own_moments, 3 + 2 * self.num_features, group)
        check_agreement(rows[:, 0], rows[:, 1])
        means, variances = np.split(rows[:, 3:], 2, axis=1)
        parts = zip(rows[:, 2].astype(int).tolist(), means, variances, strict=True)
        batch = bn_cy.Moments.sum(bn_cy.Moments(*part) for part in parts)
        if batch.count == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got 1 in all processes"
            )
        if running_mean is not None and running_var is not None and batch.count > 0:
            update_running(running_mean, running_var, batch, momentum)
        arguments = (input, self.weight, self.bias, batch, self.eps, group)
        return Synchronized.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]


class Synchronized(torch.autograd.Function):
    """Normalize by the moments of all processes; gather the sums in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: bn_cy.Moments,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Return y."""
        ctx.batch, ctx.eps, ctx.group = batch, eps, group
        ctx.save_for_backward(x, weight)
        y = bn_cy.normalize(
            array_of(x), batch.mean, batch.var, array_of(weight), array_of(bias), eps
        )
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, through all processes, and of weight and bias, from here."""
        if torch.is_grad_enabled():
            raise NotImplementedError("bn_cy.torch.SyncBatchNorm has no second derivative")
        count, mean, var = ctx.batch
        wanted = ctx.needs_input_grad
        x = weight = None

        def own_sums() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            nonlocal x, weight
            x, weight = ctx.saved_tensors  # once, which is all that a checkpoint allows
            return bn_cy.gradient_sums(array_of(dout), array_of(x), mean, var, ctx.eps)

        if wanted[0]:
            rows = gathered(own_sums, 2 * len(mean), ctx.group)
            dbeta, dgamma = np.split(rows.sum(axis=0), 2)
            given = array_of(dout), array_of(x), mean, var, array_of(weight), ctx.eps
            dx = torch.from_numpy(bn_cy.input_gradient(*given, dbeta, dgamma, count))
            dbeta, dgamma = np.split(rows[dist.get_rank(ctx.group)], 2)
        else:
            dx, (dbeta, dgamma) = None, own_sums()
        return (
            dx,
            torch.from_numpy(dgamma) if wanted[1] else None,
            torch.from_numpy(dbeta) if wanted[2] else None,
            *(None, None, None),
        )


def has_others(group: dist.ProcessGroup | None) -> bool:
    """Tell whether a group has other processes than this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


# Between the processes


def gathered(
    own: Callable[[], Sequence[Any]], length: int, group: dist.ProcessGroup | None
) -> NDArray[np.float64]:
    """Return the `own()` of all processes as rows of numbers, in the order of the ranks.

    What `own` raises in one process is raised in all: none waits for another that has given up.
    """
    row, error = np.zeros(1 + length), None
    try:
        row[1:] = np.hstack(own())
    except Exception as raised:
        row[0], error = 1, raised
    rows = np.empty((dist.get_world_size(group), 1 + length))
    dist.all_gather(list(torch.from_numpy(rows)), torch.from_numpy(row), group=group)
    if rows[:, 0].any():
        raise_everywhere(error, group)
    return rows[:, 1:]


def raise_everywhere(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise the error of the first rank that has one."""
    kind = next((kind for kind in (TypeError, ValueError) if isinstance(error, kind)), RuntimeError)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, None if error is None else (kind, str(error)), group=group)
    rank, (kind, message) = next((k, it) for k, it in enumerate(found) if it is not None)
    raise kind(f"{message} (in rank {rank} of the group)") from error


def check_agreement(sizes: NDArray[np.float64], gradients: NDArray[np.float64]) -> None:
    """Refuse inputs that differ: the processes would wait for each other in the backward."""
    if (sizes != sizes[0]).any():
        dtypes = [f"float{8 * int(size)}" for size in sizes]
        raise TypeError(f"input must be of one dtype in all ranks, got {', '.join(dtypes)}")
    if (gradients != gradients[0]).any():
        ranks = np.flatnonzero(gradients).tolist()
        raise ValueError(f"input requires a gradient in the ranks {ranks} alone; it must in all")
