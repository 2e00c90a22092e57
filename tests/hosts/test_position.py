"""Rotary embeddings and biases of attention are found by what they do; what is not explained keeps attention whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.hosts.position import bias_of_pairs, cosines_and_sines, entries_by_head, rotated
from spvit.hosts.sites import Bias, Rotary

pytest.importorskip("einops")
import own_models
import own_parts as parts
from positioned import POSITIONED, TablesAttention
from tiny import assert_untouched, everything_of, randomise


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", POSITIONED)
def test_what_places_do_is_found(name: str, fresh: bool) -> None:
    """Of a fresh model too, whose biases are zero."""
    case = POSITIONED[name]
    model = case.make().eval() if fresh else randomise(case.make()).to(torch.float64).eval()
    before = everything_of(model)
    host = spvit.recognise(model, case.images(2).to(next(model.parameters())))
    assert_untouched(model, before)
    for block in host.blocks:
        site = block.attention
        assert (site.rotary, site.bias) == (case.rotary, case.bias)
        pairs = case.bias is None and not case.normed  # nothing but the rotation acts on queries and keys
        assert (site.narrows_queries, site.narrows_values) == (pairs, True)
        assert site.query != site.key != site.value
        assert all(norm is not None for norm in site.norms[:2]) == case.normed
        assert (site.cosine, site.head_scales) == (case.cosine, case.scaled)
        assert site.scale == (1 if case.scaled else site.head_width**-0.5)
        json.dumps(dataclasses.asdict(site))


class _ScaledTables(TablesAttention):
    """Its tables are no rotations."""

    def __init__(self) -> None:
        super().__init__(17, (1, 3, 17, 17))
        self.rope.cos.mul_(1.5)


class _LearnedAngles(parts.RotaryAttention):
    """Makes its tables of learned frequencies as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        angles = (torch.arange(17).to(x)[:, None] * self.frequencies).repeat(1, 2)
        return super().forward(x, (angles.sin(), angles.cos()))


class _BiasFromOutside(nn.Module):
    """Adds a bias to the logits that the model computes and passes in a form of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor, pairs: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        bias = None if pairs is None else pairs.view(17, 17, 3).permute(2, 0, 1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


class _PassingBlock(own_models.Block):
    def __init__(self) -> None:
        super().__init__(_BiasFromOutside(), parts.Mlp())
        self.pairs = nn.Parameter(torch.zeros(17 * 17 * 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.pairs)
        return x + self.mlp(self.norm2(x))


class _ScaledByHead(nn.Module):
    """Scales each head's logits as it has learned, and does not run without what it is given beside its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.factors = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x: Tensor, one: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * self.factors.exp() * one
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class _ScaledBlock(own_models.Block):
    def __init__(self) -> None:
        super().__init__(_ScaledByHead(), parts.Mlp())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), torch.ones((), dtype=x.dtype))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: own_models.vit(_ScaledTables),
        lambda: own_models.vit(_LearnedAngles),
        lambda: own_models.ViT(_PassingBlock),
        lambda: own_models.ViT(_ScaledBlock),
    ],
    ids=["no rotation", "learned angles", "bias from outside", "scales that cannot be read"],
)
def test_attention_stays_whole_where_places_are_not_explained(make: Callable[[], nn.Module]) -> None:
    host = spvit.recognise(randomise(make()).eval(), torch.zeros(2, 3, 32, 32))
    for block in host.blocks:
        assert not block.attention.narrows_queries
        assert not block.attention.narrows_values
    kept = Attention(heads=(0,))
    blocks = [Block(kept, FFN(block.ffn.units, tuple(range(block.ffn.units)))) for block in host.blocks]
    with pytest.raises(spvit.ArchitectureError, match="block 0: the attention of .* cannot be narrowed; keep it whole"):
        spvit.prune(host, Architecture(tuple(blocks)))


@pytest.mark.parametrize("pairs", [False, True])
def test_rotations_are_products_of_complex_numbers(pairs: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
    angles = torch.rand(3, 4, 4, generator=generator, dtype=torch.float64)
    rotary = Rotary(("table",), True, sine_first=False, pairs=pairs, by_head=True)
    phases = torch.polar(torch.ones_like(angles), angles)
    tables = cosines_and_sines(rotary, [phases], 3, 8)
    found = rotated(x, *tables, pairs)

    def as_complex(part: Tensor) -> Tensor:
        if pairs:
            return torch.view_as_complex(part.unflatten(3, (4, 2)).contiguous())
        return torch.complex(part[..., :4], part[..., 4:])

    assert torch.equal(found[:, :, :1], x[:, :, :1])  # the token in front is not rotated
    assert torch.allclose(as_complex(found[:, :, 1:]), as_complex(x[:, :, 1:]) * phases)
    assert torch.allclose(rotated(found, tables[0], -tables[1], pairs), x)
    cosines, sines = tables
    swapped = dataclasses.replace(rotary, sine_first=True)
    other_forms = [
        (rotary, [(cosines, sines)]),
        (rotary, [torch.cat((cosines, sines), -1)]),
        (swapped, [torch.cat((sines, cosines), -1)[None]]),
        (swapped, [angles.sin(), angles.cos()]),
    ]
    for form, values in other_forms:
        assert all(map(torch.equal, cosines_and_sines(form, values, 3, 8), tables))


def test_biases_of_pairs_are_looked_up_and_prefix_tokens_get_none() -> None:
    parameter = torch.arange(6.0).view(2, 3)  # two heads, three entries
    entries = entries_by_head(Bias("table", False, heads_first=True), parameter, 2)
    assert torch.equal(entries, entries_by_head(Bias("table", False), parameter.T, 2))
    found = bias_of_pairs(entries, torch.tensor([0, 1, 2, 0]), 3)
    assert found.tolist() == [[[0, 0, 0], [0, 0, 1], [0, 2, 0]], [[0, 0, 0], [0, 3, 4], [0, 5, 3]]]
