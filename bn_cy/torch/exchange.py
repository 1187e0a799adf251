"""`replace`: the layers of bn_cy in a model that exists."""

import torch.distributed as dist
from torch import nn

from bn_cy.torch.distributed import SyncBatchNorm
from bn_cy.torch.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["replace"]

OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}


def replace(
    model: nn.Module, *, sync: bool = False, process_group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Have the batch norms of a model computed by bn_cy.

    Every ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` in it becomes a `BatchNorm1d`, `BatchNorm2d`
    or `BatchNorm3d` in place: it stays the same object and changes its class. So parameters,
    buffers, mode, hooks, and all references to it are what they were, and an optimizer goes on.
    A ``torch.nn.SyncBatchNorm`` becomes a `SyncBatchNorm` and keeps its group.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or one batch norm. It is changed.
    sync : bool, optional
        Whether all of them, those of bn_cy, too, become a `SyncBatchNorm`.
    process_group : torch.distributed.ProcessGroup, optional
        The group of those that become one by `sync`; by default all processes.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    TypeError
        If the model has another kind of batch norm, such as a lazy one that has seen no batch, or a
        subclass, which might compute something else. It is named; the model is unchanged.

    Examples
    --------
    >>> import torch, bn_cy.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> bn_cy.torch.replace(model)[1]
    BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    >>> isinstance(model[1], bn_cy.torch.BatchNorm)
    True
    """
    exchanges = [
        (module, class_for(name, module, sync))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    for module, ours in exchanges:
        if ours is SyncBatchNorm and not hasattr(module, "process_group"):
            module.process_group = process_group  # type: ignore[assignment]
        module.__class__ = ours
    return model


def class_for(name: str, module: nn.Module, sync: bool) -> type[BatchNorm]:
    """Return what a batch norm is to become; TypeError where that is not known."""
    kind = type(module)
    ours = OURS.get(kind, kind)
    if not issubclass(ours, BatchNorm):
        raise TypeError(refusal(name, module))
    return SyncBatchNorm if sync else ours


def refusal(name: str, module: nn.Module) -> str:
    """Return what to say of a batch norm that cannot be replaced."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    place = f"model.{name}" if name else "model"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{place} is a {kind} that does not know its channels: run a batch through it first"
    return f"{place} is a {kind}, and only the batch norms of torch.nn themselves are replaced"
