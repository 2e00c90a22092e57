"""spvit: make a pre-trained vision transformer smaller and faster, to a budget.

Route B, without training: score what each replacement costs, choose within the budget, prune, repair.

    scores = spvit.score(host, images)                            # unlabelled images; once
    architecture = spvit.decide(host, macs="50%", scores=scores)  # frozen data; any number of budgets
    small = spvit.fold(spvit.prune(host, architecture, repair=images))

Route A, as published (SPViT, TPAMI 2024): gates on the replacements learn with the weights in a single path.

    net = spvit.make_searchable(host)                             # trains like the host
    loss = task_loss + spvit.BudgetLoss(net, macs="50%")()
    small = spvit.fold(spvit.prune(host, spvit.decide(net, macs="50%"), weights=net))

Rooms: hosts/ where the layers are; replacements/ what may stand there; repair/ route B; search/ route A; train/ one
loop, one run folder; cli/ the command.
"""

import importlib
from typing import Any

from spvit.architecture import Architecture
from spvit.checkpoint import Description, Preprocessing, describe, load, save
from spvit.decide import decide
from spvit.errors import (
    ArchitectureError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    ConstraintError,
    DataError,
    ExportError,
    GridError,
    HubError,
    ModelError,
    NotSearchableError,
    ReportError,
    RunError,
    RunFolderError,
    RunStoppedError,
    SpvitError,
    UnknownPartError,
    UnsupportedHostError,
    ZooError,
)
from spvit.hosts.declared import Sites
from spvit.hosts.host import Host, recognise
from spvit.hosts.recognise import register
from spvit.hosts.sites import Rows, UnitRows
from spvit.repair.constraints import Constraints
from spvit.repair.scores import Scores, score
from spvit.replacements.costs import cost
from spvit.runtimes.export import Exported, export
from spvit.search.budget_loss import BudgetLoss
from spvit.search.network import gate_parameters, make_searchable
from spvit.speed.benchmark import Benchmark, Latency, benchmark
from spvit.speed.latency import LatencyTable, measure
from spvit.surgery import fold, prune

__version__ = "0.1.0"

# These bring Accelerate or timm, which load model libraries; importing spvit must load none.
_LATER = {
    "spvit.pages.card": ("push",),
    "spvit.pages.page": ("report",),
    "spvit.train.compress": ("compress",),
    "spvit.train.frontier": ("frontier",),
    "spvit.train.data": ("Images", "transform"),
    "spvit.train.settings": ("CompressConfig", "FrontierConfig", "ImageConfig", "PhaseConfig", "SearchConfig"),
    "spvit.zoo": ("architectures", "create_model"),
}

__all__ = [
    "Architecture", "ArchitectureError", "Benchmark", "BudgetError", "BudgetLoss", "CalibrationError",
    "CheckpointError", "CompressConfig", "ConstraintError", "Constraints", "DataError", "Description",
    "ExportError", "Exported", "FrontierConfig", "GridError", "Host", "HubError", "ImageConfig", "Images",
    "Latency", "LatencyTable", "ModelError", "NotSearchableError", "PhaseConfig", "Preprocessing", "ReportError",
    "Rows", "RunError", "RunFolderError", "RunStoppedError", "Scores", "SearchConfig", "Sites", "SpvitError",
    "UnitRows", "UnknownPartError", "UnsupportedHostError", "ZooError", "architectures", "benchmark", "compress",
    "cost", "create_model", "decide", "describe", "export", "fold", "frontier", "gate_parameters", "load",
    "make_searchable", "measure", "prune", "push", "recognise", "register", "report", "save", "score", "transform",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'spvit' has no attribute {name!r}")
