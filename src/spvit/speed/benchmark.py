"""Latency, memory and size of models: measured on this machine, never part of a cost.

Models take turns, so that drift hits all alike, and each is compared with the first of the same run, round by round.
A model is a PyTorch module, what names one (of timm, `hf:NAME`, a folder that spvit wrote), or an exported file.
"""

from __future__ import annotations

import copy
import ctypes
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import comb
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spvit.checkpoint import DESCRIPTION, WEIGHTS
from spvit.cost import count_params
from spvit.errors import ModelError, RunError, first_line
from spvit.hosts.host import input_size, macs_of_image
from spvit.models import ModelConfig, device_named, open_model
from spvit.runtimes.export import bytes_of
from spvit.runtimes.writers import METADATA, quiet, session

BATCHES = (1, 64)
ROUNDS, TURN_S = 7, 0.025
"""Fewest rounds; seconds that a fast model runs in each of its turns."""
SMALLEST = 0.01
"""Differences below this share are noise: two copies of one model differ as much, by where they lie in memory."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Latency:
    """The time of one forward pass, with what it was measured on, and against the first model of the same run."""

    latency_ms: float
    """Median over the rounds, in milliseconds for the whole batch."""
    spread_ms: float
    """Interquartile range over the rounds."""
    images_per_s: float
    speed_up: float
    """The first model's time divided by this one's: median over the rounds."""
    speed_up_range: tuple[float, float]
    """Where that median lies, with 95 % confidence."""
    within_noise: bool
    """Whether this model may be as fast as the first: the range holds 1, or the two differ by less than 1 %."""
    batch: int
    device: str
    dtype: str
    backend: str
    threads: int
    repeats: int


@dataclass(frozen=True)
class Program:
    """What runs on images [B, channels, height, width]: a model, wherever it is from."""

    name: str
    run: Callable[[Tensor], object]
    size: tuple[int, ...]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    """Of its images."""
    backend: str = "torch"
    computes_in: str | None = None
    """Type of its numbers, where that is another than its images'."""
    costs: dict[str, int] = field(default_factory=dict)
    """`macs` of one image, and `params`, where they are known."""
    file_bytes: int | None = None

    @staticmethod
    def of(name: str, model: nn.Module, path: Path | None = None) -> Program:
        """Return a model as a program on its device, in its dtype and evaluation mode; `path` is its file."""
        weight = next(model.parameters())
        size = None if path is None else bytes_of(path)
        kind, dtype = weight.device.type, weight.dtype
        return Program(name, model.eval(), input_size(model), kind, dtype, file_bytes=size)

    def images(self, batch: int) -> Tensor:
        """Return images of noise that it takes."""
        noise = torch.rand(batch, *self.size, generator=torch.Generator().manual_seed(0))
        return noise.to(self.device, self.dtype)

    def timed(self, images: Tensor, runs: int) -> float:
        """Return the milliseconds of a pass, over so many."""
        started = time.perf_counter()
        for _ in range(runs):
            self.run(images)
        if images.device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - started) / runs * 1000


@dataclass(frozen=True)
class Benchmark:
    """What was measured of one model."""

    model: str
    backend: str
    dtype: str
    params: int | None
    macs: int | None
    """Of one image; None where an exported file does not say it."""
    file_bytes: int | None
    peak_memory: int | None
    """Bytes that a pass of the largest batch takes on top of the loaded model; None where it cannot be measured."""
    latency: tuple[Latency, ...]
    """One a batch size."""


def benchmark(
    *models: nn.Module | str | Path | Program,
    batches: Sequence[int] = BATCHES,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    seconds: float = 1.0,
    model_args: dict[str, Any] | None = None,
) -> list[Benchmark]:
    """Return latency, throughput, memory and size of models, measured in turns and compared with the first.

    Args:
        models: modules, which stay as they are; names of timm models, `hf:NAME`, folders that spvit wrote; or exported
            files: .onnx (by onnxruntime), .pt2 (by torch) and .xml (by OpenVINO).
        batches: images in one pass.
        device: where PyTorch models and ONNX files run, such as `cpu` or `cuda`.
        dtype: `fp32`, `bf16` or `fp16` of PyTorch models; None: as they are. Exported files run as they were written.
        threads: of the CPU; None: those of torch.
        seconds: at least so long for each model and batch size, if seven rounds take less.
        model_args: arguments of timm.create_model, for the timm models among them.

    Raises:
        ModelError, CheckpointError: a model cannot be found or opened, or needs a package that is not installed.
        RunError: a model fails at a batch size.
    """
    if not models or not batches or min(batches) < 1 or dtype not in (None, *DTYPES):
        found = f"{len(models)} models, batches {list(batches)}, dtype {dtype}"
        raise ModelError(
            f"benchmark got {found}; expected one model or more, batches of 1 or more, {', '.join(DTYPES)}"
        )
    with _threads(threads):
        where = (device, DTYPES.get(dtype or ""), model_args or {})
        programs = [model if isinstance(model, Program) else _opened(model, *where) for model in models]
        memory = [_peak_memory(program, max(batches)) for program in programs]
        measured = measure_batches(programs, batches, seconds)
    return [
        Benchmark(
            model=program.name,
            backend=program.backend,
            dtype=own[0].dtype,
            params=program.costs.get("params"),
            macs=program.costs.get("macs"),
            file_bytes=program.file_bytes,
            peak_memory=peak,
            latency=own,
        )
        for program, peak, own in zip(programs, memory, measured)
    ]


def measure_batches(
    programs: Sequence[Program], batches: Sequence[int], seconds: float = 1.0, step: Callable[[], object] = lambda: None
) -> list[tuple[Latency, ...]]:
    """Return the latencies of each program, one a batch size, as `measure_latencies` does. step: called after each."""
    found: list[list[Latency]] = [[] for _ in programs]
    for batch in batches:
        for own, latency in zip(found, measure_latencies(programs, batch, seconds)):
            own.append(latency)
        step()
    return [tuple(own) for own in found]


@torch.inference_mode()
def measure_latencies(programs: Sequence[Program], batch: int, seconds: float = 1.0) -> list[Latency]:
    """Return the latency of several programs at a batch size, measured in turns, each compared with the first.

    seconds: at least so long for each, if seven rounds take less.
    """
    images = [program.images(batch) for program in programs]
    once = max(program.timed(own, 1) for program, own in zip(programs, images))
    if once < 1000 * TURN_S:
        once = max(program.timed(own, 2) for program, own in zip(programs, images))
    runs = max(1, int(1000 * TURN_S / once))
    rounds = max(ROUNDS, int(1000 * seconds / (once * runs)))
    times = torch.empty(rounds, len(programs), dtype=torch.float64)
    for number in range(rounds):
        for index in range(len(programs))[:: 1 if number % 2 else -1]:  # no model always follows the same one
            times[number, index] = programs[index].timed(images[index], runs)
    quartiles = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0).T.tolist()
    found = []
    for program, own, (low, median, high), column in zip(programs, images, quartiles, times.T):
        ratios = times[:, 0] / column
        speed_up, (least, most) = ratios.median().item(), _median_range(ratios)
        found.append(
            Latency(
                latency_ms=median,
                spread_ms=high - low,
                images_per_s=batch * 1000 / median,
                speed_up=speed_up,
                speed_up_range=(least, most),
                within_noise=least <= 1 <= most or abs(speed_up - 1) < SMALLEST,
                batch=batch,
                device=own.device.type,
                dtype=program.computes_in or str(own.dtype).removeprefix("torch."),
                backend=program.backend,
                threads=torch.get_num_threads(),
                repeats=rounds,
            )
        )
    return found


def _median_range(values: Tensor) -> tuple[float, float]:
    """Return where the median lies with 95 % confidence, by a sign test: of 20 values, from the 6th to the 15th."""
    count, ordered = len(values), values.sort().values
    tails = accumulate(comb(count, below) / 2**count for below in range(count))
    outside = max(0, sum(tail <= 0.025 for tail in tails) - 1)
    return ordered[outside].item(), ordered[-1 - outside].item()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Have torch use so many threads inside the context."""
    before = torch.get_num_threads()
    if count is not None and count < 1:
        raise ModelError(f"threads is {count}, expected 1 or more")
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _peak_memory(program: Program, batch: int) -> int | None:
    """Return the bytes that a first pass takes beside the model: of the accelerator, or of the process on Linux."""
    images = program.images(batch)
    try:
        if program.backend == "torch":  # it keeps only what it sets up once; other runtimes keep what they took
            program.timed(images, 1)
        if images.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            program.timed(images, 1)
            return torch.cuda.max_memory_allocated() - before if program.backend == "torch" else None
        measured = _reset_peak()
        before = _resident("VmRSS") if measured else 0
        program.timed(images, 1)
        return _resident("VmHWM") - before if measured and program.device == "cpu" else None
    except Exception as error:  # whatever a runtime raises: another batch size than it takes, no memory
        raise RunError(f"{program.name} fails at batch {batch}: {first_line(error)}") from error


def _reset_peak() -> bool:
    """Give what is free back to the system and forget the process's peak; False where the system does not offer it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError, TypeError):
        return False
    return True


def _resident(name: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _opened(model: nn.Module | str | Path, device: str, dtype: torch.dtype | None, arguments: Any) -> Program:
    """Return a model as a program. Raises ModelError when it cannot be found or opened."""
    if isinstance(model, nn.Module):
        name, module, file = type(model).__name__, copy.deepcopy(model), None
    else:
        name, path = str(model), Path(model)
        if path.suffix in RUNTIMES:
            return _exported(path, device)
        if path.is_file():
            expected = f"a file that ends in {', '.join(RUNTIMES)}, a folder, or a name"
            raise ModelError(f"{path} is no model: expected {expected}")
        file = path / WEIGHTS if (path / DESCRIPTION).is_file() else None
        config = ModelConfig(model=name, model_args=arguments if file is None else {})
        module = open_model(config, weights=False).model
    program = Program.of(name, module.to(device_named(device), dtype), file)
    return replace(program, costs={"macs": macs_of_image(module), "params": count_params(module)})


def _exported(path: Path, device: str) -> Program:
    """Return an exported file as a program."""
    package, extra, open_with = RUNTIMES[path.suffix]
    if not path.is_file():
        raise ModelError(f"{path} does not exist; write it with: spvit export MODEL --output {path}")
    try:
        runtime = importlib.import_module(package)
    except ImportError as error:
        raise ModelError(f"{path} needs {package}, which is not installed: pip install {extra}") from error
    if device != "cpu" and path.suffix != ".onnx":
        raise ModelError(f"{path} runs on the CPU here, not on {device!r}; leave out the device, or export to onnx")
    try:
        with quiet():
            run, size, dtype, computes_in, metadata = open_with(runtime, path, device)
        about = json.loads(metadata or "{}")
    except ModelError:
        raise
    except Exception as error:  # whatever a runtime raises for a file that is not its own
        raise ModelError(f"{path} cannot be opened by {package}: {first_line(error)}") from error
    size = about.get("input_size", size)
    if not all(isinstance(side, int) for side in size) or len(size) != 3:
        raise ModelError(f"{path} takes {list(size)} after the batch, expected channels, height and width as numbers")
    costs = {name: about[name] for name in ("macs", "params") if name in about}
    if about.get("precision", "fp32") != "fp32":
        computes_in = about["precision"]
    return Program(str(path), run, tuple(size), device, dtype, package, computes_in, costs, bytes_of(path))


Opened = tuple[Callable[[Tensor], object], Sequence[Any], torch.dtype, str | None, str | None]
"""What runs, the size and type of an image, in what it computes where that is another type, and metadata."""


def _open_onnx(onnxruntime: Any, path: Path, device: str) -> Opened:
    provider = "CPUExecutionProvider" if device == "cpu" else f"{device.split(':')[0].upper()}ExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ModelError(f"this onnxruntime has no {provider}; for {device} install: pip install onnxruntime-gpu")
    # Its threads would go on spinning while another model has its turn.
    opened = session(path, provider, {"session.force_spinning_stop": "1"})
    [images] = opened.get_inputs()
    dtype = torch.float16 if images.type == "tensor(float16)" else torch.float32
    metadata = opened.get_modelmeta().custom_metadata_map.get(METADATA)

    def run(batch: Tensor) -> object:
        return opened.run(None, {images.name: batch.numpy(force=True)})

    return run, images.shape[1:], dtype, None, metadata


def _open_pt2(_: Any, path: Path, device: str) -> Opened:
    extra = {METADATA: ""}
    program = torch.export.load(path, extra_files=extra)
    [images] = program.example_inputs[0]
    return program.module(), images.shape[1:], images.dtype, None, extra[METADATA]


def _open_openvino(openvino: Any, path: Path, device: str) -> Opened:
    core = openvino.Core()
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    metadata = model.get_rt_info(METADATA).value if model.has_rt_info(METADATA) else None
    computes_in = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()  # bf16 where the CPU has it
    return lambda batch: compiled(batch.numpy()), (), torch.float32, computes_in, metadata


RUNTIMES: dict[str, tuple[str, str, Callable[[Any, Path, str], Opened]]] = {
    ".onnx": ("onnxruntime", "'spvit[export]'", _open_onnx),
    ".pt2": ("torch", "torch", _open_pt2),
    ".xml": ("openvino", "openvino", _open_openvino),
}
"""By the ending of a file: the package that runs it, how that is installed, and what opens it."""
