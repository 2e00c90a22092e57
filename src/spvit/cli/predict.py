"""`spvit predict`: the most probable classes of image files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torchvision.datasets.folder import IMG_EXTENSIONS

from spvit.cli.options import PredictCommand
from spvit.cli.show import say
from spvit.errors import DataError, ModelError
from spvit.hosts.host import logits_of
from spvit.hosts.recognise import family_of
from spvit.models import open_model
from spvit.train.data import transform
from spvit.train.processes import processes

FEW = 16
"""Images that need no bar."""


@torch.inference_mode()
def predict_command(options: PredictCommand, console: Console) -> None:
    """Print the classes of every image that can be read. Raises DataError at the end when others cannot."""
    if options.top < 1:
        raise DataError(f"top is {options.top}, expected 1 or more")
    opened, device = open_model(options, code=True), processes().device
    model, count = opened.model.to(device).eval(), family_of(opened.model).classes(opened.model)
    if count < 2:
        advice = f'for its features see docs/backbones.md: spvit.load("{options.model}")(images)'
        raise ModelError(f"{options.model} has no classes to predict; {advice}")
    if not opened.trained:
        raise ModelError(f"{options.model} has no trained weights; name some with --checkpoint")
    classes, prepare = opened.classes or tuple(map(str, range(count))), transform(model, opened.preprocessing)
    paths = [path for name in options.files for path in _files(Path(name))]
    found: list[dict[str, Any]] = []
    problems = Console(stderr=True)
    for path in track(paths, "predict", console=problems, transient=True, disable=len(paths) <= FEW):
        try:
            logits = logits_of(model(prepare(path)[None].to(device)))
        except DataError as error:
            say(problems, f"spvit: {error}")
            continue
        best = logits[0].float().softmax(0).topk(min(options.top, count))
        pairs = [(classes[index], share) for share, index in zip(best.values.tolist(), best.indices.tolist())]
        found.append({"image": str(path), "classes": [{"class": name, "probability": share} for name, share in pairs]})
        if not options.json:
            say(console, f"{path}: {', '.join(f'{name} {share:.1%}' for name, share in pairs)}")
    if options.json:
        say(console, json.dumps(found, indent=2))
    if len(found) < len(paths):
        raise DataError(f"{len(paths) - len(found)} of {len(paths)} images could not be read")


def _files(path: Path) -> Iterator[Path]:
    """Yield a file, or all image files below a folder. Raises DataError where there are none."""
    inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
    if not inside and path.is_dir():
        raise DataError(f"folder {path} holds no image files ({', '.join(IMG_EXTENSIONS)})")
    yield from inside if path.is_dir() else [path]
