"""What replaces an attention layer, alone: bottleneck convolutions, skip, narrow linear layers, and the grid."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spvit.replacements.narrow import narrow_blindly
from spvit.pruned import BottleneckConv, Constant, Grid, NarrowAttention, Skip, as_map, as_tokens, narrow_linear
from spvit.search.gated_attention import GatedAttention
from torch import nn

import reference
import spvit
from layers import DIM, DOUBLE, GRID, HEADS, make_layer, tokens
from spvit.replacements import kernels
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.hosts.timm_vit import read_attention
from tiny import assert_all_close, assert_close, assert_differ, make_host, randomise


def _bottleneck(layer: GatedAttention, kind: str, returns_tuple: bool = False) -> BottleneckConv:
    convert, batchnorm = {
        "conv3": (kernels.conv3_weights, layer.bn3),
        "conv1": (kernels.conv1_weights, layer.bn1),
    }[kind]
    weights = convert(layer.head_mix(), read_attention(layer.attention))
    return BottleneckConv(weights, copy.deepcopy(batchnorm), layer.prefix_tokens, Grid(*GRID), returns_tuple)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["conv3", "conv1"])
@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
def test_bottleneck_is_the_reference_candidate(prefix_tokens: int, kind: str, training: bool) -> None:
    layer = make_layer(prefix_tokens=prefix_tokens)
    bottleneck = _bottleneck(layer, kind).train(training)
    x = tokens(prefix_tokens)
    out = bottleneck(x)
    bn = layer.bn3 if kind == "conv3" else layer.bn1
    assert_close(out, reference.bottleneck(x, layer, bn, list(range(9)) if kind == "conv3" else [4], training))
    assert torch.equal(out[:, :prefix_tokens], x[:, :prefix_tokens])
    assert_close(bottleneck.bn.running_var, bn.running_var)


@pytest.mark.parametrize("kind", ["conv3", "conv1"])
def test_bottleneck_is_made_of_stock_layers(kind: str) -> None:
    bottleneck = _bottleneck(make_layer(), kind)
    stock = {"conv3": nn.Conv2d, "conv1": nn.Linear}[kind]
    assert [type(child) for child in bottleneck.children()] == [stock, nn.BatchNorm2d, nn.ReLU, nn.Linear, nn.Identity]
    assert {parameter.dtype for parameter in bottleneck.parameters()} == {DOUBLE}
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in bottleneck.parameters())


@pytest.mark.parametrize("kind", ["conv3", "conv1"])
def test_folding_keeps_the_output_and_happens_once(kind: str) -> None:
    bottleneck = _bottleneck(make_layer(), kind).eval()
    x = tokens()
    before = bottleneck(x)
    for _ in range(2):
        bottleneck.fold_batchnorm()
        assert isinstance(bottleneck.bn, nn.Identity)
        assert_close(bottleneck(x), before)


def test_answers_in_the_form_of_the_layer_replaced() -> None:
    layer = make_layer()
    x = tokens()
    for kind in ("conv3", "conv1"):
        plain = _bottleneck(layer, kind).eval()
        out = _bottleneck(layer, kind, returns_tuple=True).eval()(x, None, attention_mask=None)
        assert isinstance(out, tuple)
        assert out[1] is None
        assert torch.equal(out[0], plain(x))
    assert torch.equal(Skip("zero", False)(x, None, is_causal=False), torch.zeros_like(x))
    assert torch.equal(Skip("normalised_input", False)(x), x)
    out, attention = Skip("zero", True)(x)
    assert attention is None
    assert not out.any()
    assert repr(Skip("zero", False)) == "Skip(rule='zero')"


def test_grid_follows_and_checks_the_tokens() -> None:
    grid = Grid(2, 3)
    x = torch.zeros(1, 8, 4)
    assert grid.size(x, 2) == (2, 3)
    with pytest.raises(ValueError, match="got 8 tokens, expected 1 prefix tokens and a grid of 2 x 3; call the whole"):
        grid.size(x, 1)
    bottleneck = _bottleneck(make_layer(), "conv3")
    bottleneck.grid.height, bottleneck.grid.width = 2, 3
    with pytest.raises(ValueError, match="got 13 tokens, expected 1 prefix tokens and a grid of 2 x 3"):
        bottleneck(tokens())
    assert bottleneck(tokens()[:, :7]).shape == (2, 7, DIM)


def test_orientation_of_the_grid_matters() -> None:
    bottleneck = _bottleneck(make_layer(), "conv3").eval()
    before = bottleneck(tokens())
    bottleneck.grid.height, bottleneck.grid.width = GRID[::-1]
    assert_differ(bottleneck(tokens()), before)


def test_maps_and_tokens_are_row_major_inverses() -> None:
    flat = torch.arange(2 * 6 * 4).view(2, 6, 4)
    feature_map = as_map(flat, (2, 3))
    assert feature_map.shape == (2, 4, 2, 3)
    assert torch.equal(feature_map[1, :, 1, 0], flat[1, 3])
    assert torch.equal(as_tokens(feature_map), flat)
    assert feature_map.data_ptr() == flat.data_ptr()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("units", [[0, 2, 5], [], [3]])
@pytest.mark.parametrize("axis", [0, 1])
def test_narrow_linear_selects(axis: int, units: list[int], bias: bool) -> None:
    linear = nn.Linear(6, 6, bias=bias, dtype=DOUBLE).eval()
    linear.weight.requires_grad_(False)
    narrow = narrow_linear(linear, torch.tensor(units, dtype=torch.long), axis)
    expected = linear.weight[units] if axis == 0 else linear.weight[:, units]
    assert torch.equal(narrow.weight, expected)
    assert (narrow.out_features, narrow.in_features) == tuple(expected.shape)
    assert not narrow.training
    assert not narrow.weight.requires_grad
    if not bias:
        assert narrow.bias is None
        return
    assert torch.equal(narrow.bias, linear.bias[units] if axis == 0 else linear.bias)
    assert narrow.bias.requires_grad
    assert narrow.weight.data_ptr() != linear.weight.data_ptr()
    x = torch.randn(2, narrow.in_features, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    assert_close(narrow(x), x @ expected.T + narrow.bias)


def test_pickle_and_copy() -> None:
    bottleneck = _bottleneck(make_layer(), "conv3").eval()
    for twin in (copy.deepcopy(bottleneck), pickle.loads(pickle.dumps(bottleneck))):
        assert torch.equal(twin(tokens()), bottleneck(tokens()))


def test_hidden_width_is_one_head() -> None:
    assert _bottleneck(make_layer(), "conv3").conv_in.weight.shape == (DIM // HEADS, DIM, 3, 3)
    assert _bottleneck(make_layer(), "conv1").conv_in.weight.shape == (DIM // HEADS, DIM)


NARROW = {
    "heads": Attention(heads=(0, 2)),
    "ranks": Attention(query_key_rank=3, value_rank=5),
    "all": Attention(heads=(1,), query_key_rank=5, value_rank=2),
}


def _narrow(library: str, kept: Attention, bias: bool = True) -> tuple[NarrowAttention, nn.Module]:
    """Return narrow attention in training mode, and the layer it was made from."""
    layer = make_layer(library, bias)
    access = layer.access
    projections = access.read_projections(layer.attention)
    narrow = NarrowAttention(narrow_blindly(projections, kept), projections, access.returns_tuple)
    return narrow.train(), layer.attention


def _by_head(narrow: NarrowAttention) -> SimpleNamespace:
    """Return views of the packed weights by head."""
    sizes = [narrow.heads * narrow.query_key_rank] * 2 + [narrow.heads * narrow.value_rank]
    found = SimpleNamespace(scale=narrow.scale)
    for suffix, packed in (("weight", narrow.qkv.weight), ("bias", narrow.qkv.bias)):
        parts = [None] * 3 if packed is None else packed.split(sizes)
        for name, part in zip(("query", "key", "value"), parts):
            setattr(found, f"{name}_{suffix}", None if part is None else part.unflatten(0, (narrow.heads, -1)))
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("library", ["timm", "huggingface"])
@pytest.mark.parametrize("kept", NARROW)
def test_narrow_attention_is_attention_a_head_at_a_time(kept: str, library: str, bias: bool, masked: bool) -> None:
    narrow, _ = _narrow(library, NARROW[kept], bias)
    assert narrow.scale == (DIM // HEADS) ** -0.5  # of the whole layer, whatever the rank
    assert all(parameter.dtype == DOUBLE and parameter.is_leaf for parameter in narrow.parameters())
    generator = torch.Generator().manual_seed(8)
    mask = torch.randn(1, 1, 13, 13, generator=generator, dtype=DOUBLE) if masked else None
    results = []
    for naive in (False, True):
        narrow.zero_grad()
        x = tokens()
        if naive:
            heads = reference.heads_out(x, _by_head(narrow), None if mask is None else mask[0])
            out = heads.flatten(2) @ narrow.proj.weight.T + (0 if narrow.proj.bias is None else narrow.proj.bias)
        else:
            out = narrow(x, mask)
            assert isinstance(out, tuple) == (library == "huggingface")
            if isinstance(out, tuple):
                assert out[1] is None
                out = out[0]
        (out * torch.linspace(-1, 1, out.numel(), dtype=DOUBLE).view_as(out)).sum().backward()
        results.append((out.detach(), x.grad, {name: p.grad for name, p in narrow.named_parameters()}))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])
    assert_all_close(results[0][2], results[1][2])


@pytest.mark.parametrize("library", ["timm", "huggingface"])
def test_narrow_attention_takes_the_arguments_of_the_layer_it_replaces(library: str) -> None:
    narrow, layer = _narrow(library, Attention(query_key_rank=DIM // HEADS))  # the whole layer in other words
    layer.eval()
    narrow.eval()
    x = tokens().detach()
    mask = torch.full((1, 1, 13, 13), float("-inf"), dtype=DOUBLE).triu(1)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((x,), {}), ((x, mask), {})]
    if library == "timm":
        calls += [((x,), {"attn_mask": mask, "is_causal": False}), ((x, None, True), {}), ((x,), {"is_causal": True})]
    outputs = []
    for args, options in calls:
        out, expected = narrow(*args, **options), layer(*args, **options)
        out, expected = (out[0], expected[0]) if library == "huggingface" else (out, expected)
        assert (out - expected).abs().max() < 1e-8
        outputs.append(out)
    assert_differ(outputs[1], outputs[0])


def test_narrow_attention_drops_out_in_training_only() -> None:
    narrow, _ = _narrow("timm", NARROW["ranks"])
    x = tokens()
    expected = narrow(x)
    for name in ("dropout", "out_drop"):
        twin = copy.deepcopy(narrow)
        twin.dropout, twin.out_drop.p = (0.5, 0.0) if name == "dropout" else (0.0, 0.5)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(twin.eval()(x), expected)


def test_narrow_attention_can_be_copied_pickled_and_printed() -> None:
    narrow, _ = _narrow("timm", NARROW["all"])
    assert "heads=1, query_key_rank=5, value_rank=2" in repr(narrow)
    assert [type(child) for child in narrow.children()] == [nn.Linear, *[nn.Identity] * 3, nn.Linear, nn.Dropout]
    for twin in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert torch.equal(twin(tokens()), narrow(tokens()))
    assert [part.shape for part in (narrow.qkv.weight, narrow.proj.weight)] == [(12, DIM), (DIM, 2)]


def test_constants_are_one_a_prefix_token_and_one_for_the_rest() -> None:
    constant = Constant(3, DIM, {"dtype": DOUBLE})
    assert not constant.bias.any()
    with torch.no_grad():
        constant.bias.copy_(torch.arange(3)[:, None].expand(-1, DIM))
    for count in (2, 3, 7):  # any grid
        assert constant(torch.randn(2, count, DIM))[1, :, 0].tolist() == [0, 1, 2, 2, 2, 2, 2][:count]
    mean = Skip("mean", True, constant)
    out, attention = mean(tokens(), None)
    assert attention is None
    assert_close(out, constant(tokens()))


@pytest.mark.parametrize("rule", ["mean", "linear"])
@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
def test_prefix_tokens_go_their_own_way_through_a_bottleneck(prefix_tokens: int, rule: str) -> None:
    layer = make_layer(prefix_tokens=prefix_tokens)
    plain = _bottleneck(layer, "conv3").eval()
    weights = kernels.conv3_weights(layer.head_mix(), read_attention(layer.attention))
    bottleneck = BottleneckConv(weights, copy.deepcopy(layer.bn3), prefix_tokens, Grid(*GRID), False, rule).eval()
    x = tokens(prefix_tokens)
    assert not bottleneck(x)[:, :prefix_tokens].any()  # until it is repaired or trained
    randomise(bottleneck.prefix, seed=2)
    out = bottleneck(x)
    assert_close(out[:, prefix_tokens:], plain(x)[:, prefix_tokens:])
    prefix = x[:, :prefix_tokens]
    if not prefix_tokens:
        assert isinstance(bottleneck.prefix, nn.Identity)
    elif rule == "mean":
        assert_close(out[:, :prefix_tokens], bottleneck.prefix.bias.expand(2, -1, -1))
    else:
        first, second = bottleneck.prefix
        assert first.weight.shape == second.weight.T.shape == (DIM // HEADS, DIM)
        expected = (prefix @ first.weight.T + first.bias) @ second.weight.T + second.bias
        assert_close(out[:, :prefix_tokens], expected)


@pytest.mark.parametrize("kind", ["conv3", "conv1"])
def test_a_bottleneck_is_set_to_a_linear_map_that_relu_leaves_alone(kind: str) -> None:
    bottleneck = _bottleneck(make_layer(), kind).eval()
    generator = torch.Generator().manual_seed(0)
    inward = 0.05 * torch.randn(8, DIM * (9 if kind == "conv3" else 1), generator=generator, dtype=DOUBLE)
    outward = torch.randn(DIM, 8, generator=generator, dtype=DOUBLE)
    mean, out_mean = torch.randn(8, generator=generator, dtype=DOUBLE), torch.randn(DIM, dtype=DOUBLE)
    x = tokens().detach()
    columns = reference.im2col(x[:, 1:], GRID) if kind == "conv3" else x[:, 1:]
    expected = (columns @ inward.T - mean) @ outward.T + out_mean
    for margin, same in ((50.0, True), (0.0, False)):
        bottleneck.set_linear(inward, mean, torch.full_like(mean, 0.2), outward, out_mean, margin)
        error = (bottleneck(x)[:, 1:] - expected).abs().max()
        assert (error < 1e-9) == same
        before = bottleneck(x)
        folded = copy.deepcopy(bottleneck)
        folded.fold_batchnorm()
        assert_close(folded(x), before)
