"""Batch norm of PyTorch models on the CPU by the kernels of bn_cy: its digits, and its bits.

    modules.py      BatchNorm and BatchNorm1d, 2d, 3d: torch.nn's but for the computation
    distributed.py  SyncBatchNorm: statistics of the batches of all processes of a group
    exchange.py     replace: the same for the layers of a model that exists
    functional.py   batch_norm, which they call: torch.nn.functional's
    operators.py    the same for what traces: torch.compile, torch.export, torch.func

Each uses those below it, and the functions of bn_cy.
"""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ModuleNotFoundError("bn_cy.torch needs torch: pip install torch", name="torch")

from bn_cy.torch.distributed import SyncBatchNorm
from bn_cy.torch.exchange import replace
from bn_cy.torch.functional import batch_norm
from bn_cy.torch.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "batch_norm",
    "replace",
]
