"""Writes a model for other runtimes, each format by one function that returns what runs the written file.

Shapes: images [B, channels, height, width]; the output is [B, classes], or features [B, ...].
"""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spvit.checkpoint import plain_state

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml", "safetensors": ".safetensors"}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
"""What a format needs to be written and run, beside torch and safetensors."""
METADATA = "spvit"
INPUT, OUTPUT = "images", "output"
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where an operation of an ONNX file notes the modules that it is from."""

Program = Any  # onnx.ModelProto, of a package that need not be installed
Run = Callable[[Tensor], Tensor]
"""Runs what was written on images."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' advice to their own programmers off the terminal."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # to which torch prints whole programs
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


BATCHES, ANY_SIZE = (({index: torch.export.Dim.DYNAMIC for index in indices},) for indices in ([0], [0, 2, 3]))
"""What varies of the images."""
AXES = ("batch", "channels", "height", "width")
"""What the sizes of the images that vary are called in an ONNX file."""


def _write_onnx(model: nn.Module, images: Tensor, path: Path, options: dict[str, Any]) -> Run:
    import onnx

    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=options["shapes"],
        opset_version=options["opset"],
        input_names=[INPUT],
        output_names=[OUTPUT],
        optimize=True,
        verbose=False,
    )
    assert program is not None
    proto = onnx.shape_inference.infer_shapes(program.model_proto)
    for node in proto.graph.node:  # which part it is from stays; not the code, with the folders of this machine
        keep_metadata(node, lambda key: key == SCOPES)
    _name_sizes(proto.graph)
    onnx.helper.set_model_props(proto, {METADATA: options[METADATA]})
    return write_program(proto, path)


def keep_metadata(part: Any, wanted: Callable[[str], bool]) -> None:
    """Drop the metadata of an ONNX program, or of a node, whose key is not wanted, in place."""
    kept = [item for item in part.metadata_props if wanted(item.key)]
    del part.metadata_props[:]
    part.metadata_props.extend(kept)


def _name_sizes(graph: Any) -> None:
    """Call the sizes that vary by AXES, in place, wherever they come: torch's exporter calls them s34 or so."""
    names = {dim.dim_param: axis for dim, axis in zip(graph.input[0].type.tensor_type.shape.dim, AXES)}
    for value in (*graph.input, *graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # of other sizes it may be a term, such as 17*s34
                dim.dim_param = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), dim.dim_param)


def write_program(proto: Any, path: Path) -> Run:
    """Write an ONNX program, and return what runs the file."""
    path.write_bytes(proto.SerializeToString())
    opened = session(path)
    return lambda batch: torch.from_numpy(opened.run(None, {INPUT: batch.numpy()})[0])


def session(
    program: Program | Path,
    provider: str = "CPUExecutionProvider",
    entries: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """Return a program or its file, ready to run with the threads of torch; with options and entries of the session."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    for name, value in (entries or {}).items():
        settings.add_session_config_entry(name, value)
    source = program if isinstance(program, Path) else program.SerializeToString()
    return onnxruntime.InferenceSession(source, settings, providers=[provider])


def read_program(path: Path) -> Program:
    """Return the ONNX program of a file."""
    import onnx

    return onnx.load(path)


def _write_pt2(model: nn.Module, images: Tensor, path: Path, options: dict[str, Any]) -> Run:
    program = torch.export.export(model, (images,), dynamic_shapes=options["shapes"])
    buffer = io.BytesIO()  # on a full disk torch ends the process
    torch.export.save(program, buffer, extra_files={METADATA: options[METADATA]})
    path.write_bytes(buffer.getbuffer())
    loaded = torch.export.load(path).module()

    @torch.no_grad()
    def run(batch: Tensor) -> Tensor:
        out: Tensor = loaded(batch)
        return out

    return run


def _write_openvino(model: nn.Module, images: Tensor, path: Path, options: dict[str, Any]) -> Run:
    import openvino

    program = torch.export.export(model, (images,), dynamic_shapes=options["shapes"])
    converted = openvino.convert_model(program)
    converted.inputs[0].get_tensor().set_names({INPUT})
    converted.outputs[0].get_tensor().set_names({OUTPUT})
    converted.set_rt_info(options[METADATA], METADATA)
    openvino.save_model(converted, path, compress_to_fp16=False)
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # bf16 where the CPU has it
    return lambda batch: torch.from_numpy(compiled(batch.numpy())[0])


def _write_safetensors(model: nn.Module, images: Tensor, path: Path, options: dict[str, Any]) -> Run:
    inner: Any = model.model
    metadata = {"format": "pt", METADATA: options[METADATA]}
    save_file(plain_state(inner), path, metadata=metadata)
    twin: Any = copy.deepcopy(model)
    with safe_open(path, "pt") as file:
        twin.model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return torch.no_grad()(twin)


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path, dict[str, Any]], Run]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "openvino": _write_openvino,
    "safetensors": _write_safetensors,
}
