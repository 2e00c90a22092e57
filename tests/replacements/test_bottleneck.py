"""Bottleneck convolutions alone: of the right weights and stock layers, folded, and set to a linear map."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import reference
from layers import DIM, DOUBLE, GRID, HEADS, make_layer, tokens
from spvit.hosts.grid import Grid
from spvit.hosts.weights import read_weights
from spvit.replacements import bottleneck as module
from spvit.replacements import kernels
from spvit.replacements.bottleneck import BottleneckConv
from spvit.search.gated_attention import GatedAttention
from tiny import assert_close, assert_differ, randomise


def _bottleneck(layer: GatedAttention, kind: str) -> BottleneckConv:
    convert, batchnorm = {
        "conv3": (kernels.conv3_weights, layer.bn3),
        "conv1": (kernels.conv1_weights, layer.bn1),
    }[kind]
    weights = convert(layer.head_mix(), read_weights(layer.attention, layer.site))
    return BottleneckConv(weights, copy.deepcopy(batchnorm), layer.site.prefix_tokens, Grid(*GRID))


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


def test_the_grid_must_fit_the_tokens() -> None:
    for kind in ("conv3", "conv1"):
        bottleneck = _bottleneck(make_layer(), kind)
        bottleneck.grid.height, bottleneck.grid.width = 2, 3
        with pytest.raises(ValueError, match="got 12 grid tokens, expected a grid of 2 x 3; call the whole model on"):
            bottleneck(tokens())
        assert bottleneck(tokens()[:, :7]).shape == (2, 7, DIM)


def test_orientation_of_the_grid_matters() -> None:
    bottleneck = _bottleneck(make_layer(), "conv3").eval()
    before = bottleneck(tokens())
    bottleneck.grid.height, bottleneck.grid.width = GRID[::-1]
    assert_differ(bottleneck(tokens()), before)


def test_pickle_and_copy() -> None:
    bottleneck = _bottleneck(make_layer(), "conv3").eval()
    for twin in (copy.deepcopy(bottleneck), pickle.loads(pickle.dumps(bottleneck))):
        assert torch.equal(twin(tokens()), bottleneck(tokens()))


def test_hidden_width_is_one_head() -> None:
    assert _bottleneck(make_layer(), "conv3").conv_in.weight.shape == (DIM // HEADS, DIM, 3, 3)
    assert _bottleneck(make_layer(), "conv1").conv_in.weight.shape == (DIM // HEADS, DIM)


@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
def test_prefix_tokens_go_their_own_way_through_a_bottleneck(prefix_tokens: int) -> None:
    layer = make_layer(prefix_tokens=prefix_tokens)
    plain = _bottleneck(layer, "conv3").eval()
    weights = kernels.conv3_weights(layer.head_mix(), read_weights(layer.attention, layer.site))
    bottleneck = BottleneckConv(weights, copy.deepcopy(layer.bn3), prefix_tokens, Grid(*GRID), "linear").eval()
    x = tokens(prefix_tokens)
    assert not bottleneck(x)[:, :prefix_tokens].any()  # until it is repaired or trained
    randomise(bottleneck.prefix, seed=2)
    out = bottleneck(x)
    assert_close(out[:, prefix_tokens:], plain(x)[:, prefix_tokens:])
    prefix = x[:, :prefix_tokens]
    if not prefix_tokens:
        assert isinstance(bottleneck.prefix, nn.Identity)
        return
    first, second = bottleneck.prefix
    assert first.weight.shape == second.weight.T.shape == (DIM // HEADS, DIM)
    expected = (prefix @ first.weight.T + first.bias) @ second.weight.T + second.bias
    assert_close(out[:, :prefix_tokens], expected)


@pytest.mark.parametrize("kind", ["conv3", "conv1"])
def test_a_bottleneck_is_set_to_a_linear_map_that_relu_leaves_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bottleneck = _bottleneck(make_layer(), kind).eval()
    generator = torch.Generator().manual_seed(0)
    inward = 0.05 * torch.randn(8, DIM * (9 if kind == "conv3" else 1), generator=generator, dtype=DOUBLE)
    outward = torch.randn(DIM, 8, generator=generator, dtype=DOUBLE)
    mean, out_mean = torch.randn(8, generator=generator, dtype=DOUBLE), torch.randn(DIM, dtype=DOUBLE)
    x = tokens().detach()
    columns = reference.im2col(x[:, 1:], GRID) if kind == "conv3" else x[:, 1:]
    expected = (columns @ inward.T - mean) @ outward.T + out_mean
    for margin, same in ((50.0, True), (0.0, False)):
        monkeypatch.setattr(module, "LINEAR_SIDE", margin)
        bottleneck.set_linear(inward, mean, torch.full_like(mean, 0.2), outward, out_mean)
        error = (bottleneck(x)[:, 1:] - expected).abs().max()
        assert (error < 1e-9) == same
        before = bottleneck(x)
        folded = copy.deepcopy(bottleneck)
        folded.fold_batchnorm()
        assert_close(folded(x), before)
