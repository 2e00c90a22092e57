"""Hosts whose attention works in windows of a map: what is special there; test_own_models has the contract."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import spvit
from spvit.architecture import Attention, dense
from spvit.errors import GridError
from spvit.hosts.behaviour.equations import places_of
from spvit.hosts.grid import GatheredGrid, Layout

pytest.importorskip("transformers")
from library_models import WINDOWED, WINDOWED_EXPECTED
from tiny import logits, randomise


def _host(name: str) -> tuple[spvit.Host, Tensor]:
    """Return a host whose attention works in windows, and two images."""
    model = randomise(WINDOWED[name]()).to(torch.float64).eval()
    x = torch.randn(2, *WINDOWED_EXPECTED[name].image, dtype=torch.float64)
    return spvit.recognise(model, x), x


def test_rows_are_found_where_they_come_from() -> None:
    source = torch.randn(6, 3)
    rows = torch.stack([source[4], torch.zeros(3), source[0], torch.zeros(3)])
    assert places_of(rows, source) == (4, -1, 0, -1)
    assert places_of(rows + torch.arange(4.0)[:, None], source) is None
    assert places_of(source[:2], source[[0, 0, 1]]) is None  # the first could come from either


def test_tokens_are_gathered_and_scattered_by_index() -> None:
    layout = Layout((3, 0, -1, 1, 2, -1), (3,))
    grid = GatheredGrid(2, 2, layout)
    tokens = torch.randn(5, 4, 2)
    windows = grid.scatter(tokens)
    assert windows.shape == (10, 3, 2)
    assert torch.equal(windows[2], torch.stack([tokens[1, 3], tokens[1, 0], torch.zeros(2)]))
    assert torch.equal(grid.gather(windows, 0), tokens)
    assert not grid.state_dict()
    with pytest.raises(GridError, match=r"got \[4, 2, 2\], expected \[windows, 3, channels\] for a map of 2 x 2"):
        grid.gather(torch.zeros(4, 2, 2), 0)


def test_masks_of_shifted_windows_and_learned_scales_are_found() -> None:
    for name in ("huggingface", "huggingface_v2", "swin_v2", "swin_v2_cr"):
        sites = [block.attention for block in _host(name)[0].blocks]
        assert [site.bias is not None and site.bias.mask is not None for site in sites] == [False, True] * 2
        assert {site.cosine for site in sites} == {site.head_scales for site in sites} == {name != "huggingface"}


@pytest.mark.parametrize("name", ["torchvision", "huggingface"])
def test_copies_are_the_model_and_images_of_another_size_are_refused(name: str) -> None:
    host, x = _host(name)
    whole = dense([block.ffn.units for block in host.blocks])
    kinds = zip(whole.blocks, ("conv3", "skip", "conv1", "msa"))
    mixed = replace(whole, blocks=tuple(replace(block, attention=Attention(kind)) for block, kind in kinds))
    larger = torch.zeros(1, 3, 72, 56, dtype=torch.float64)
    host.model(larger)
    for model in (spvit.prune(host, mixed), spvit.make_searchable(host)):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin, x), logits(model, x))
        with pytest.raises(GridError, match=r"images are 72 x 56, but the windows .* known for 36 x 28 only"):
            model(larger)


def test_answers_that_come_back_elsewhere_are_refused() -> None:
    model = randomise(WINDOWED["torchvision"]()).eval()
    block: Any = model.features[1][0]

    class Shuffled(type(block)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.roll(self.attn(self.norm1(x)), 1, dims=1)
            return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    block.__class__ = Shuffled
    message = r"features\.1\.0\.attn: what it answers for a token of a window does not come back to that token alone$"
    with pytest.raises(spvit.UnsupportedHostError, match=message):
        spvit.recognise(model, torch.zeros(1, 3, 36, 28))


def test_what_stands_between_blocks_must_be_one_module() -> None:
    model: Any = randomise(WINDOWED["torchvision"]()).eval()
    merging = model.features[2]
    merging.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    message = r"features\.3\.0 takes tokens .* that are not the output of features\.1\.1, .*, nor what one module makes"
    with pytest.raises(spvit.UnsupportedHostError, match=message):
        spvit.recognise(model, torch.zeros(1, 3, 36, 28))
