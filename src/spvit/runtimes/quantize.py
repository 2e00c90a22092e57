"""Makes an ONNX program int8 or half precision, and says what ONNX Runtime runs of it as one operation.

Int8 is static: what multiplies by weights (MatMul, Gemm, Conv) gets 8 bits for the values that it reads, one scale a
tensor, and for its weights, one scale an output channel. Norms, softmax, GELU, products of activations and additions
stay in floating point. Two things decide how much that costs, and neither is known beforehand:

- **Ranges**, from calibration images: the least and greatest value (minmax), all but a hundred-thousandth of the values
  (percentile), or those with the least divergence of the rounded values from the exact ones (entropy).
- **Smoothing** (SmoothQuant, Xiao et al. 2023): some channels of tokens are a hundred times larger than others. Channel
  j of a norm's output is divided by s_j, and the rows j of the weights that read it are multiplied by it, which changes
  nothing but the rounding: s_j = max|X_j|^a / max|W_j|^(1 - a), of strength a. The norm takes the division in, so
  nothing runs for it: a channel that reaches 64, with weights up to 1, gets s = 8 at strength 0.5.

All combinations are tried, and the one that agrees best on other images is taken.
"""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spvit.errors import CalibrationError
from spvit.runtimes.writers import INPUT, SCOPES, Program, keep_metadata, read_program, session

SMOOTHING = (None, 0.15, 0.5, 0.95)
CALIBRATION = ("minmax", "entropy", "percentile")
CALIBRATION_IMAGES, HELD_OUT = 500, 256
"""How many images are enough to find ranges, and at most to choose by; of fewer images the last quarter."""
QUANTISED = ("MatMul", "Gemm", "Conv")
PERCENTILE = 99.999
BINS, ENTROPY_BINS = 2048, 512
SMALL = 1e-5
BATCH = 8
"""Images that run at once: all that they lead to is held while they are looked at."""
CAST = "InsertedPrecisionFreeCast_"
"""What ONNX Runtime puts before the name of a value in half precision that it makes in single."""
ATTENTION, GELU = ("Attention", "MultiHeadAttention"), ("Gelu", "BiasGelu", "FastGelu", "QuickGelu")

Range = tuple[float, float]


@dataclass(frozen=True)
class Quantised:
    """An int8 program, and how it was found."""

    program: Program
    smoothing: float | None
    """Strength of SmoothQuant; None: off."""
    calibration: str
    agreement: dict[tuple[float | None, str], float]
    """Of every combination tried: cosine of its outputs to those in single precision, on images held out."""


@dataclass(frozen=True)
class Fusion:
    """What ONNX Runtime's optimised graph runs as one operation, of how many: on the CPU."""

    attention: tuple[int, int]
    gelu: tuple[int, int]
    apart: tuple[str, ...]
    """Names of the attention layers that run as several operations."""


def answers(opened: Any, images: Tensor) -> Tensor:
    """Return what a session answers on images of any number."""
    return torch.cat([torch.from_numpy(opened.run(None, {INPUT: batch.numpy()})[0]) for batch in images.split(BATCH)])


def halved(program: Program) -> Program:
    """Return a program in half precision whose input and output stay in single precision."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(program, keep_io_types=True)


def divided(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the calibration images that give the ranges, and those that choose the way: a quarter, at most 256.

    Raises CalibrationError when there are too few, and warns when more would give steadier ranges.
    """
    kept = min(HELD_OUT, len(images) // 4)
    if not kept:
        raise CalibrationError(f"int8 got {len(images)} calibration images, expected 4 or more, better 750")
    if len(images) - kept < CALIBRATION_IMAGES:
        advice = f"{CALIBRATION_IMAGES} or more give steadier ranges"
        logging.getLogger("spvit").warning("int8 takes its ranges from %d images; %s", len(images) - kept, advice)
    return images[:-kept], images[-kept:]


def quantised(
    program: Program, seen: Tensor, held_out: Tensor, report: Callable[[int, int], object] | None = None
) -> Quantised:
    """Return an int8 program of a single-precision one: of all ways to make it, the one that agrees best.

    Args:
        program: as ONNX; it stays as it is.
        seen: training images, normalised as in training, that give the ranges.
        held_out: others that choose the way.
        report: called with (steps done, steps).

    Raises:
        CalibrationError: values are not finite on the images.
    """
    ways = list(product(SMOOTHING, CALIBRATION))
    total = 2 * -(-len(seen) // BATCH) + len(ways)
    numbers = iter(range(1, total + 1))

    def step() -> None:
        if report is not None:
            report(next(numbers), total)

    read = _read(program)
    limits = _limits(_values(program, seen, read, step), read)
    scales = {strength: _scales(program, limits, strength) for strength in SMOOTHING if strength is not None}
    histograms = _histograms(_values(program, seen, read, step), limits, scales)
    wanted = answers(session(program), held_out).flatten(1)
    reach = functools.cache(lambda key, calibration: _range(histograms[key], calibration))
    best, agreement = None, {}
    for strength, calibration in ways:
        own = {} if strength is None else scales[strength]
        ranges = {name: reach((name, strength if name in own else None), calibration) for name in read}
        candidate = _with_ranges(_smoothed(program, own), ranges)
        found = answers(session(candidate), held_out).flatten(1)
        agreement[strength, calibration] = float(torch.cosine_similarity(found, wanted).mean())
        if agreement[strength, calibration] == max(agreement.values()):
            best = Quantised(candidate, strength, calibration, agreement)
        step()
    assert best is not None
    return best


def fusion_of(path: Path) -> Fusion:
    """Return what ONNX Runtime fuses of a file: attention where a softmax is left runs as several operations.

    A softmax that the CPU lacks, as in half precision, is left as its parts, of which the last makes the same value.
    """
    import onnxruntime

    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        optimised = str(Path(folder) / "optimised.onnx")
        session(path, optimized_model_filepath=optimised, graph_optimization_level=level)
        nodes = read_program(Path(optimised)).graph.node
    counts = Counter(node.op_type for node in nodes)
    left = {name.removeprefix(CAST) for node in nodes for name in (node.name, *node.output)}
    softmaxes = [node for node in read_program(path).graph.node if node.op_type == "Softmax"]
    apart = tuple(_place(node) or node.name for node in softmaxes if not left.isdisjoint((node.name, node.output[0])))
    fused, gelus = (sum(counts[name] for name in names) for names in (ATTENTION, GELU))
    return Fusion((fused, fused + len(apart)), (gelus, gelus + counts["Erf"]), apart)


def _place(node: Any) -> str:
    """Return the module that an operation is from, as the exporter notes it."""
    scopes = next((item.value for item in node.metadata_props if item.key == SCOPES), "")
    names = [name for name in scopes.strip("[]").replace("'", "").split(", ") if name.startswith("model.")]
    return names[-1].removeprefix("model.") if names else ""


def _weighted(program: Program) -> list[Any]:
    """Return the operations that multiply by weights."""
    weights = {item.name for item in program.graph.initializer}
    return [node for node in program.graph.node if node.op_type in QUANTISED and node.input[1] in weights]


def _read(program: Program) -> list[str]:
    """Return the tensors that get 8 bits: what weighted operations read, and what convolutions return."""
    nodes = _weighted(program)
    names = [node.input[0] for node in nodes] + [node.output[0] for node in nodes if node.op_type == "Conv"]
    return list(dict.fromkeys(names))


def _values(
    program: Program, images: Tensor, names: list[str], step: Callable[[], None]
) -> Iterator[dict[str, Tensor]]:
    """Yield the values of tensors by name, a few images at a time."""
    import onnx

    probe = copy.deepcopy(program)
    last = program.graph.output[0].name
    inner = [name for name in names if name not in (INPUT, last)]
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in inner)
    opened = session(probe)
    for batch in images.split(BATCH):
        found = opened.run([last, *inner], {INPUT: batch.numpy()})
        yield {INPUT: batch} | {name: torch.from_numpy(value) for name, value in zip([last, *inner], found)}
        step()


def _limits(passes: Iterator[dict[str, Tensor]], names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the least and greatest value of tensors, for each place in their last dimension."""
    limits: dict[str, tuple[Tensor, Tensor]] = {}
    for values in passes:
        for name in names:
            flat = values[name].flatten(0, -2)
            low, high = flat.amin(0), flat.amax(0)
            before = limits.get(name, (low, high))
            limits[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])
    for name, (low, high) in limits.items():
        if not (low.isfinite().all() and high.isfinite().all()):
            raise CalibrationError(f"{name} is not finite on the calibration images; check them and the model")
    return limits


def _scales(program: Program, limits: Mapping[str, tuple[Tensor, Tensor]], strength: float) -> dict[str, Tensor]:
    """Return what SmoothQuant divides by: of norms that nothing but MatMuls with weights of their own read."""
    weights = {item.name: item for item in program.graph.initializer}
    readers = Counter(name for node in program.graph.node for name in node.input)
    matmuls = [node for node in _weighted(program) if node.op_type == "MatMul" and readers[node.input[1]] == 1]
    scales = {}
    for norm in program.graph.node:
        users = [node for node in matmuls if norm.op_type == "LayerNormalization" and node.input[0] == norm.output[0]]
        own = all(name in weights and readers[name] == 1 for name in norm.input[1:])
        if users and own and readers[norm.output[0]] == len(users):
            largest = torch.stack([_tensor(weights[node.input[1]]).abs().amax(1) for node in users]).amax(0)
            low, high = limits[norm.output[0]]
            reach = torch.maximum(-low, high).clamp(min=SMALL)
            scale = reach**strength / largest.clamp(min=SMALL) ** (1 - strength)
            scales[norm.output[0]] = scale.clamp(min=SMALL)
    return scales


def _smoothed(program: Program, scales: Mapping[str, Tensor]) -> Program:
    """Return a program that answers alike, whose norms return their values divided by scales."""
    import onnx

    smoothed = copy.deepcopy(program)
    weights = {item.name: item for item in smoothed.graph.initializer}

    def scale(name: str, factor: Tensor) -> None:
        weights[name].CopyFrom(onnx.numpy_helper.from_array((_tensor(weights[name]) * factor).numpy(), name))

    for node in smoothed.graph.node:
        if node.output[0] in scales:
            for name in node.input[1:]:
                scale(name, 1 / scales[node.output[0]])
        elif node.input and node.input[0] in scales:
            scale(node.input[1], scales[node.input[0]][:, None])
    return smoothed


def _tensor(initializer: Any) -> Tensor:
    import onnx

    return torch.from_numpy(onnx.numpy_helper.to_array(initializer).copy())


Key = tuple[str, float | None]


def _histograms(
    passes: Iterator[dict[str, Tensor]],
    limits: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[float, Mapping[str, Tensor]],
) -> dict[Key, tuple[Tensor, float, Range]]:
    """Return counts of values between plus and minus the largest, that one, and the range; as they are and smoothed."""
    ways: list[tuple[Key, Tensor | None]] = [((name, None), None) for name in limits]
    ways += [((name, strength), by) for strength, own in scales.items() for name, by in own.items()]
    found: dict[Key, tuple[Tensor, float, Range]] = {}
    for key, by in ways:
        low, high = (value if by is None else value / by for value in limits[key[0]])
        reach = max(float(-low.amin()), float(high.amax()), SMALL)
        found[key] = torch.zeros(BINS, dtype=torch.float64), reach, (float(low.amin()), float(high.amax()))
    for values in passes:
        for key, by in ways:
            counts, reach, _ = found[key]
            value = values[key[0]] if by is None else values[key[0]] / by
            counts += torch.histc(value, BINS, -reach, reach)
    return found


def _range(histogram: tuple[Tensor, float, Range], calibration: str) -> Range:
    """Return the values of a tensor that 8 bits reach."""
    counts, reach, (low, high) = histogram
    if calibration == "minmax":
        return low, high
    if calibration == "percentile":
        below = counts.cumsum(0) / counts.sum()
        cut = torch.tensor((100 - PERCENTILE) / 200, dtype=torch.float64)
        first, last = (int(torch.searchsorted(below, share)) for share in (cut, 1 - cut))
        width = 2 * reach / BINS
        return max(low, first * width - reach), min(high, (last + 1) * width - reach)
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector("entropy", False, ENTROPY_BINS, 128, None, "same")
    merged = counts.view(ENTROPY_BINS, -1).sum(1).numpy().astype(np.int64)
    edges = np.linspace(-reach, reach, ENTROPY_BINS + 1, dtype=np.float32)
    found = collector.get_entropy_threshold((merged, edges, np.float32(low), np.float32(high)), 128)
    return float(found[0]), float(found[1])


def _with_ranges(program: Program, ranges: Mapping[str, Range]) -> Program:
    """Return an int8 program with these ranges, made of a program of ours."""
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

    limits = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        program,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
        nodes_to_quantize=[node.name for node in _weighted(program)],
        nodes_to_exclude=[],
        op_types_to_quantize=list(QUANTISED),
        # What a convolution returns is 8 bits too, or ONNX Runtime runs it in floating point.
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"], "MatMulConstBOnly": True},
    )
    quantizer.quantize_model()
    made: Program = quantizer.model.model
    keep_metadata(made, lambda key: key != "onnx.infer")  # the quantizer's mark of its own
    return made
