"""Heads and values narrow where the places of tokens act in attention: rotations and biases go with the kept heads."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.hosts.walk import BlockPair
from spvit.hosts.weights import read_weights
from spvit.repair.errors import attention_errors
from spvit.replacements.narrow_attention import NarrowAttention

pytest.importorskip("einops")
from positioned import POSITIONED, SMALL, Positioned
from tiny import assert_close, assert_differ, count_macs, randomise


class Case:
    """A model whose attention narrows under positions."""

    def __init__(self, form: Positioned) -> None:
        self.form = form
        self.model = randomise(form.make()).to(torch.float64).eval()
        self.host = spvit.recognise(self.model, form.images(2))

    def architecture(self, attention: Attention) -> Architecture:
        """Return the whole network, but for this attention in every block."""
        units = [block.ffn.units for block in self.host.blocks]
        return Architecture(tuple(Block(attention, FFN(count, tuple(range(count)))) for count in units))

    @property
    def some(self) -> Attention:
        """Two of three heads with five of their values, and half of the pairs that rotate where these may go."""
        site = self.host.blocks[0].attention
        return Attention(
            heads=(0, 2), query_key_rank=site.head_width // 2 if site.narrows_queries else None, value_rank=5
        )

    def prune(self, attention: Attention, repair: bool = False) -> nn.Module:
        images = self.form.images(24, seed=1) if repair else None
        return spvit.prune(self.host, self.architecture(attention), repair=images)

    @cached_property
    def narrow(self) -> nn.Module:
        """Narrow attention everywhere, repaired."""
        return self.prune(self.some, repair=True)


@pytest.fixture(name="case", scope="module", params=POSITIONED)
def _case(request: pytest.FixtureRequest) -> Case:
    return Case(POSITIONED[request.param])


@torch.no_grad()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    """Return logits, or all tokens."""
    out = model(x)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def narrow_layers(model: nn.Module) -> list[NarrowAttention]:
    return [module for module in model.modules() if isinstance(module, NarrowAttention)]


def test_full_rank_is_the_host(case: Case) -> None:
    x = case.form.images(2)
    expected, heads = answer(case.model, x), tuple(range(3))
    width, queries = case.host.blocks[0].attention.head_width, case.host.blocks[0].attention.narrows_queries
    for kept in (Attention(heads=heads), Attention("msa", heads, width if queries else None, width)):
        assert (answer(case.prune(kept, repair=True), x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert (answer(case.prune(Attention(heads=heads)), x) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("heads", [(0, 2), (1,)])
def test_a_head_that_goes_leaves_the_others_as_they_were(case: Case, heads: tuple[int, ...]) -> None:
    """As if the output projection read nothing of it."""
    x, silenced = case.form.images(2), copy.deepcopy(case.model)
    for block in case.host.blocks:
        site = block.attention
        weight = silenced.get_submodule(site.path).get_parameter(site.out.weight)
        with torch.no_grad():
            for head in set(range(3)) - set(heads):
                weight[:, site.out.indices(3, site.head_width)[head]] = 0
    expected = answer(silenced, x)
    assert_differ(expected, answer(case.model, x))
    assert_close(answer(case.prune(Attention(heads=heads)), x), expected)


def test_pairs_that_go_leave_the_others_as_they_were(case: Case) -> None:
    """As if queries and keys had zeros there; those with the largest products stay."""
    site = case.host.blocks[0].attention
    if not site.narrows_queries:
        with pytest.raises(spvit.ArchitectureError, match="or the places of tokens act on them"):
            case.prune(Attention(query_key_rank=2))
        return
    if site.rotary is None:  # a learned scale alone: any rank will do
        assert {layer.query_key_rank for layer in narrow_layers(case.prune(Attention(query_key_rank=3)))} == {3}
        return
    with pytest.raises(spvit.ArchitectureError, match="query_key_rank is 3, .* pairs there; give an even number"):
        case.prune(Attention(query_key_rank=3))
    x, zeroed, width = case.form.images(2), copy.deepcopy(case.model), site.head_width
    pruned = case.prune(Attention(heads=(1, 2), query_key_rank=width - 4))
    for layer, block in zip(narrow_layers(pruned), case.host.blocks):
        dense, site = zeroed.get_submodule(block.attention.path), block.attention
        weights = read_weights(dense, site)
        parts = [part.detach() for part in (weights.query_weight, weights.query_bias) if part is not None]
        keys = [part.detach() for part in (weights.key_weight, weights.key_bias) if part is not None]
        lengths = [
            sum(part.square().flatten(2).sum(2) if part.dim() > 2 else part**2 for part in own) for own in (parts, keys)
        ]
        for head in range(3):
            pairs = torch.arange(width).view(-1, 2) if site.rotary.pairs else torch.arange(width).view(2, -1).T
            going = (lengths[0][head][pairs].sum(1) * lengths[1][head][pairs].sum(1)).argsort()[:2]
            if head:
                assert not set(going.tolist()) & set(layer.pairs[head - 1].tolist())
            else:  # the head that goes
                going = torch.arange(0)
            for part in parts:
                part[head, pairs[going].flatten()] = 0
        weight = dense.get_parameter(site.out.weight)
        weight.detach()[:, site.out.indices(3, width)[0]] = 0
    assert_close(answer(pruned, x), answer(zeroed, x))


def test_gradients_reach_every_parameter_and_the_kept_entries_of_the_bias(case: Case) -> None:
    model = copy.deepcopy(case.narrow)
    out = model(case.form.images(2))
    out = out if isinstance(out, Tensor) else out.last_hidden_state
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    layers = narrow_layers(model)
    assert len(layers) == len(case.host.blocks)
    bias = case.form.bias
    for layer, block in zip(layers[:-1], case.host.blocks):  # the last one's class token may be all that is read
        dense = case.model.get_submodule(block.attention.path)
        assert all(parameter.grad.any() for parameter in layer.parameters())
        learned = bias is not None and not bias.argument
        assert list(dict(layer.named_parameters())).count("bias_table") == int(learned)
        if learned and bias.table is None:
            assert layer.bias_table.shape == (bias.entries, 2)
        elif learned:
            entries = dense.get_parameter(bias.table)
            entries = entries.reshape(3, -1).T if bias.heads_first else entries
            assert torch.equal(layer.bias_table, entries[:, [0, 2]])
        if learned:
            assert layer.bias_table.grad.abs().sum(0).all()


def test_costs_are_exact(case: Case) -> None:
    images = case.form.images(1).to("meta")
    for kept in (case.some, Attention(heads=(1,)), Attention(value_rank=3)):
        pruned = case.prune(kept)
        expected = spvit.cost(case.host, case.architecture(kept))
        assert expected["macs"] == count_macs(pruned, images)
        assert expected["params"] == sum(parameter.numel() for parameter in pruned.parameters())


@pytest.mark.slow  # test_own_models exports many of these, with fewer values
def test_exported_programs_take_any_batch(case: Case) -> None:
    x = case.form.images(5)
    program = torch.export.export(
        case.narrow, (case.form.images(3),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
    ).module()
    assert_close(answer(program, x), answer(case.narrow, x))


def test_copies_and_states_are_plain(case: Case) -> None:
    x, expected = case.form.images(2), answer(case.narrow, case.form.images(2))
    assert torch.equal(answer(copy.deepcopy(case.narrow), x), expected)
    other = case.prune(case.some)
    assert_differ(answer(other, x), expected)
    other.load_state_dict(case.narrow.state_dict())
    assert torch.equal(answer(other, x), expected)
    names = {name for layer in narrow_layers(case.narrow) for name in layer.state_dict()}
    assert names <= {
        *(f"{linear}.{part}" for linear in ("qkv", "proj") for part in ("weight", "bias")),
        *(
            "pairs",
            "bias_table",
            "head_scales",
            "query_norm.weight",
            "query_norm.bias",
            "key_norm.weight",
            "key_norm.bias",
        ),
    }


def test_the_repair_serves_and_what_it_misses_is_known(case: Case) -> None:
    unseen = case.form.images(8, seed=9)
    expected = answer(case.model, unseen)
    missed = [(answer(model, unseen) - expected).square().mean() for model in (case.narrow, case.prune(case.some))]
    assert missed[0] < missed[1]
    images = [case.form.images(24, seed=1)]
    block = case.host.blocks[0].path
    arrived: list[Tensor] = []
    handle = case.model.get_submodule(block).register_forward_pre_hook(
        lambda module, args, kwargs: arrived.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    answer(case.model, images[0])
    handle.remove()
    metric = torch.eye(case.host.blocks[0].attention.dim, dtype=torch.float64)
    with torch.no_grad():
        errors = attention_errors(BlockPair(case.model, case.host, 0, arrived, arrived), (4,), metric)
    queries = case.host.blocks[0].attention.narrows_queries
    assert {kept.query_key_rank for kept in errors} == ({None, 4} if queries else {None})
    assert {len(kept.heads or (0, 1, 2)) for kept in errors} == {1, 2, 3}
    assert {kept.value_rank for kept in errors} == {None, 4}


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"])
def test_tables_that_are_arguments_follow_the_size_of_the_images(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    options = {**SMALL, "dynamic_img_size": True, "img_size": 56 if "14" in name else 64}
    model = randomise(timm.create_model(name, **options)).to(torch.float64).eval()
    size = options["img_size"]
    case = Case.__new__(Case)
    case.model, case.host = model, spvit.recognise(model, torch.zeros(2, 3, size, size))
    narrow = spvit.prune(case.host, case.architecture(Attention(heads=(0, 1, 2))))
    x = torch.randn(2, 3, 2 * size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(answer(narrow, x), answer(model, x))
    assert_close(answer(narrow, x[..., :size, :]), answer(model, x[..., :size, :]))
