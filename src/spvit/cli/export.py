"""`spvit export`: a model for another runtime, how far it is from the model, and what a lower precision costs."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from spvit.checkpoint import WEIGHTS
from spvit.cli.options import ExportCommand
from spvit.cli.show import right, say, speed_text
from spvit.errors import ExportError, SpvitError, first_line
from spvit.hosts.host import input_size
from spvit.models import ModelConfig, OpenedModel, open_model
from spvit.pages.contents import dense_model
from spvit.runtimes.export import Exported, export, fitting_images
from spvit.runtimes.quantize import CALIBRATION_IMAGES, HELD_OUT, answers
from spvit.runtimes.writers import SUFFIXES, session
from spvit.speed.benchmark import benchmark
from spvit.surgery import pruned_record
from spvit.train.data import UNREAD, Images, calibration, images_of, validation_loader
from spvit.train.run_folder import RunFolder
from spvit.train.sources import find_images

COMPARED = {"fp32": 64, "fp16": 500, "int8": 500}
"""Validation images that an exported file is compared on."""
APART = "model.export.safetensors"
"""Name of exported weights, beside those of the model itself."""


def export_command(options: ExportCommand, console: Console) -> None:
    """Write a model for another runtime, and say how far what was written is from it."""
    if options.int8 and options.fp16:
        raise ExportError("a file has one precision; give --int8 or --fp16")
    precision = "int8" if options.int8 else "fp16" if options.fp16 else "fp32"
    opened = open_model(options, code=True)
    folder = Path(options.model) if Path(options.model).is_dir() else Path()
    name = f"model{'' if precision == 'fp32' else f'.{precision}'}{SUFFIXES.get(options.to, f'.{options.to}')}"
    name = APART if name == WEIGHTS else name
    images: Images | None = None
    compared: dict[str, Any] = {}
    if options.data is not None:
        found = find_images(options.data, options.images)
        images = images_of(found, options.images, input_size(opened.model), opened.preprocessing)
        compared = _validation(images, opened, COMPARED[precision])
    settings: dict[str, Any] = {"preprocessing": opened.preprocessing, "with_preprocessing": options.with_preprocessing}
    settings |= {"opset": options.opset, "dynamic_size": options.dynamic_size}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{options.to} {precision}", total=None)
        more: dict[str, Any] = {"classes": opened.classes, "overwrite": options.overwrite, "precision": precision}
        if options.int8 and images is not None:
            count = min(CALIBRATION_IMAGES + HELD_OUT, len(images.views))  # type: ignore[arg-type]
            more |= {"calibration": torch.cat(list(calibration(images, 0, count)))}
        done = export(
            opened.model,
            options.output or folder / name,
            to=options.to,
            most_drop=options.most_drop,
            report=lambda step, steps: bar.update(task, completed=step, total=steps),
            **settings,
            **compared,
            **more,
        )
        if done.single is not None and compared:
            bar.update(task, description="comparing", total=None)
            _compare(done, options, opened, compared, settings, console)
    of = f"{done.images} validation images" if compared else f"{done.images} images of noise (see --data)"
    agrees = f"outputs differ by {done.difference:.1g} of the largest, agreement {done.agreement:.2%}, on {of}"
    sizes = "any height, width and batch size" if options.dynamic_size else "any batch size"
    about = f"{done.format}{'' if precision == 'fp32' else f' {precision}'}, {done.bytes / 1e6:.1f} MB, {sizes}"
    say(console, f"{done.path}: {about}", agrees, *_details(done))


def _validation(images: Images, opened: OpenedModel, count: int) -> dict[str, Any]:
    """Return the first validation images that can be read, and their labels where they are the model's classes."""
    found: list[tuple[Tensor, Tensor]] = []
    for batch, labels in validation_loader(images):
        found.append((batch[labels != UNREAD], labels[labels != UNREAD]))
        if sum(len(part) for part, _ in found) >= count:
            break
    compared = {"images": torch.cat([part for part, _ in found])[:count]}
    if opened.classes == images.classes:
        compared["labels"] = torch.cat([labels for _, labels in found])[:count]
    return compared


def _compare(
    done: Exported,
    options: ExportCommand,
    opened: OpenedModel,
    compared: dict[str, Any],
    settings: dict[str, Any],
    console: Console,
) -> None:
    """Print size, accuracy (or cosine) and latency beside the dense model and single precision."""
    pruned = pruned_record(opened.model) is not None
    with TemporaryDirectory() as folder:
        models: dict[str, nn.Module] = {f"{'pruned' if pruned else 'dense'} fp32": opened.model}
        if pruned:
            try:
                models = {"dense fp32": _dense(options)} | models
            except (SpvitError, TypeError) as error:
                say(console, f"the dense model is left out: {first_line(error)}")
        files = {name: Path(folder) / f"{name}.onnx" for name in models}
        try:
            rows = {name: export(model, files[name], **settings, **compared) for name, model in models.items()}
        except SpvitError as error:
            raise ExportError(f"the file is written, but there is nothing to compare it with: {error}") from error
        rows[f"{'pruned' if pruned else 'dense'} {done.precision}"] = done
        normalised = opened.preprocessing if options.with_preprocessing else None
        images = fitting_images(compared["images"], "images", input_size(opened.model), normalised)
        outputs = [answers(session(row.path), images).flatten(1) for row in rows.values()]
        latencies = [row.latency[0] for row in benchmark(*(row.path for row in rows.values()), batches=(1,))]
    first = next(iter(rows))
    kept = "accuracy" if "labels" in compared else f"cosine to {first}"
    table = Table("", *right("size", kept, "latency, batch 1", f"speed against {first}"))
    for (name, row), found, latency in zip(rows.items(), outputs, latencies):
        cosine = float(torch.cosine_similarity(found, outputs[0]).mean())
        cell = f"{cosine:.4f}" if row.accuracy is None else f"{row.accuracy:.2%}"
        speed = "" if name == first else speed_text(latency)
        time = f"{latency.latency_ms:.2f} ± {latency.spread_ms:.2f} ms"
        table.add_row(name, f"{row.bytes / 1e6:.1f} MB", cell, time, speed)
    threads = latencies[0].threads
    table.caption = (
        f"{done.images} validation images; onnxruntime on the CPU, {threads} thread{'s'[: threads != 1]}, in turns"
    )
    console.print(table)


def _dense(options: ExportCommand) -> nn.Module:
    """Return the dense model that a pruned one was made from. Raises SpvitError when it is not there."""
    run = RunFolder(options.model)
    if options.dense is not None:
        model = open_model(ModelConfig(model=options.dense)).model
        if pruned_record(model) is not None:
            raise ExportError(f"{options.dense} is pruned itself; name the dense model with --dense")
        return model
    _, settings = run.command_and_settings()
    if not settings:
        raise ExportError(f"{options.model} does not say what it was made from; name it with --dense")
    return dense_model(run, settings)


def _details(done: Exported) -> list[str]:
    """Return lines on what ONNX Runtime fuses, and on how int8 was found."""
    lines = []
    if done.quantised is not None:
        way, tried = done.quantised, done.quantised.agreement.values()
        strength = "off" if way.smoothing is None else way.smoothing
        spread = f"cosine {max(tried):.4f} on images held out; the worst of {len(tried)} ways {min(tried):.4f}"
        lines.append(f"int8: SmoothQuant {strength}, ranges by {way.calibration}: {spread}")
    if done.fusion is not None:
        parts = [("attention layers", done.fusion.attention), ("GELUs", done.fusion.gelu)]
        counts = [f"{fused} of {total} {name}" for name, (fused, total) in parts if total]
        apart = ", ".join(done.fusion.apart)
        hint = f"; as several: {apart}" if apart and done.fusion.attention[0] else ""
        hint = "; --opset 23 writes each as one" if apart and not done.fusion.attention[0] else hint
        lines += [f"ONNX Runtime runs as one operation: {', '.join(counts)}{hint}"] if counts else []
    return lines
