"""Files of states: tensors and what is known of them, in one safetensors file that shows whether it is whole."""

import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spvit.checkpoint import make_folder, read_weights, replace_atomically
from spvit.errors import CheckpointError, RunFolderError, first_line
from spvit.hosts.walk import Part

STATE_FORMAT = 4  # those of others are not read, the first of which were pickles

logger = logging.getLogger("spvit")


def write_state(path: Path, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and what is to be known about them, as JSON values, with a checksum of it all."""
    make_folder(path.parent)
    values = {"format": STATE_FORMAT, **about}
    metadata = {"spvit": json.dumps({**values, "checksum": checksum(tensors, values)})}
    replace_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def about_state(path: Path) -> dict[str, Any]:
    """Return what is known about a file's tensors.

    Raises CheckpointError when the file is damaged, and RunFolderError when another version of spvit wrote it.
    """
    values: dict[str, Any] = {}
    try:
        if path.is_file():  # the first version wrote folders
            with safe_open(path, "pt") as file:
                values = {**json.loads((file.metadata() or {}).get("spvit", "{}"))}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({first_line(error)})") from error
    if values.get("format") != STATE_FORMAT:
        advice = f"whose state {path} is not read; begin the run again in another folder"
        raise RunFolderError(f"output {path.parents[2]} holds a run of another version of spvit, {advice}")
    return values


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what is known about a file's tensors, and these. Raises CheckpointError when a byte of them is another."""
    values, tensors = about_state(path), read_weights(path)
    if values.pop("checksum", None) != checksum(tensors, values):
        raise CheckpointError(f"{path} is damaged (its checksum does not fit)")
    return values, tensors


def checksum(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> int:
    """Return a number of tensors on the CPU and JSON values, of 32 bits."""
    found = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return found


@dataclass(frozen=True)
class BlockStates:
    """What work without epochs has finished (`spvit.hosts.walk.Finished`), a file a block, for whoever has the key."""

    folder: Path
    key: int

    def get(self, block: int) -> Part | None:
        """Return what was finished of a block; None where nothing was, or with another key, or the file is damaged."""
        path = self._path(block)
        try:
            values, tensors = read_state(path) if path.is_file() else ({}, {})
        except CheckpointError as error:
            logger.warning("%s; it is made again", error)
            return None
        return (values, tensors) if values.get("key") == self.key else None

    def __setitem__(self, block: int, part: Part) -> None:
        write_state(self._path(block), part[1], {**part[0], "key": self.key})

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"
