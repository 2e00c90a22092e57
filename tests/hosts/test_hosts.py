"""The contract of a host family, on every registered one, and what families refuse."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spvit.hosts.base import GridTracker, example_images, logits_of, network_costs
from spvit.pruned import Grid
from torch import Tensor, nn

import spvit
from spvit.errors import UnsupportedHostError
from spvit.hosts import family_of, family_of_library, registrations
from tiny import FAMILY_OF, HOSTS, assert_close, images, logits, make_host

timm = pytest.importorskip("timm")


def test_every_registered_class_has_a_tiny_host() -> None:
    found = {(type(make_host(name)).__module__.split(".")[0], type(make_host(name)).__name__) for name in HOSTS}
    assert found == {(item.package, name) for item in registrations() for name in item.classes}
    assert set(FAMILY_OF) == set(HOSTS)


@pytest.mark.parametrize("name", HOSTS)
def test_sites_are_where_the_family_says(name: str) -> None:
    host = make_host(name)
    family = family_of(host)
    x = images(host, batch=3)
    channels, height, width = family.input_size(host)
    assert example_images(family, host, 3).shape == x.shape == (3, channels, height, width)
    assert example_images(family, host).dtype == torch.float64
    blocks = family.blocks(host)
    assert len(blocks) == 4
    seen: dict[str, list[Tensor]] = {}

    def record(path: str, module: nn.Module, args: Any, out: Any) -> None:
        seen[path] = [args[0], out[0] if isinstance(out, tuple) else out]

    for block in blocks:
        paths = [block.attention.path, block.ffn.first, block.ffn.second, block.attention.norm]
        for path in [path for path in paths if path is not None]:
            host.get_submodule(path).register_forward_hook(partial(record, path))
        value_path = f"{block.attention.path}.{family.access.value_projection}"
        host.get_submodule(value_path).register_forward_hook(partial(record, value_path))
    grids = family.track_grids(host, range(len(blocks)), whole=False)
    logits(host, x)

    for index, block in enumerate(blocks):
        site, ffn = block.attention, block.ffn
        tokens, out = seen[site.path]
        assert tokens.shape == out.shape == (3 * site.windows, site.keys, site.dim)
        assert site.tokens == site.prefix_tokens + site.grid[0] * site.grid[1] <= site.windows * site.keys
        assert (site.keys == site.tokens) or FAMILY_OF[name] == "timm_swin"
        assert (site.norm is None) == (name == "residual_post_norm")  # whose norm follows the attention
        if site.norm is not None:
            normalised = seen[site.norm][1].reshape(3, site.tokens, site.dim)
            gathered = grids[index].gather(tokens, site.prefix_tokens)
            assert torch.equal(normalised[:, site.prefix_tokens :], gathered)
            # What the host pads with is zero, and so is what a grid pads with.
            assert torch.equal(grids[index].scatter(gathered), tokens[:, site.prefix_tokens :])
        assert seen[ffn.first][1].shape == seen[ffn.second][0].shape == (3, site.tokens, ffn.units)
        attention = host.get_submodule(site.path)
        weights = family.access.read(attention)
        values = torch.einsum("bnd,hed->bnhe", tokens, weights.value_weight)
        if weights.value_bias is not None:
            values = values + weights.value_bias
        assert values.shape[2:] == (site.heads, site.head_width)
        captured = seen[f"{site.path}.{family.access.value_projection}"][1]
        assert_close(captured[..., -site.heads * site.head_width :], values.flatten(2))
        assert weights.out_weight.shape == (site.dim, site.heads, site.head_width)
        assert weights.out_bias is None or weights.out_bias.shape == (site.dim,)
        answered_tuple = isinstance(attention(tokens), tuple)
        assert answered_tuple == family.access.returns_tuple


@pytest.mark.parametrize("name", HOSTS)
def test_weights_are_views_through_which_gradients_flow(name: str) -> None:
    host = make_host(name)
    family = family_of(host)
    attention = host.get_submodule(family.blocks(host)[0].attention.path)
    weights = family.access.read(attention)
    sum(part.sum() for part in vars(weights).values() if part is not None).backward()
    touched = {
        n for n, parameter in attention.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    value, out = family.access.value_projection, "o_proj" if FAMILY_OF[name] == "huggingface" else "proj"
    expected = {f"{value}.weight", f"{out}.weight", f"{value}.bias", f"{out}.bias"}
    assert touched == expected & {n for n, _ in attention.named_parameters()}


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_can_be_built_again_from_its_source(name: str) -> None:
    host = make_host(name)
    source = family_of(host).source(host)
    family = family_of_library(source["library"], source.get("class"))
    assert family is family_of(host)
    twin = family.build(json.loads(json.dumps(source))).to(torch.float64).eval()
    assert type(twin) is type(host)
    twin.load_state_dict(host.state_dict(), strict=True)
    assert torch.equal(logits(twin, images(host)), logits(host, images(host)))


@pytest.mark.parametrize("name", HOSTS)
def test_the_tracked_grid_follows_the_images(name: str) -> None:
    host = make_host(name)
    family = family_of(host)
    expected = {index: block.attention.grid for index, block in enumerate(family.blocks(host)) if index != 1}
    grids = family.track_grids(host, list(expected), whole=False)
    assert {index: (grid.height, grid.width) for index, grid in grids.items()} == expected
    for grid in grids.values():
        grid.height = grid.width = 0
    logits(host, images(host))
    assert {index: (grid.height, grid.width) for index, grid in grids.items()} == expected


@pytest.mark.parametrize("name", HOSTS)
def test_tracking_no_block_leaves_the_host_alone(name: str) -> None:
    host = make_host(name)
    assert family_of(host).track_grids(host, [], whole=True) == {}
    assert not any(module._forward_pre_hooks for module in host.modules())


def test_grid_tracker_counts_patches() -> None:
    x = torch.zeros(1, 3, 70, 96)
    for pads, expected in ((False, (4, 6)), (True, (5, 6))):
        grid = Grid(0, 0)
        GridTracker(grid, (16, 16), pads)(nn.Identity(), (x,))
        assert (grid.height, grid.width) == expected


@pytest.mark.parametrize("name", ["class_token", "swin"])
@pytest.mark.parametrize("change", ["classes", "pooling", "input size"])
def test_a_host_changed_after_it_was_made_is_built_as_it_is_now(change: str, name: str) -> None:
    host = make_host(name)
    if change == "classes":
        host.reset_classifier(3)
    elif change == "pooling":
        host.reset_classifier(3, "avg")
    else:
        host.set_input_size((96, 64))
    host = host.to(torch.float64).eval()
    twin = family_of(host).build(family_of(host).source(host)).to(torch.float64).eval()
    twin.load_state_dict(host.state_dict(), strict=True)
    assert torch.equal(logits(twin, images(host)), logits(host, images(host)))


def test_input_size_can_change_before_a_search() -> None:
    host = make_host("class_token")
    host.set_input_size((96, 64))
    assert family_of(host).input_size(host) == (3, 96, 64)
    assert Host.of(host).blocks[0].attention.grid == (6, 4)


def test_costs_of_all_metrics() -> None:
    host = make_host("class_token")
    costs = network_costs(host)
    assert {metric: cost.metric for metric, cost in costs.items()} == {"macs": "macs", "params": "params"}


def test_logits_are_found_in_any_answer() -> None:
    scores = torch.zeros(2, 3)
    for answer in (scores, (scores, None), [scores], SimpleNamespace(logits=scores)):
        assert logits_of(answer) is scores
    for answer in ({}, (), SimpleNamespace(logits=None), None, ("a",)):
        with pytest.raises(
            UnsupportedHostError, match=f"cannot find class logits in a {type(answer).__name__}; expected"
        ):
            logits_of(answer)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (lambda: timm.create_model("test_resnet"), r"timm\.models\.resnet\.ResNet"),
        (type("VisionTransformer", (nn.Module,), {}), r"test_hosts\.VisionTransformer"),
    ],
)
def test_unknown_families_are_refused_by_name(make: Any, named: str) -> None:
    supported = (
        r"supported are timm: VisionTransformer, VisionTransformerDistilled; timm: SwinTransformer; transformers"
    )
    with pytest.raises(UnsupportedHostError, match=rf"{named} is not a supported model family; {supported}"):
        family_of(make())
    with pytest.raises(UnsupportedHostError, match="library 'keras' is unknown, expected one of timm, transformers$"):
        family_of_library("keras")
    known = "VisionTransformer, VisionTransformerDistilled, SwinTransformer"
    with pytest.raises(UnsupportedHostError, match=f"class 'ResNet' of timm is unknown, expected one of {known}$"):
        family_of_library("timm", "ResNet")


def test_files_that_name_no_class_are_of_the_first_family() -> None:
    assert family_of_library("timm") is family_of(make_host("class_token"))
    assert family_of_library("timm", "SwinTransformer") is family_of(make_host("swin"))


class _OddLinear(nn.Linear):
    pass


def _with_odd_first_layer() -> nn.Module:
    host = make_host("class_token")
    host.blocks[1].mlp.fc1 = _OddLinear(24, 72)
    return host


def _timm(**options: Any) -> nn.Module:
    small = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**small, **options})


def _layer(name: str) -> Any:
    return getattr(timm.layers, name, None) or getattr(timm.models.vision_transformer, name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _timm(patch_drop_rate=0.5), "with patch_drop_rate > 0 drops patches, .* patch_drop_rate=0"),
        (
            lambda: timm.models.VisionTransformer(img_size=None, pos_embed="none", no_embed_class=True, depth=1),
            "without an img_size has no patch grid; create it with img_size=",
        ),
        (
            lambda: _timm(block_fn=_layer("ParallelScalingBlock")),
            r"blocks\.0 is a ParallelScalingBlock, .* with Block and ",
        ),
        (
            lambda: _timm(attn_layer="diff"),
            r"blocks\.0\.attn is a DiffAttention, .* supported with Attention there only",
        ),
        (
            lambda: _timm(mlp_layer=_layer("SwiGLU")),
            r"blocks\.0\.mlp is a SwiGLU, but .* supported with Mlp there only",
        ),
        (
            lambda: _timm(scale_mlp_norm=True),
            r"blocks\.0\.mlp\.norm is a LayerNorm over the hidden units, ",
        ),
        (_with_odd_first_layer, r"blocks\.1\.mlp\.fc1 is a _OddLinear, but .* with Linear there only"),
    ],
)
def test_parts_that_timm_hosts_may_not_have(make: Any, message: str) -> None:
    host = make()
    with pytest.raises(UnsupportedHostError, match=message):
        spvit.make_searchable(host)


def test_parts_that_hugging_face_hosts_may_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = pytest.importorskip("transformers.models.vit.modeling_vit")
    for part in ("attention", "mlp"):
        host = make_host("huggingface")
        setattr(host.vit.layers[2], part, nn.Identity())
        with pytest.raises(UnsupportedHostError, match=rf"vit\.layers\.2\.{part} is a Identity, but Hugging Face "):
            spvit.make_searchable(host)
    host = make_host("huggingface")
    monkeypatch.delattr(vit, "ViTMLP")
    with pytest.raises(
        UnsupportedHostError, match=r"this version of transformers lays Hugging Face .* out differently"
    ):
        spvit.make_searchable(host)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "layers.1",
            r"layers\.1 is a Identity, but timm SwinTransformer hosts are supported with SwinTransformerStage",
        ),
        ("layers.1.blocks.0", r"layers\.1\.blocks\.0 is a Identity, but .* with SwinTransformerBlock there only"),
        ("layers.0.blocks.1.attn", r"layers\.0\.blocks\.1\.attn is a Identity, but .* with WindowAttention there only"),
        ("layers.0.blocks.1.attn.qkv", r"blocks\.1\.attn\.qkv is a Identity, but .* with Linear there only"),
        ("layers.0.blocks.1.attn.proj", r"blocks\.1\.attn\.proj is a Identity, but .* with Linear there only"),
        ("layers.1.blocks.1.mlp", r"blocks\.1\.mlp is a Identity, but .* with Mlp there only"),
        ("layers.1.blocks.1.mlp.fc2", r"blocks\.1\.mlp\.fc2 is a Identity, but .* with Linear there only"),
    ],
)
def test_parts_that_swin_hosts_may_not_have(path: str, message: str) -> None:
    host = make_host("swin")
    host.set_submodule(path, nn.Identity())
    with pytest.raises(UnsupportedHostError, match=message):
        spvit.make_searchable(host)


def test_swin_hosts_may_not_norm_their_hidden_units() -> None:
    host = make_host("swin")
    host.layers[0].blocks[1].mlp.norm = nn.LayerNorm(72)
    with pytest.raises(UnsupportedHostError, match=r"layers\.0\.blocks\.1\.mlp\.norm is a LayerNorm over the hidden "):
        spvit.make_searchable(host)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
def test_relatives_of_the_families_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        host = timm.create_model(name)
    with pytest.raises(UnsupportedHostError, match=rf"{type(host).__name__} is not a supported model family"):
        family_of(host)


def test_hosts_that_cannot_be_described_are_refused() -> None:
    own = timm.models.VisionTransformer(img_size=32, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(UnsupportedHostError, match=r"was not made by timm\.create_model, so its name"):
        family_of(own).source(own)
    odd = _timm(norm_layer=nn.LayerNorm)
    with pytest.raises(UnsupportedHostError, match=r"created with norm_layer=<class .*LayerNorm'>, which cannot"):
        family_of(odd).source(odd)
    spvit.make_searchable(own)
    spvit.make_searchable(odd)
