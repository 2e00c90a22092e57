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
from spvit.hosts.behaviour.discover import used_twice
from spvit.hosts.calling import BlockCall, calls_of
from spvit.hosts.family import Family
from spvit.hosts.recognise import RECORD, family_of
from spvit.hosts.sites import AttentionSite, BlockSites
from spvit.hosts.weights import AttentionWeights, read_weights

OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state", "feature_maps")
"""Names of a model's main output, in the order in which they count."""


@dataclass(frozen=True, eq=False)
class Host:
    """A dense model of a supported family and where its layers are."""

    model: nn.Module
    family: Family

    @property
    def blocks(self) -> tuple[BlockSites, ...]:
        """Where the layers of every block are."""
        return self.family.sites

    @cached_property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of its images."""
        return self.family.input_size(self.model)

    @staticmethod
    def of(model: nn.Module | Host) -> Host:
        """Return the host that a model is; a Host is returned as it is.

        Raises:
            UnsupportedHostError: the model is no vision transformer that spvit can take; names what was found.
            NotSearchableError: the model is searchable or pruned already.
        """
        if isinstance(model, Host):
            _check_dense(model.model)
            return model
        return recognise(model)

    def on(self, model: nn.Module) -> Host:
        """Return the same host on a copy of its model."""
        other = replace(self, model=model)
        if "calls" in vars(self):  # what blocks get beside tokens does not depend on what was pruned
            vars(other)["calls"] = self.calls
        return other

    @property
    def name(self) -> str:
        """How messages call it: its class."""
        return f"this {type(self.model).__name__}"

    def weights(self, index: int) -> AttentionWeights:
        """Return the weights of a block's attention layer."""
        site = self.blocks[index].attention
        return read_weights(self.model.get_submodule(site.path), site)

    def norm_params(self, site: AttentionSite) -> int:
        """Return the parameters of the norm before an attention layer, in the block or inside the layer."""
        inside = None if site.inner_norm is None else f"{site.path}.{site.inner_norm}"
        norms = (name for name in (site.norm, inside) if name is not None)
        return sum(count_params(self.model.get_submodule(name)) for name in norms)

    @cached_property
    def calls(self) -> dict[str, BlockCall]:
        """How the model calls each block and what stands before it, by path: recorded from a pass, once."""
        return calls_of(self.model, self.blocks, self.input_size)

    @cached_property
    def unread(self) -> dict[str, bool]:
        """Whether nothing reads the last block's patch tokens, by the objectives for which that was found out."""
        return {}

    @cached_property
    def scales(self) -> dict[str, Tensor | None]:
        """One over the scale at which a layer's output reaches the stream, by path, of those for which it was found."""
        return {}

    @cached_property
    def totals(self) -> dict[str, int]:
        """What the whole model costs, by metric: MACs of one image, counted, and parameters."""
        return {"macs": macs_of_image(self), "params": count_params(self.model)}

    def fingerprint(self) -> str:
        """Return a short text that differs, as good as always, when weights do: of some numbers of every parameter."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            check_values(parameter)
            digest.update(f"{name} {list(parameter.shape)}".encode())
            flat = parameter.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // 256)].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def recognise(model: nn.Module, images: Tensor | None = None) -> Host:
    """Return the host that a model is: where its attention layers and FFNs are, each verified.

    Families that spvit knows by class need no images. Of any other model a copy runs: attention is where a softmax of
    q k^T is multiplied with values, its projections are found by equations, FFN units by changing one, tokens by
    changing corners of an image.

    Args:
        model: any vision transformer whose blocks hold self-attention and an FFN.
        images: a batch as the model takes it, [batch, channels, height, width]; only its size counts. None: images of
            the size that the model says it takes.

    Raises:
        UnsupportedHostError: names the part of the model, what was looked for, and what was found.
        NotSearchableError: the model is searchable or pruned already.
    """
    _check_dense(model)
    if images is not None and (
        not isinstance(images, Tensor) or images.dim() != 4 or not images.numel() or not images.is_floating_point()
    ):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise UnsupportedHostError(
            f"recognise got {found} for images, expected floating-point numbers [batch, channels, height, width]"
        )
    _check_parts(model)
    family = family_of(model, None if images is None else (images.shape[1], images.shape[2], images.shape[3]))
    _check_blocks_differ(model, family.sites)
    return Host(model, family)


def _check_dense(model: nn.Module) -> None:
    """Raise NotSearchableError for a model that is searchable or pruned."""
    if getattr(model, RECORD, None) is not None:
        raise NotSearchableError("this model is already searchable or pruned by spvit; start from the dense host")


def check_values(parameter: nn.Parameter) -> None:
    """Raise CalibrationError for a parameter on the meta device."""
    if parameter.is_meta:
        raise CalibrationError("the model is on the meta device, so its weights have no values; load them first")


def _check_blocks_differ(model: nn.Module, blocks: tuple[BlockSites, ...]) -> None:
    """Raise UnsupportedHostError when two blocks share a layer, which cannot become two different things."""
    first: dict[int, str] = {}
    for block in blocks:
        for path in (block.attention.path, *block.ffn.linears, block.ffn.second):
            other = first.setdefault(id(model.get_submodule(path)), path)
            if other != path:
                raise used_twice(path, other)


def _check_parts(model: nn.Module) -> None:
    """Raise UnsupportedHostError for a part that cannot be copied, or is compiled: hooks inside it no longer run."""
    for path, part in model.named_modules():
        if path and part._compiled_call_impl is not None:
            raise UnsupportedHostError(
                f"{path} is compiled; prune the model as it was before, and compile what you get"
            )
        made = next((name for name, item in vars(part).items() if isinstance(item, Tensor) and not item.is_leaf), None)
        if made is not None:
            raise UnsupportedHostError(
                f"{f'{path}.{made}'.lstrip('.')} is computed and has a gradient, so the model cannot be copied: remove "
                "weight norms and pruning masks, or run the model once under torch.no_grad() if its forward keeps it"
            )


def input_size(model: nn.Module | Host) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model takes, dense or pruned."""
    return model.input_size if isinstance(model, Host) else family_of(model).input_size(model)


def macs_of_image(model: nn.Module | Host) -> int:
    """Return the MACs that a model takes for one image of its own size, dense or pruned."""
    size, inner = input_size(model), model.model if isinstance(model, Host) else model
    image = torch.zeros(1, *size, dtype=next(inner.parameters()).dtype, device="meta")
    return count_macs(inner, lambda twin: twin(image))


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
