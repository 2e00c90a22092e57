"""Hosts whose attention works in windows of a map, in stages: what is found of them, and the contract."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block, dense
from spvit.errors import GridError
from spvit.hosts.behaviour.equations import places_of
from spvit.hosts.calling import tokens_in
from spvit.hosts.grid import GatheredGrid, Layout
from spvit.hosts.weights import read_weights
from spvit.search.network import gated_layers
from tiny import (
    CLASSES,
    MIXED,
    TURNS,
    assert_close,
    assert_differ,
    assert_untouched,
    backward,
    choose,
    count_macs,
    everything_of,
    logits,
    randomise,
)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm = pytest.importorskip("timm")
        return timm.create_model(name, embed_dim=24, mlp_ratio=3, num_classes=CLASSES, **options)

    return build


def _torchvision(second: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        swin = pytest.importorskip("torchvision").models.swin_transformer
        parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if second else {}
        sizes = {"patch_size": [2, 2], "embed_dim": 24, "window_size": [4, 4], "mlp_ratio": 3}
        return swin.SwinTransformer(depths=[2, 2], num_heads=[3, 4], num_classes=CLASSES, **sizes, **parts)

    return build


def _huggingface(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = pytest.importorskip("transformers")
        return getattr(library, name)(getattr(library, config)(**options))

    return build


STAGES = {"depths": [2, 2], "num_heads": [3, 4], "patch_size": 2}
SWIN = {**STAGES, "embed_dim": 24, "window_size": 4, "mlp_ratio": 3.0, "num_labels": CLASSES}
SAM = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 8, "mlp_dim": 72}
GLOBAL = {"window_size": 3, "global_attn_indexes": (1,)}
HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "swin_v2": (_timm("swinv2_tiny_window8_256", img_size=(24, 40), window_size=4, **STAGES), (24, 40)),
    "swin_v2_cr": (_timm("swinv2_cr_tiny_224", img_size=32, window_size=4, **STAGES), (32, 32)),
    "sam": (
        _timm("samvit_base_patch16", img_size=64, patch_size=8, depth=4, num_heads=3, neck_chans=16, **GLOBAL),
        (64, 64),
    ),
    "torchvision": (_torchvision(False), (36, 28)),  # maps of 18 x 14 and 9 x 7: padded
    "torchvision_v2": (_torchvision(True), (36, 28)),
    "huggingface": (_huggingface("SwinForImageClassification", "SwinConfig", image_size=(36, 28), **SWIN), (36, 28)),
    "huggingface_v2": (_huggingface("Swinv2Model", "Swinv2Config", image_size=32, **SWIN), (32, 32)),
    "huggingface_sam": (
        _huggingface("SamVisionModel", "SamVisionConfig", image_size=64, output_channels=16, **SAM, **GLOBAL),
        (64, 64),
    ),
}


class Case:
    """A host with what is found in it; a test that changes the model works on a copy."""

    def __init__(self, name: str) -> None:
        self.name, (make, self.size) = name, HOSTS[name]
        self.model = randomise(make()).to(torch.float64).eval()
        self.x = self.images(2)
        self.host = spvit.recognise(self.model, self.images(1))
        self.whole = dense([block.ffn.units for block in self.host.blocks])

    def images(self, batch: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, *self.size, generator=generator, dtype=torch.float64)

    @cached_property
    def mixed(self) -> Architecture:
        """Every kind of attention, some units of every FFN, and rules that cost something."""
        widths = [block.ffn.units for block in self.host.blocks]
        ffns = (FFN(width, tuple(range(0, width, 2))) for width in widths)
        blocks = tuple(Block(Attention(kind), ffn) for kind, ffn in zip(MIXED, ffns))
        return Architecture(blocks, prefix_rule="linear", skip_rule="mean")

    @cached_property
    def repaired(self) -> nn.Module:
        return spvit.prune(self.host, self.mixed, repair=self.images(24, seed=1))


@pytest.fixture(name="case", scope="module", params=HOSTS)
def _case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def _out(model: nn.Module, x: Tensor) -> Tensor:
    out = logits(model, x)
    return out if isinstance(out, Tensor) else out.last_hidden_state


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


def test_all_is_found_and_nothing_is_changed(case: Case) -> None:
    before, state = everything_of(case.model), _out(case.model, case.x)
    found = spvit.recognise(case.model, case.images(3, seed=4))
    assert_untouched(case.model, before)
    assert torch.equal(_out(case.model, case.x), state)
    assert found.blocks == case.host.blocks
    assert [block.attention.heads for block in found.blocks] in ([3, 3, 4, 4], [3] * 4)
    grids = [block.attention.grid for block in found.blocks]
    windows = {block.attention.windows for block in found.blocks}
    if len(set(grids)) == 1:
        assert grids[0] == (8, 8)
        assert windows == {1, 9}
    else:
        height, width = case.size
        stages = ((height // 2, width // 2), (height // 4, width // 4))
        assert grids == [stages[0], stages[0], stages[1], stages[1]]
        assert [block.before is not None for block in found.blocks] == [False, False, True, False]


def test_keeping_everything_changes_no_bit(case: Case) -> None:
    expected = _out(case.model, case.x)
    assert torch.equal(_out(spvit.make_searchable(case.host), case.x), expected)
    for options in ({}, {"repair": case.images(4)}):
        kept = spvit.prune(case.host, case.whole, **options)
        assert torch.equal(_out(kept, case.x), expected)
        assert list(kept.state_dict()) == list(case.model.state_dict())


@pytest.mark.parametrize("kinds", [*TURNS, ("conv3",) * 4], ids="-".join)
def test_searchable_pruned_and_folded_agree_with_every_kind_in_every_block(case: Case, kinds: tuple[str, ...]) -> None:
    net = choose(randomise(spvit.make_searchable(case.host), seed=1), kinds).eval()
    expected = _out(net, case.x)
    assert_differ(expected[0], expected[1])
    assert_differ(_out(case.model, case.x), expected)
    architecture = spvit.decide(net)
    assert architecture.kinds() == kinds
    pruned = spvit.prune(case.host, architecture, weights=net)
    assert_close(_out(pruned, case.x), expected)
    assert_close(_out(spvit.fold(pruned), case.x), expected)


def test_a_search_step_moves_everything_and_costs_what_is_decided(case: Case) -> None:
    net = choose(randomise(spvit.make_searchable(case.host), seed=1), ("msa",) * 4).train()
    loss = spvit.BudgetLoss(net, macs="60%")
    assert loss.expected_cost().item() == pytest.approx(spvit.cost(case.host, spvit.decide(net))["macs"], rel=1e-6)
    torch.manual_seed(0)
    if case.host.family.classes(case.model):
        backward(net, case.x)
    else:
        _out_with_gradients(net, case.x).square().mean().backward()
    loss().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in spvit.gate_parameters(net))


def _out_with_gradients(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).last_hidden_state


def test_the_values_of_attention_are_those_of_its_tokens_as_they_arrive(case: Case) -> None:
    net = spvit.make_searchable(case.host)
    for layer, _ in gated_layers(net):
        seen: list[Any] = []
        handle = layer.register_forward_pre_hook(lambda *call, seen=seen: seen.extend(call[1:]), with_kwargs=True)
        net(case.x)
        handle.remove()
        x = tokens_in(layer.site, layer.attention, *seen)
        weights = read_weights(layer.attention, layer.site)
        expected = F.linear(x, weights.value_weight.flatten(0, 1))  # whose bias is added behind
        assert_close(layer.grid.gather(layer._attend(x, *seen)[1], 0), layer.grid.gather(expected.detach(), 0))


def test_costs_are_those_that_pytorch_counts(case: Case) -> None:
    x = case.images(1).to("meta")
    assert spvit.cost(case.host)["macs"] == count_macs(case.model, x)
    for kinds in (MIXED, TURNS[1]):
        blocks = (replace(b, attention=Attention(kind)) for b, kind in zip(case.mixed.blocks, kinds))
        architecture = replace(case.mixed, blocks=tuple(blocks))
        small = spvit.fold(spvit.prune(case.host, architecture))
        params = sum(parameter.numel() for parameter in small.parameters())
        assert spvit.cost(case.host, architecture) == {"macs": count_macs(small, x), "params": params}


def test_scores_decide_and_repair_brings_outputs_nearer(case: Case) -> None:
    host = case.host
    unseen = case.images(8, seed=9)
    expected = _out(case.model, unseen)
    cut = spvit.prune(host, case.mixed)
    assert _error(case.repaired, unseen, expected) < _error(cut, unseen, expected)
    assert_close(_out(spvit.fold(case.repaired), unseen), _out(case.repaired, unseen))
    if host.family.classes(case.model) == 0:
        return
    images = case.images(16, seed=1)
    scores = spvit.score(host, images, multiple=8)
    architecture = spvit.decide(host, macs="70%", scores=scores)
    assert spvit.cost(host, architecture)["macs"] <= 0.7 * spvit.cost(host)["macs"]
    repaired, cut = (spvit.prune(host, architecture, repair=repair) for repair in (images, None))
    assert _error(repaired, unseen, expected) < _error(cut, unseen, expected)


def _error(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    return (_out(model, x) - expected).square().mean().item()


def _pickled(net: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["copy", "pickle"])
def test_copies_are_the_model(case: Case, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    for model in (case.repaired, spvit.make_searchable(case.host)):
        assert torch.equal(_out(duplicate(model), case.x), _out(model, case.x))


def test_saved_models_load_onto_a_new_model_bit_for_bit(case: Case, tmp_path: Path) -> None:
    for stage, model in {"repaired": case.repaired, "folded": spvit.fold(case.repaired)}.items():
        loaded = spvit.load(spvit.save(model, tmp_path / stage), host=HOSTS[case.name][0]())
        assert torch.equal(_out(loaded, case.x), _out(model, case.x))


def test_exported_programs_take_any_batch(case: Case) -> None:
    model = spvit.fold(case.repaired)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (case.images(3),), dynamic_shapes=dynamic).module()
    for batch in (2, 5):
        x = case.images(batch, seed=batch)
        assert_close(_out(program, x), _out(model, x))


@pytest.mark.parametrize("name", ["huggingface", "huggingface_v2", "swin_v2", "swin_v2_cr"])
def test_narrow_attention_in_windows_of_full_rank_is_the_host(name: str) -> None:
    """Shifted windows have a mask each beside the bias; both stay. Swin V2 computes its biases, and learns scales."""
    case = Case(name)
    sites = [block.attention for block in case.host.blocks]
    assert [site.narrows_values for site in sites] == [True] * 4
    assert not any(site.narrows_queries for site in sites)
    shifted = [site.bias is not None and site.bias.mask is not None for site in sites]
    assert shifted == [False, True] * 2
    assert {site.cosine for site in sites} == {site.head_scales for site in sites} == {name != "huggingface"}
    expected = _out(case.model, case.x)

    def narrow(kept: list[Attention], **options: Any) -> nn.Module:
        blocks = (replace(block, attention=own) for block, own in zip(case.whole.blocks, kept))
        return spvit.prune(case.host, replace(case.whole, blocks=tuple(blocks)), **options)

    full = [Attention(heads=tuple(range(site.heads)), value_rank=site.head_width) for site in sites]
    assert (_out(narrow(full), case.x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    repaired = narrow(full, repair=case.images(16, seed=1))
    assert (_out(repaired, case.x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    small = [Attention(heads=(0, 2), value_rank=4)] * 4
    models = [narrow(small), narrow(small, repair=case.images(24, seed=1))]
    unseen = case.images(8, seed=9)
    errors = [_error(model, unseen, _out(case.model, unseen)) for model in models]
    assert 0 < errors[1] < errors[0]
    blocks = (replace(block, attention=own) for block, own in zip(case.whole.blocks, small))
    architecture = replace(case.whole, blocks=tuple(blocks))
    params = sum(parameter.numel() for parameter in models[0].parameters())
    macs = count_macs(models[0], case.images(1).to("meta"))
    assert spvit.cost(case.host, architecture) == {"macs": macs, "params": params}
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(models[1], (case.images(3),), dynamic_shapes=dynamic).module()
    assert_close(_out(program, unseen), _out(models[1], unseen))
    with pytest.raises(spvit.ArchitectureError, match="block 1: queries and keys"):
        narrow([full[0], Attention(query_key_rank=2), *full[2:]])


@pytest.mark.parametrize("name", ["torchvision", "huggingface"])
def test_images_of_another_size_are_refused(name: str) -> None:
    case = Case(name)
    x = torch.zeros(1, 3, 72, 56, dtype=torch.float64)
    case.model(x)
    for model in (case.repaired, spvit.make_searchable(case.host)):
        with pytest.raises(GridError, match=r"images are 72 x 56, but the windows .* known for 36 x 28 only"):
            model(x)


def test_answers_that_come_back_elsewhere_are_refused() -> None:
    model = randomise(HOSTS["torchvision"][0]()).eval()
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
    model: Any = randomise(HOSTS["torchvision"][0]()).eval()
    merging = model.features[2]
    merging.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    message = r"features\.3\.0 takes tokens .* that are not the output of features\.1\.1, .*, nor what one module makes"
    with pytest.raises(spvit.UnsupportedHostError, match=message):
        spvit.recognise(model, torch.zeros(1, 3, 36, 28))
