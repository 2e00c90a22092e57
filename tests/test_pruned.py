"""What replaces an attention layer, alone: bottleneck convolutions, skip, narrow linear layers, and the grid."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import reference
from spvit import kernels
from spvit.hosts.timm_vit import read_attention
from spvit.pruned import BottleneckConv, Grid, Skip, as_map, as_tokens, narrow_linear
from spvit.searchable import SearchableAttention
from test_searchable import DIM, DOUBLE, GRID, HEADS, make_layer, tokens
from tiny import assert_close, assert_differ


def _bottleneck(layer: SearchableAttention, kind: str, returns_tuple: bool = False) -> BottleneckConv:
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
