"""Blocks in stages behind convolutions, with depthwise convolutions in their FFNs: what is found, and the contract."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

import spvit
from spvit.architecture import FFN, Architecture, Block, dense
from spvit.architecture import Attention as Kept
from spvit.errors import UnsupportedHostError
from tiny import assert_close, choose, count_macs, logits, randomise

KINDS = ("conv3", "msa", "conv1", "msa")


class MixFFN(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, width), nn.Linear(width, dim)
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        hidden = self.fc1(x)
        maps = hidden.transpose(1, 2).unflatten(2, grid)
        return self.fc2(nn.functional.gelu(self.local(maps).flatten(2).transpose(1, 2)))


class MixBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads=2, qkv_bias=True)
        self.ffn = MixFFN(dim, 3 * dim)

    def forward(self, x: Tensor, grid: tuple[int, int], beside: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x if beside is None else x + beside
        return x + self.ffn(self.norm2(x), grid)


class Staged(nn.Module):
    """A stem of convolutions that blurs, two stages of blocks, and a convolution on the map between them."""

    def __init__(self, reads_images: bool = False) -> None:
        super().__init__()
        self.reads_images = reads_images
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)
        )
        self.stages = nn.ModuleList(nn.ModuleList(MixBlock(dim) for _ in range(2)) for dim in (16, 24))
        self.down = nn.Conv2d(16, 24, 3, 2, 1)
        self.head = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x)
        for stage, blocks in enumerate(self.stages):
            maps = self.down(maps) if stage else maps
            grid = (maps.shape[2], maps.shape[3])
            tokens = maps.flatten(2).transpose(1, 2)
            beside = tokens.mean(1, keepdim=True) if self.reads_images else None
            for block in blocks:  # type: ignore[attr-defined]
                tokens = block(tokens, grid, beside)
            maps = tokens.transpose(1, 2).unflatten(2, grid)
        return self.head(maps.mean((2, 3)))


@pytest.fixture(name="host", scope="module")
def _host() -> spvit.Host:
    model = randomise(Staged()).double().eval()
    return spvit.recognise(model, _images(1))


def _images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _mixed(host: spvit.Host) -> Architecture:
    widths = [block.ffn.units for block in host.blocks]
    blocks = (Block(Kept(kind), FFN(width, tuple(range(1, width, 2)))) for kind, width in zip(KINDS, widths))
    return Architecture(tuple(blocks), skip_rule="mean")


def test_tokens_behind_a_stem_of_convolutions_and_the_maps_between_stages_are_found(host: spvit.Host) -> None:
    assert [block.attention.grid for block in host.blocks] == [(8, 12), (8, 12), (4, 6), (4, 6)]
    assert [(block.before, block.channels_first) for block in host.blocks if block.before] == [("down", True)]
    assert [block.ffn.norm for block in host.blocks] == [f"stages.{s}.{b}.ffn.local" for s in (0, 1) for b in (0, 1)]


def test_depthwise_convolutions_get_narrower_with_the_units_and_all_forms_agree(host: spvit.Host) -> None:
    x = _images(2)
    everything = spvit.prune(host, dense([block.ffn.units for block in host.blocks]))
    assert torch.equal(logits(everything, x), logits(host.model, x))
    folded = spvit.fold(spvit.prune(host, _mixed(host)))
    assert folded.get_submodule("stages.1.0.ffn.local").groups == 36
    assert spvit.cost(host, _mixed(host))["macs"] == count_macs(folded, x[:1])
    net = choose(randomise(spvit.make_searchable(host), seed=1), KINDS).eval()
    pruned = spvit.prune(host, spvit.decide(net), weights=net)
    assert_close(logits(pruned, x), logits(net, x))
    assert_close(logits(spvit.fold(pruned), x), logits(net, x))


def test_repair_follows_through_stages(host: spvit.Host) -> None:
    images = _images(40)
    plain, repaired = (spvit.prune(host, _mixed(host), repair=given) for given in (None, images))
    missed = [(logits(model, images) - logits(host.model, images)).square().mean() for model in (plain, repaired)]
    assert missed[1] < missed[0] / 2


def test_blocks_that_read_something_of_each_image_beside_their_tokens_are_refused_before_any_verb() -> None:
    with pytest.raises(UnsupportedHostError, match=r"stages\.0\.0 gets a tensor of each image beside its tokens"):
        spvit.recognise(randomise(Staged(reads_images=True)).double().eval(), _images(1))
