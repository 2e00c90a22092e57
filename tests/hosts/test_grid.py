"""The patch grid: how it lies in the tokens, and how it follows the images that pass."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from spvit.hosts.grid import Grid, as_tokens, follow
from spvit.hosts.host import Host
from tiny import HOSTS, images, logits, make_host


def test_maps_and_tokens_are_row_major_inverses() -> None:
    flat = torch.arange(2 * 6 * 4).view(2, 6, 4)
    feature_map = Grid(2, 3).as_map(flat)
    assert feature_map.shape == (2, 4, 2, 3)
    assert torch.equal(feature_map[1, :, 1, 0], flat[1, 3])
    assert torch.equal(as_tokens(feature_map), flat)
    assert feature_map.data_ptr() == flat.data_ptr()


def test_a_grid_must_fit_its_tokens() -> None:
    with pytest.raises(ValueError, match="a convolution got 8 grid tokens, expected a grid of 2 x 3; call the whole"):
        Grid(2, 3).as_map(torch.zeros(1, 8, 4))


def test_prefix_tokens_stand_before_the_grid() -> None:
    x = torch.arange(24.0).view(1, 8, 3)
    grid = Grid(2, 3)
    assert torch.equal(grid.gather(x, 2), x[:, 2:])
    assert torch.equal(grid.scatter(x[:, 2:]), x[:, 2:])


@pytest.mark.parametrize("name", HOSTS)
def test_the_watched_grid_follows_the_images_until_it_is_taken_back(name: str) -> None:
    host = Host.of(make_host(name))
    expected = {index: block.attention.grid for index, block in enumerate(host.blocks) if index != 1}
    undo = ExitStack()
    grids = host.family.watch_grids(host.model, list(expected), undo)
    assert {index: (grid.height, grid.width) for index, grid in grids.items()} == expected
    for grid in grids.values():
        grid.height = grid.width = 0
    logits(host.model, images(host.model))
    assert {index: (grid.height, grid.width) for index, grid in grids.items()} == expected
    undo.close()
    assert not any(module._forward_pre_hooks for module in host.model.modules())


@pytest.mark.parametrize("name", HOSTS)
def test_watching_no_block_leaves_the_host_alone(name: str) -> None:
    host = Host.of(make_host(name))
    for watch in (host.family.watch_grids, host.family.whole_grids):
        assert watch(host.model, [], ExitStack()) == {}
    assert not any(module._forward_pre_hooks for module in host.model.modules())


def test_a_grid_that_follows_images_counts_patches() -> None:
    x = torch.zeros(1, 3, 70, 96)
    grid = Grid(0, 0)
    follow(grid, (16, 16), nn.Identity(), (x,))
    assert (grid.height, grid.width) == (4, 6)
