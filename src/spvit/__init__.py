"""spvit: turn a pre-trained vision transformer into a smaller, faster one of self-attention and convolution.

net = spvit.make_searchable(host)                  # gates; trains like any module
loss = task_loss + spvit.BudgetLoss(net, macs="50%")()
architecture = spvit.decide(net, macs="50%")       # frozen data
small = spvit.fold(spvit.prune(host, architecture, weights=net))
"""

from typing import Any

from spvit.architecture import Architecture, architectures
from spvit.checkpoint import load, save
from spvit.decide import decide
from spvit.errors import (
    ArchitectureError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    NotSearchableError,
    UnsupportedHostError,
)
from spvit.surgery import fold, gate_parameters, make_searchable, prune
from spvit.train.losses import BudgetLoss

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "ArchitectureError",
    "BudgetError",
    "BudgetLoss",
    "CalibrationError",
    "CheckpointError",
    "CompressConfig",
    "NotSearchableError",
    "UnsupportedHostError",
    "architectures",
    "compress",
    "create_model",
    "decide",
    "fold",
    "gate_parameters",
    "load",
    "make_searchable",
    "prune",
    "save",
]


def __getattr__(name: str) -> Any:
    # The loop brings Accelerate, which loads whatever model library is installed; importing spvit must load none.
    if name in ("CompressConfig", "compress"):
        from spvit.train import compress

        return getattr(compress, name)
    if name == "create_model":  # the zoo needs timm
        from spvit import zoo

        return zoo.create_model
    raise AttributeError(f"module 'spvit' has no attribute {name!r}")
