"""`replace`: the layers of bn_cy in a model that exists."""

from torch import nn

from bn_cy.torch.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["replace"]

OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def replace(model: nn.Module) -> nn.Module:
    """Have the batch norms of a model computed by bn_cy.

    Every ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` in it becomes a `BatchNorm1d`, `BatchNorm2d`
    or `BatchNorm3d` in place: it stays the same object and changes its class. So parameters,
    buffers, mode, hooks, and all references to it are what they were, and an optimizer goes on.
    Layers of bn_cy are left as they are.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or one batch norm. It is changed.

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
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, BatchNorm)
    ]
    for name, module in found:
        if type(module) not in OURS:
            raise TypeError(refusal(name, module))
    for _, module in found:
        module.__class__ = OURS[type(module)]
    return model


def refusal(name: str, module: nn.Module) -> str:
    """Return what to say of a batch norm that stays."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    place = f"model.{name}" if name else "model"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{place} is a {kind} that does not know its channels: run a batch through it first"
    return f"{place} is a {kind}, and only torch.nn.BatchNorm1d, 2d and 3d themselves are replaced"
