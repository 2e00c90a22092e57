"""Where attention looks: read from a pass of any host, as its own layer computes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.models.swin_transformer import window_reverse

import spvit
from spvit.architecture import Attention
from spvit.hosts.behaviour.watch import watch
from spvit.hosts.host import Host
from spvit.pages.comparison import looked_at
from tiny import EVERYTHING, assert_close, images, make_host


def weights_of(model: torch.nn.Module, path: str, x: torch.Tensor) -> torch.Tensor:
    """Return the attention weights of a timm layer, [B, H, N, M], from its own plain computation."""
    layer, seen = model.get_submodule(path), []
    layer.fused_attn = False
    handle = layer.attn_drop.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(x)
    handle.remove()
    layer.fused_attn = True
    return seen[0].detach()


@torch.no_grad()
def map_of(model: torch.nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    """Return where a block of a model looks."""
    site = Host.of(model).blocks[index].attention
    core = next(core for core in watch(model, x).cores if site.path in core.running)
    return looked_at(core, site)


@pytest.mark.parametrize("name", ["class_token", "registers", "average_pooling", "options", "non_square"])
def test_a_vit_is_read_as_its_own_layer_computes(name: str) -> None:
    host = make_host(name).eval()
    x, site = images(host, 3), Host.of(host).blocks[2].attention
    weights = weights_of(host, "blocks.2.attn", x)[:, :, : site.prefix_tokens or None].mean((1, 2))
    found = map_of(host, 2, x)
    assert found.shape == (3, *site.grid)
    assert_close(found.flatten(1), weights[:, site.prefix_tokens :])


@pytest.mark.parametrize("block", [0, 1])
def test_windows_go_back_to_their_place(block: int) -> None:
    host = make_host("swin").eval()
    x, layer = images(host, 2), host.layers[0].blocks[block]
    weights = weights_of(host, f"layers.0.blocks.{block}.attn", x).mean((1, 2))
    placed = window_reverse(weights.unflatten(1, layer.window_size)[..., None], layer.window_size, 16, 16)[..., 0]
    assert_close(map_of(host, block, x), torch.roll(placed, layer.shift_size, (1, 2)))


def test_a_narrow_layer_is_read_too() -> None:
    host = make_host("class_token").eval()
    x, whole = images(host, 2), map_of(host, 3, images(host, 2))
    last = replace(EVERYTHING.blocks[3], attention=Attention(heads=(0, 2), query_key_rank=8), tokens="prefix")
    small = spvit.prune(host, replace(EVERYTHING, blocks=(*EVERYTHING.blocks[:3], last))).eval()
    site = Host.of(host).blocks[3].attention
    with torch.no_grad():
        (core,) = [core for core in watch(small, x).cores if site.path in core.running]
    found = looked_at(core, site)
    expected = weights_of(host, "blocks.3.attn", x)[:, [0, 2], 0, 1:].mean(1)
    assert found.shape == whole.shape
    assert_close(found.flatten(1), expected)
