"""`BatchNorm` and its forms for 1, 2 and 3 dimensions: those of torch.nn but for the computation.

They inherit everything else: parameters, buffers, the keys of a state and its versions, repr.
"""

import torch
from torch import Tensor

from bn_cy.torch.functional import batch_norm

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

REFUSALS = (TypeError, ValueError, MemoryError, NotImplementedError)


class BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch norm of a PyTorch model on the CPU, for any number of dimensions after the channels.

    In all but the computation it is ``torch.nn.BatchNorm1d``, whose documentation holds for it:
    parameters, buffers, the keys of `state_dict`, defaults, modes. `BatchNorm1d`, `BatchNorm2d`
    and `BatchNorm3d` also refuse an input of other dimensions, and are instances of torch.nn's.

    Parameters
    ----------
    num_features : int
        Channels, along dimension 1.
    eps : float, optional
        Added to the variance.
    momentum : float or None, optional
        Weight of the new batch in the running statistics. None: all batches weigh alike.
    affine : bool, optional
        Whether there are a `weight` and a `bias`.
    track_running_stats : bool, optional
        False: no running statistics; eval normalizes by those of the batch, too.
    device, dtype, bias
        As in ``torch.nn.BatchNorm1d``.

    Raises
    ------
    TypeError, ValueError
        In the forward, as `batch_norm`.

    See Also
    --------
    replace : puts these layers into a model that exists.

    Examples
    --------
    >>> import torch, bn_cy.torch
    >>> layer = bn_cy.torch.BatchNorm(2)
    >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).shape
    torch.Size([2, 2])
    >>> layer.running_mean
    tensor([0.2000, 2.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a batch; in training, update the running statistics."""
        self._check_input_dim(input)
        running_mean, running_var = self.running_mean, self.running_var
        measured = self.training or (running_mean is None and running_var is None)
        if self.training and not self.track_running_stats:
            running_mean = running_var = None
        tracked = self.num_batches_tracked if self.training and self.track_running_stats else None
        if tracked is not None:
            # Before the statistics, as in torch.nn: when a checkpoint computes a forward again, it
            # ends by an exception as soon as all is saved, and the statistics are updated by then.
            tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 0.0 if tracked is None else 1.0 / float(tracked)
        try:
            return self._batch_norm(input, running_mean, running_var, measured, momentum)
        except REFUSALS:
            if tracked is not None:
                tracked.sub_(1)
            raise

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
    ) -> Tensor:
        return batch_norm(
            input, running_mean, running_var, self.weight, self.bias, training, momentum, self.eps
        )

    def _check_input_dim(self, input: Tensor) -> None:
        """Leave the dimensions to `batch_norm`, which takes two or more."""


class BatchNorm1d(torch.nn.BatchNorm1d, BatchNorm):
    """`BatchNorm` for inputs of shape (N, C) or (N, C, L)."""


class BatchNorm2d(torch.nn.BatchNorm2d, BatchNorm):
    """`BatchNorm` for inputs of shape (N, C, H, W)."""


class BatchNorm3d(torch.nn.BatchNorm3d, BatchNorm):
    """`BatchNorm` for inputs of shape (N, C, D, H, W)."""
