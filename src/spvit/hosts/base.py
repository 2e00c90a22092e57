"""The contract between spvit and a family of hosts: where the sites are, how to read them, how to install there.

A family is one small file beside this one. It answers with *locations* and plain numbers; reading weights and putting
replacements in place go through the dotted names, so that no host's forward is ever touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spvit.cost import BlockCost, NetworkCost, count_macs, count_params
from spvit.errors import UnsupportedHostError
from spvit.pruned import Grid
from spvit.searchable import AttentionAccess


@dataclass(frozen=True)
class AttentionSite:
    """Where an attention layer sits and what it works on."""

    path: str
    """Dotted name of the layer in the host."""
    norm: str | None
    """Dotted name of the norm that feeds this layer alone and goes when the layer is skipped; None to keep it."""
    dim: int
    heads: int
    head_width: int
    prefix_tokens: int
    grid: tuple[int, int]
    """(height, width) of the patch grid at the host's own input size."""
    keys: int
    """Tokens that each query attends to."""
    windows: int = 1
    """Windows that an image's tokens go in, of `keys` tokens each, padding included; 1: all tokens are one."""
    layout: Grid | None = None
    """How attention gets the grid, where it does not get its tokens row-major behind the prefix tokens."""

    def own_grid(self) -> Grid:
        """Return how attention gets the grid of images of the host's own size; it does not follow other sizes."""
        return Grid(*self.grid) if self.layout is None else self.layout

    @property
    def tokens(self) -> int:
        """All tokens of one image."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class FFNSite:
    """Where an FFN sits."""

    first: str
    """Dotted name of its first linear layer in the host."""
    second: str
    """Dotted name of its second linear layer in the host."""
    units: int


@dataclass(frozen=True)
class BlockSites:
    """A block and its two sites."""

    path: str
    """Dotted name of the block in the host: a module that maps tokens [B, N, D] to tokens of the same shape."""
    attention: AttentionSite
    ffn: FFNSite
    before: str | None = None
    """Dotted name of a module that stands between the previous block and this one; None when nothing does."""


class Family(Protocol):
    """What a host family has to say. Methods take the host, an instance of the family's class."""

    name: str
    """How messages and files call the family."""
    temperature: float
    """Default temperature of the head mix (alpha)."""
    access: AttentionAccess

    def blocks(self, host: nn.Module) -> tuple[BlockSites, ...]:
        """Return the sites of every block, in order. Raises UnsupportedHostError naming a part it does not know."""
        ...

    def input_size(self, host: nn.Module) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that the host takes."""
        ...

    def track_grids(self, host: nn.Module, blocks: Sequence[int], whole: bool) -> dict[int, Grid]:
        """Return the patch grid of these blocks, by index; the host keeps it at that of the images it is working on.

        Args:
            host: changed in place.
            blocks: indices of blocks.
            whole: also make the host hand the whole grid to what stands where these blocks' attention was, as tokens
                row-major, where attention gets it in another form. False leaves the host's attention as it is.
        """
        ...

    def source(self, host: nn.Module) -> dict[str, Any]:
        """Return what `build` needs to make the same host again, as JSON values. Raises UnsupportedHostError."""
        ...

    def build(self, source: dict[str, Any]) -> nn.Module:
        """Make a host with random weights from what `source` returned."""
        ...


def logits_of(output: Any) -> Tensor:
    """Return the class logits [B, classes] from whatever a host's forward returned."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise UnsupportedHostError(
        f"cannot find class logits in a {type(output).__name__}; expected a tensor or an object with .logits"
    )


def example_images(family: Family, host: nn.Module, batch: int = 1, device: torch.device | None = None) -> Tensor:
    """Return zero images that the host takes: [batch, channels, height, width], in the host's dtype."""
    parameter = next(host.parameters())
    return torch.zeros(batch, *family.input_size(host), dtype=parameter.dtype, device=device or parameter.device)


def expect(module: nn.Module, cls: type, path: str, family: str) -> None:
    """Raise UnsupportedHostError unless the module at a dotted name is of exactly this class."""
    if type(module) is not cls:
        raise UnsupportedHostError(
            f"{path} is a {type(module).__name__}, but {family} hosts are supported with {cls.__name__} there only"
        )


def _linear_params(module: nn.Module) -> int:
    return sum(child.weight.numel() for child in module.modules() if isinstance(child, nn.Linear))


def _block_macs(host: nn.Module, block: BlockSites) -> BlockCost:
    """MACs of one image (method: paper section 3.4). Attention products: two of [tokens, keys, H E]."""
    site, ffn = block.attention, block.ffn
    attention = host.get_submodule(site.path)
    attending = site.windows * site.keys
    products = 2 * attending * site.keys * site.heads * site.head_width
    grid_tokens = site.grid[0] * site.grid[1]
    bottleneck = site.dim * site.head_width * grid_tokens
    first, second = host.get_submodule(ffn.first), host.get_submodule(ffn.second)
    return BlockCost(
        msa=attending * _linear_params(attention) + products,
        conv3=10 * bottleneck,
        conv1=2 * bottleneck,
        unit=site.tokens * (_linear_params(first) + _linear_params(second)) // ffn.units,
        units=ffn.units,
        heads=site.heads,
        head_width=site.head_width,
        query_key=site.tokens * (2 * site.dim + site.keys),
        value=site.tokens * (2 * site.dim + site.keys),
        prefix_rules={"linear": 2 * site.prefix_tokens * site.dim * site.head_width},
    )


def _block_params(family: Family, host: nn.Module, block: BlockSites) -> BlockCost:
    """Parameters as deployed: convolutions folded, with both biases."""
    site, ffn = block.attention, block.ffn
    norm = 0 if site.norm is None else count_params(host.get_submodule(site.norm))
    bottleneck, biases = site.dim * site.head_width, site.dim + site.head_width
    first = host.get_submodule(ffn.first)
    first_bias = getattr(first, "bias", None) is not None
    biased = int(family.access.read(host.get_submodule(site.path)).value_bias is not None)
    weights = _linear_params(first) + _linear_params(host.get_submodule(ffn.second))
    return BlockCost(
        msa=norm + count_params(host.get_submodule(site.path)),
        conv3=norm + 10 * bottleneck + biases,
        conv1=norm + 2 * bottleneck + biases,
        unit=weights // ffn.units + int(first_bias),
        units=ffn.units,
        heads=site.heads,
        head_width=site.head_width,
        query_key=2 * (site.dim + biased),
        value=2 * site.dim + biased,
        prefix_rules={
            "mean": site.prefix_tokens * site.dim,
            "linear": 2 * bottleneck + biases if site.prefix_tokens else 0,
        },
        skip_rules={"normalised_input": norm, "mean": (site.prefix_tokens + 1) * site.dim},
    )


def network_costs(family: Family, host: nn.Module) -> dict[str, NetworkCost]:
    """Return the costs of a host by metric. The fixed part is what its measured total leaves beside the sites."""
    blocks = family.blocks(host)

    def run(twin: nn.Module) -> object:
        return twin(example_images(family, twin))

    totals = {"macs": count_macs(host, run), "params": count_params(host)}
    by_metric = {
        "macs": tuple(_block_macs(host, block) for block in blocks),
        "params": tuple(_block_params(family, host, block) for block in blocks),
    }
    costs = {}
    for metric, sites in by_metric.items():
        variable = NetworkCost(metric, 0, sites).dense
        costs[metric] = NetworkCost(metric, totals[metric] - variable, sites)
    return costs


@dataclass
class GridTracker:
    """A forward pre-hook for a host's patch embedding: keeps the grid at the size of the images that pass.

    A dataclass of plain values, so that a hooked model can be copied and saved.
    """

    grid: Grid
    patch: tuple[int, int]
    pads: bool

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Set the grid from images [B, C, height, width]."""
        extra = [size - 1 if self.pads else 0 for size in self.patch]
        height, width = arguments[0].shape[-2:]
        self.grid.height = int((height + extra[0]) // self.patch[0])
        self.grid.width = int((width + extra[1]) // self.patch[1])
