"""Takes a model out of PyTorch, and proves that what was written answers alike.

Formats: `onnx` (ONNX Runtime, TensorRT and others read it), `pt2` (a torch.export program, for ExecuTorch, AOTInductor
and coremltools), `openvino`, and `safetensors` (the folded weights alone). Each takes any batch size. What images need
(size, mean, std, interpolation, crop, class names) travels in the file.

Shapes: images [B, channels, height, width]; the output is [B, classes], or features [B, ...].
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from spvit.checkpoint import Preprocessing
from spvit.cost import count_params
from spvit.errors import ExportError, RunError, SpvitError, first_line, not_written
from spvit.hosts.family import Family
from spvit.hosts.host import Host, macs_of_image, outputs_of
from spvit.hosts.recognise import family_of
from spvit.runtimes.quantize import Fusion, Quantised, divided, fusion_of, halved, quantised
from spvit.runtimes.writers import (
    ANY_SIZE,
    BATCHES,
    METADATA,
    PACKAGES,
    SUFFIXES,
    WRITERS,
    Run,
    quiet,
    read_program,
    write_program,
)
from spvit.surgery import fold, pruned_record

OPSETS = range(18, 24)
DIFFERENCE, AGREEMENT = 1e-3, 0.999
"""Largest difference of outputs, relative to the largest output; least share of images with the same first guess, or
least cosine of features."""
MOST_DROP = {"fp16": 0.005, "int8": 0.01}
"""Largest drop of accuracy (or of the share of images with the same first guess, or of the cosine of features)."""
EXAMPLES, BATCH = 8, 5
"""Images that a program is traced and compared with where none are given; how many run at once when compared."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the model."""

    path: Path
    format: str
    bytes: int
    """Size of the file, weights beside it included."""
    difference: float
    """Largest difference of the outputs, relative to the largest of the model's."""
    agreement: float
    """Share of the images with the same first guess; of features, the mean cosine."""
    images: int
    """How many were compared."""
    accuracy: float | None = None
    """Share of the images whose class is the first guess; None without labels."""
    precision: str = "fp32"
    fusion: Fusion | None = None
    """What ONNX Runtime runs as one operation; of ONNX files."""
    single: Exported | None = None
    """Of lower precisions: the same program in single precision, whose file is not kept."""
    quantised: Quantised | None = None
    """Of int8: what was tried, and which way was taken."""


def export(
    model: nn.Module | Host,
    path: str | Path,
    *,
    to: str | None = None,
    precision: str = "fp32",
    images: Tensor | None = None,
    labels: Tensor | None = None,
    calibration: Tensor | None = None,
    most_drop: float | None = None,
    opset: int = 18,
    dynamic_size: bool = False,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    with_preprocessing: bool = False,
    overwrite: bool = False,
    report: Callable[[int, int], object] | None = None,
) -> Exported:
    """Write a dense, pruned or folded model for another runtime, run what was written, and compare.

    It is folded first if it was pruned; the model itself stays as it is.

    Args:
        model: any model that spvit takes or makes.
        path: the file to write.
        to: `onnx`, `pt2`, `openvino` or `safetensors`; None: by the ending of the path.
        precision: `fp32`; of ONNX also `fp16` (weights and arithmetic; input and output stay single precision) or
            `int8` (static, with smoothing and ranges searched; see docs/export.md).
        images: to compare with, normalised as in training, [images, channels, height, width]; None: noise.
        labels: class indices of these images, [images], for accuracy.
        calibration: training images for int8, other than `images`; 750 are enough, a quarter of which choose the way.
        most_drop: of accuracy, from single precision to a lower one; without labels of the share of images with the
            same first guess, and of features of the cosine. None: 0.01 for int8, 0.005 for fp16.
        opset: of ONNX, 18 to 23.
        dynamic_size: let height and width vary, where the model takes other sizes.
        preprocessing: what images need; travels in the file.
        classes: names of the classes, in the order of the logits; they travel in the file.
        with_preprocessing: put the normalisation into the program, which then takes values from 0 to 1.
        overwrite: replace a file that exists.
        report: called with (steps done, steps) while int8 is searched.

    Raises:
        ExportError: a package is missing, an operation is not supported, or what was written answers otherwise.
        RunError: a lower precision loses more than `most_drop`; the file is kept under another name. Or the file
            cannot be written.
        CalibrationError: the calibration images are too few, or lead to values that are not finite.
    """
    form = _form(path := Path(path), to, opset, overwrite)
    _check_precision(precision, form, images, calibration)
    family, model = (model.family, model.model) if isinstance(model, Host) else (family_of(model), model)
    if with_preprocessing and (preprocessing is None or form == "safetensors"):
        raise ExportError("with_preprocessing needs preprocessing, and a format that runs; pass preprocessing=")
    normalised = preprocessing if with_preprocessing else None
    plain = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    small = _Plain(plain if pruned_record(plain) is None else fold(plain, inplace=True), normalised)
    size = family.input_size(model)
    images = torch.rand(EXAMPLES, *size, generator=torch.Generator().manual_seed(0)) if images is None else images
    images = fitting_images(images, "images", size, normalised)
    seen = None
    if precision == "int8" and calibration is not None:
        seen = divided(fitting_images(calibration, "calibration", size, normalised))
    if labels is not None and labels.shape != (len(images),):
        raise ExportError(f"labels are {list(labels.shape)}, expected one for each image, [{len(images)}]")
    about = {"input_size": list(size), "normalised_inside": with_preprocessing, "classes": classes and list(classes)}
    about |= {"preprocessing": preprocessing and asdict(preprocessing), "precision": precision}
    about |= {"params": count_params(model)}
    with suppress(Exception):  # a model of a library may refuse to be counted
        about |= {"macs": macs_of_image(model)}
    options = {"opset": opset, "shapes": BATCHES, METADATA: json.dumps(about)}
    traced, others = images[[0, 0]], images[:0]
    if dynamic_size:
        traced, others = _other_sizes(small, images, family)
        options["shapes"] = ANY_SIZE
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        written = Path(folder) / path.name
        with quiet():
            try:
                run = WRITERS[form](small, traced, written, options)
            except Exception as error:  # whatever an exporter raises; all of it means that the model cannot be written
                raise _failed(error, form, path, small, traced, options["shapes"]) from error
            outputs, elsewhere = ((_answers(run, batch), _answers(small, batch)) for batch in (images, others))
        compared = partial(_figures, written, form, logits=family.classes(model) > 1)
        done = compared(*outputs, labels=labels)
        for figures in (done, *([compared(*elsewhere)] if dynamic_size else [])):
            _check_alike(figures, path)
        done = replace(done, path=path, fusion=fusion_of(written) if form == "onnx" else None)
        if precision != "fp32":
            program, way = read_program(written), None
            if seen is not None:
                way = quantised(program, *seen, report)
            run = write_program(halved(program) if way is None else way.program, written)
            lowered = compared(_answers(run, images), outputs[0], labels=labels)
            lowered = replace(lowered, precision=precision, fusion=fusion_of(written), single=done, quantised=way)
            _check_drop(lowered, path, MOST_DROP[precision] if most_drop is None else most_drop)
            done = replace(lowered, path=path)
        _move(written, path)
    return done


def fitting_images(images: Tensor, name: str, size: tuple[int, ...], normalised: Preprocessing | None) -> Tensor:
    """Return images as the program takes them. Raises ExportError when they are of another size, or none."""
    if not len(images) or images.shape[1:] != size:
        raise ExportError(f"{name} are {list(images.shape)}, expected [images, {', '.join(map(str, size))}]")
    images = images.cpu().float()
    return images if normalised is None else images * _channels(normalised.std) + _channels(normalised.mean)


def _check_precision(precision: str, form: str, images: Tensor | None, calibration: Tensor | None) -> None:
    """Raise ExportError for a precision that is not known, that the format does not have, or without images for it."""
    if precision not in ("fp32", *MOST_DROP):
        raise ExportError(f"precision is {precision!r}, expected fp32, {' or '.join(MOST_DROP)}")
    if precision != "fp32" and form != "onnx":
        raise ExportError(f"{precision} is for onnx, not for {form}; export to onnx, or leave it out")
    if precision == "int8" and (images is None or calibration is None):
        needed = "training images to calibrate on, calibration=, and others to compare on, images="
        raise ExportError(f"int8 needs {needed} (on the command line --data)")


def _other_sizes(model: nn.Module, images: Tensor, family: Family) -> tuple[Tensor, Tensor]:
    """Return images of noise of two other sizes than the model's own. Raises ExportError unless it takes both."""
    height, width = images.shape[2:]
    sides = [side // count for side, count in zip((height, width), family.sites[0].attention.grid)]
    sizes = [(height + 2 * sides[0], width + sides[1]), (height + sides[0], width + 3 * sides[1])]
    noise = [torch.rand(2, images.shape[1], *size, generator=torch.Generator().manual_seed(0)) for size in sizes]
    try:
        with torch.no_grad():
            model(noise[0]), model(noise[1])
    except Exception as error:  # whatever a model raises for images that it does not take
        advice = "leave out dynamic_size; a timm ViT takes other sizes if it was made with dynamic_img_size=True"
        raise ExportError(
            f"this model takes images of {height} x {width} alone ({first_line(error)}); {advice}"
        ) from error
    return noise[0], noise[1]


@torch.no_grad()
def _answers(run: Run, images: Tensor) -> Tensor:
    return torch.cat([run(batch) for batch in images.split(BATCH)]) if len(images) else images


def _form(path: Path, to: str | None, opset: int, overwrite: bool) -> str:
    """Return the format. Raises ExportError: it is not known, its packages are missing, or the file exists."""
    form = to or next((name for name, suffix in SUFFIXES.items() if suffix == path.suffix), path.suffix or "none")
    if form not in SUFFIXES:
        raise ExportError(f"format is {form!r}, expected {', '.join(SUFFIXES)} (or a path that ends so)")
    if path.suffix != SUFFIXES[form]:
        raise ExportError(f"{path} is to hold {form}, which ends in {SUFFIXES[form]}; name it so")
    if opset not in OPSETS:
        raise ExportError(f"opset is {opset}, expected {OPSETS[0]} to {OPSETS[-1]}")
    missing = [name for name in PACKAGES.get(form, ()) if importlib.util.find_spec(name) is None]
    if missing:
        extra = "openvino" if "openvino" in missing else "'spvit[export]'"
        raise ExportError(f"{form} needs {', '.join(missing)}; install with: pip install {extra}")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists already; name another file, or pass overwrite=True (--overwrite)")
    return form


def _failed(error: Exception, form: str, path: Path, model: _Plain, images: Tensor, shapes: Any) -> SpvitError:
    """Return the error that says why nothing was written: the disk, or the model."""
    if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno):  # without it of inspect
        return not_written(path, error)
    reason = "; ".join([*_reasons(error), *_places(error, model, images, shapes)])
    return ExportError(f"{type(model.model).__name__} cannot be exported to {form}: {reason}")


def _reasons(error: BaseException) -> list[str]:
    """Return the first lines of an error's innermost causes: exporters say there which operation it is, and where."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    lines = [first_line(part) for part in chain[:0:-1] or chain]
    return [line.partition(" with args ")[0] for line in lines[:2]]  # which fill a screen


def _places(error: BaseException, model: nn.Module, images: Tensor, shapes: Any) -> list[str]:
    """Return the part of a model that holds the operation which an error of torch.onnx names, if it names one."""
    with suppress(Exception):  # the program may be what cannot be made, of which the error says all
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
        nodes = [*program.graph.nodes, *program.run_decompositions().graph.nodes]  # the exporter keeps some whole
        named = re.findall(r"node %(\w+)", str(error.__cause__))
        stacks = [node.meta.get("nn_module_stack", {}) for node in nodes if node.name in named]
        paths = [list(stack.values())[-1][0].removeprefix("model.") for stack in stacks if stack]
        return [f"in {path or 'the model itself'}" for path in paths[:1]]
    return []


class _Plain(nn.Module):
    """A model that answers with one tensor; with preprocessing it normalises its images first."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing | None) -> None:
        super().__init__()
        self.model = model
        mean, std = ((), ()) if preprocessing is None else (preprocessing.mean, preprocessing.std)
        self.register_buffer("mean", _channels(mean) if mean else None)
        self.register_buffer("std", _channels(std) if std else None)

    mean: Tensor | None
    std: Tensor | None

    def forward(self, images: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            images = (images - self.mean) / self.std
        return outputs_of(self.model(images))[0]


def _channels(values: Sequence[float]) -> Tensor:
    """Return a value a channel, [1, channels, 1, 1]."""
    return torch.tensor(values).view(1, -1, 1, 1)


def bytes_of(path: Path) -> int:
    """Return the size of a file, with the weights beside it that ONNX and OpenVINO may keep there."""
    files = [path, Path(f"{path}.data"), *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    return sum(file.stat().st_size for file in files if file.exists())


def _figures(
    path: Path, form: str, found: Tensor, wanted: Tensor, *, logits: bool, labels: Tensor | None = None
) -> Exported:
    """Return how far outputs are from those wanted."""
    found = found.to(wanted)
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    if logits:
        agreement = float((found.argmax(1) == wanted.argmax(1)).float().mean())
    else:
        agreement = float(torch.cosine_similarity(found.flatten(1), wanted.flatten(1)).mean())
    accuracy = float((found.argmax(1) == labels).float().mean()) if labels is not None else None
    return Exported(path, form, bytes_of(path), difference, agreement, len(wanted), accuracy)


def _check_alike(done: Exported, path: Path) -> None:
    """Raise ExportError when what was written answers otherwise than the model; it is kept beside the path."""
    if not (done.difference <= DIFFERENCE and done.agreement >= AGREEMENT):
        raise ExportError(
            f"what was exported to {done.format} answers otherwise: outputs differ by {done.difference:.2g} of the "
            f"largest (allowed {DIFFERENCE:g}), agreement {done.agreement:.2%} (at least {AGREEMENT:.1%}); it is kept "
            f"as {_kept_aside(done.path, path)}"
        )


def _check_drop(done: Exported, path: Path, most_drop: float) -> None:
    """Raise RunError when a lower precision loses more than it may; it is kept beside the path."""
    single = cast(Exported, done.single)
    what, before, after = "agreement with single precision", 1.0, done.agreement
    if done.accuracy is not None and single.accuracy is not None:
        what, before, after = "accuracy", single.accuracy, done.accuracy
    if not before - after <= most_drop:
        way = "" if done.quantised is None else f", the best of {len(done.quantised.agreement)} ways"
        raise RunError(
            f"{done.precision} loses too much{way}: {what} {after:.2%} against {before:.2%} on {done.images} images "
            f"(allowed {most_drop:.2%} less), {done.bytes / 1e6:.1f} MB against {single.bytes / 1e6:.1f}; it is kept "
            f"as {_kept_aside(done.path, path)}"
        )


def _kept_aside(written: Path, path: Path) -> Path:
    """Move a file to another name than where it was to be. Returns the name."""
    aside = path.with_name(f"{path.stem}.differs{path.suffix}")
    _move(written, aside)
    return aside


def _move(written: Path, path: Path) -> None:
    """Move a file, with OpenVINO's weights beside it, as a whole."""
    if path.suffix == SUFFIXES["openvino"]:
        written.with_suffix(".bin").replace(path.with_suffix(".bin"))
    written.replace(path)
