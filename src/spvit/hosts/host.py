"""The host: the user's model with all that spvit knows of it, made once at the edge and passed everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from spvit.cost import count_macs, count_params
from spvit.errors import CalibrationError, NotSearchableError, UnsupportedHostError
from spvit.hosts.recognise import family_of
from spvit.hosts.sites import BlockSites, Family
from spvit.hosts.weights import AttentionWeights, read_weights

OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state", "feature_maps")
"""Names of a model's main output, in the order in which they count."""
RECORD = "spvit_record"
"""Attribute in which a searchable or pruned model keeps what spvit knows of it."""


@dataclass(frozen=True, eq=False)
class Host:
    """A dense model of a supported family and where its layers are."""

    model: nn.Module
    family: Family
    blocks: tuple[BlockSites, ...]
    input_size: tuple[int, int, int]
    """(channels, height, width) of its images."""

    @staticmethod
    def of(model: nn.Module | Host) -> Host:
        """Return the host that a model is; a Host is returned as it is.

        Raises:
            UnsupportedHostError: the model's family, or a part of it, is not known.
            NotSearchableError: the model is searchable or pruned already.
        """
        own = model.model if isinstance(model, Host) else model
        if getattr(own, RECORD, None) is not None:
            raise NotSearchableError("this model is already searchable or pruned by spvit; start from the dense host")
        if isinstance(model, Host):
            return model
        family = family_of(model)
        blocks = family.blocks(model)
        _check_blocks_differ(model, blocks)
        return Host(model, family, blocks, family.input_size(model))

    def on(self, model: nn.Module) -> Host:
        """Return the same host on a copy of its model."""
        return replace(self, model=model)

    @property
    def name(self) -> str:
        """How messages call it: its class."""
        return f"this {type(self.model).__name__}"

    def weights(self, index: int) -> AttentionWeights:
        """Return the weights of a block's attention layer."""
        site = self.blocks[index].attention
        return read_weights(self.model.get_submodule(site.path), site)

    @cached_property
    def totals(self) -> dict[str, int]:
        """What the whole model costs, by metric: MACs of one image, counted, and parameters."""
        return {"macs": macs_of_image(self.model), "params": count_params(self.model)}

    def fingerprint(self) -> str:
        """Return a short text that differs, as good as always, when weights do: of some numbers of every parameter."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            check_values(parameter)
            digest.update(f"{name} {list(parameter.shape)}".encode())
            flat = parameter.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // 256)].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def check_values(parameter: nn.Parameter) -> None:
    """Raise CalibrationError for a parameter on the meta device."""
    if parameter.is_meta:
        raise CalibrationError("the model is on the meta device, so its weights have no values; load them first")


def _check_blocks_differ(model: nn.Module, blocks: tuple[BlockSites, ...]) -> None:
    """Raise UnsupportedHostError when two blocks share a layer, which cannot become two different things."""
    first: dict[int, str] = {}
    for block in blocks:
        for path in (block.attention.path, block.ffn.first, block.ffn.second):
            other = first.setdefault(id(model.get_submodule(path)), path)
            if other != path:
                raise UnsupportedHostError(
                    f"{path} and {other} are the same module, used twice; give each block weights of its own "
                    "(copy.deepcopy the block)"
                )


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model takes, dense or pruned."""
    return family_of(model).input_size(model)


def example_images(model: nn.Module, batch: int = 1) -> Tensor:
    """Return zero images that a model takes, dense or pruned: [batch, channels, height, width], in its dtype."""
    parameter = next(model.parameters())
    return torch.zeros(batch, *input_size(model), dtype=parameter.dtype, device=parameter.device)


def macs_of_image(model: nn.Module) -> int:
    """Return the MACs that a model takes for one image of its own size, dense or pruned."""
    return count_macs(model, lambda twin: twin(example_images(twin)))


def outputs_of(output: Any) -> list[Tensor]:
    """Return the logits or features, [B, ...], in whatever a model's forward returned; several in a list of maps."""
    get = output.get if isinstance(output, Mapping) else lambda name: getattr(output, name, None)
    found = next((value for name in OUTPUTS if (value := get(name)) is not None), output)
    several = found.values() if isinstance(found, Mapping) else found if isinstance(found, (list, tuple)) else [found]
    tensors = [item for item in several if isinstance(item, Tensor) and item.dim()]
    if not tensors:
        raise UnsupportedHostError(
            f"cannot find logits or features in a {type(output).__name__}; expected a tensor, tensors, or one of "
            f"{', '.join(OUTPUTS)} in an object or dictionary"
        )
    return tensors[:1] if isinstance(output, tuple) else tensors


def logits_of(output: Any) -> Tensor:
    """Return the class logits [B, classes] from whatever a host's forward returned."""
    return outputs_of(output)[0]
