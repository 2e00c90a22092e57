"""The best weights that a phase has had, kept in the run folder so that a continued run still has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spvit.checkpoint import read_weights, write_text, write_weights

WEIGHTS = "best.safetensors"
FIGURES = "best.json"


class BestWeights:
    """Keeps the weights with the highest accuracy; of equals the later ones, which have been trained longer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def offer(self, epoch: int, accuracy: float, model: nn.Module) -> None:
        """Keep a model's weights if they are the best so far. Call it in one process."""
        best = self.figures()
        if best is not None and accuracy < best["accuracy"]:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_weights(model, self.folder / WEIGHTS)
        write_text(self.folder / FIGURES, json.dumps({"epoch": epoch, "accuracy": accuracy}))

    def figures(self) -> dict[str, Any] | None:
        """Return the epoch and accuracy of the best weights, or None when none are kept."""
        path = self.folder / FIGURES
        if not path.is_file():
            return None
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return figures

    def weights(self) -> dict[str, Tensor]:
        """Return the best weights. Raises CheckpointError when their file is missing or damaged."""
        return read_weights(self.folder / WEIGHTS)
