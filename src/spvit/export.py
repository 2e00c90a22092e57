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
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spvit.checkpoint import Preprocessing, plain_state, replace_atomically
from spvit.cost import count_params
from spvit.errors import ExportError
from spvit.hosts.host import Host, macs_of_image, outputs_of
from spvit.hosts.recognise import family_of
from spvit.surgery import fold, pruned_record

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml", "safetensors": ".safetensors"}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
"""What a format needs to be written and run, beside torch and safetensors."""
OPSETS = range(18, 24)
DIFFERENCE, AGREEMENT = 1e-3, 0.999
"""Largest difference of outputs, relative to the largest output; least share of images with the same first guess, or
least cosine of features."""
EXAMPLES, BATCH = 8, 5
"""Images that a program is traced and compared with where none are given; how many run at once when compared."""
METADATA = "spvit"
INPUT, OUTPUT = "images", "output"


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


def export(
    model: nn.Module | Host,
    path: str | Path,
    *,
    to: str | None = None,
    images: Tensor | None = None,
    opset: int = 18,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    with_preprocessing: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write a dense, pruned or folded model for another runtime, run what was written, and compare.

    It is written in single precision, and folded first if it was pruned; the model itself stays as it is.

    Args:
        model: any model that spvit takes or makes.
        path: the file to write.
        to: `onnx`, `pt2`, `openvino` or `safetensors`; None: by the ending of the path.
        images: to compare with, normalised as in training, [images, channels, height, width]; None: noise.
        opset: of ONNX, 18 to 23.
        preprocessing: what images need; travels in the file.
        classes: names of the classes, in the order of the logits; they travel in the file.
        with_preprocessing: put the normalisation into the program, which then takes values from 0 to 1.
        overwrite: replace a file that exists.

    Raises:
        ExportError: a package is missing, an operation is not supported, or what was written answers otherwise.
    """
    form = _form(path := Path(path), to, opset, overwrite)
    family, model = (model.family, model.model) if isinstance(model, Host) else (family_of(model), model)
    if with_preprocessing and (preprocessing is None or form == "safetensors"):
        raise ExportError("with_preprocessing needs preprocessing, and a format that runs; pass preprocessing=")
    small = _Plain(_deployed(model), preprocessing if with_preprocessing else None)
    size = family.input_size(model)
    if images is None:
        images = torch.rand(EXAMPLES, *size, generator=torch.Generator().manual_seed(0))
    if not len(images) or images.shape[1:] != size:
        raise ExportError(f"images are {list(images.shape)}, expected [images, {', '.join(map(str, size))}]")
    images = images.cpu().float()
    if with_preprocessing and preprocessing is not None:
        images = images * _channels(preprocessing.std) + _channels(preprocessing.mean)
    about = {"input_size": list(size), "normalised_inside": with_preprocessing, "classes": classes and list(classes)}
    about |= {"preprocessing": preprocessing and asdict(preprocessing)}
    about |= {"macs": macs_of_image(model), "params": count_params(model)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        try:
            run = WRITERS[form](small, images[[0, 0]], path, {"opset": opset, METADATA: json.dumps(about)})
        except Exception as error:  # whatever an exporter raises; all of it means that the model cannot be written
            reason = "; ".join(_reasons(error))
            raise ExportError(f"{type(model).__name__} cannot be exported to {form}: {reason}") from error
        found = torch.cat([run(batch) for batch in images.split(BATCH)])
    with torch.no_grad():
        wanted = torch.cat([small(batch) for batch in images.split(BATCH)])
    return _compared(path, form, found.to(wanted), wanted, family.classes(model) > 1)


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


def _reasons(error: BaseException) -> list[str]:
    """Return the first lines of an error's innermost causes: exporters say there which operation it is, and where."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return [next(iter(str(part).splitlines()), type(part).__name__) for part in chain[:0:-1] or chain][:2]


def _deployed(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU, in single precision and evaluation mode, folded if it was pruned."""
    copied = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    return copied if pruned_record(copied) is None else fold(copied, inplace=True)


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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' advice to their own programmers off the terminal."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


Run = Callable[[Tensor], Tensor]
"""Runs what was written on images."""
BATCHES = ({0: torch.export.Dim.DYNAMIC},)


def _write_onnx(model: nn.Module, images: Tensor, path: Path, options: dict[str, Any]) -> Run:
    import onnx
    import onnxruntime

    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=BATCHES,
        opset_version=options["opset"],
        input_names=[INPUT],
        output_names=[OUTPUT],
        optimize=True,
        verbose=False,
    )
    assert program is not None
    proto = onnx.shape_inference.infer_shapes(program.model_proto)
    onnx.helper.set_model_props(proto, {METADATA: options[METADATA]})
    replace_atomically(path, lambda temporary: onnx.save(proto, temporary))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {INPUT: batch.numpy()})[0])


def _write_pt2(model: nn.Module, images: Tensor, path: Path, options: dict[str, Any]) -> Run:
    program = torch.export.export(model, (images,), dynamic_shapes=BATCHES)
    extra = {METADATA: options[METADATA]}
    replace_atomically(path, lambda temporary: torch.export.save(program, temporary, extra_files=extra))
    loaded = torch.export.load(path).module()

    @torch.no_grad()
    def run(batch: Tensor) -> Tensor:
        out: Tensor = loaded(batch)
        return out

    return run


def _write_openvino(model: nn.Module, images: Tensor, path: Path, options: dict[str, Any]) -> Run:
    import openvino

    program = torch.export.export(model, (images,), dynamic_shapes=BATCHES)
    converted = openvino.convert_model(program)
    converted.set_rt_info(options[METADATA], METADATA)
    openvino.save_model(converted, path, compress_to_fp16=False)
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # bf16 where the CPU has it
    return lambda batch: torch.from_numpy(compiled(batch.numpy())[0])


def _write_safetensors(model: nn.Module, images: Tensor, path: Path, options: dict[str, Any]) -> Run:
    inner: Any = model.model
    metadata = {"format": "pt", METADATA: options[METADATA]}
    replace_atomically(path, lambda temporary: save_file(plain_state(inner), temporary, metadata=metadata))
    twin: Any = copy.deepcopy(model)
    with safe_open(path, "pt") as file:
        twin.model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return torch.no_grad()(twin)


def bytes_of(path: Path) -> int:
    """Return the size of a file, with the weights beside it that ONNX and OpenVINO may keep there."""
    files = [path, Path(f"{path}.data"), *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    return sum(file.stat().st_size for file in files if file.exists())


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path, dict[str, Any]], Run]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "openvino": _write_openvino,
    "safetensors": _write_safetensors,
}


def _compared(path: Path, form: str, found: Tensor, wanted: Tensor, logits: bool) -> Exported:
    """Return what was written. Raises ExportError when its outputs differ; the file stays, under another name."""
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    if logits:
        agreement = float((found.argmax(1) == wanted.argmax(1)).float().mean())
    else:
        agreement = float(torch.cosine_similarity(found.flatten(1), wanted.flatten(1)).mean())
    if not (difference <= DIFFERENCE and agreement >= AGREEMENT):
        aside = path.with_name(f"{path.stem}.differs{path.suffix}")
        path.rename(aside)
        raise ExportError(
            f"what was exported to {form} answers otherwise: outputs differ by {difference:.2g} of the largest "
            f"(allowed {DIFFERENCE:g}), agreement {agreement:.2%} (at least {AGREEMENT:.1%}); it is kept as {aside}"
        )
    return Exported(path, form, bytes_of(path), difference, agreement, len(wanted))
