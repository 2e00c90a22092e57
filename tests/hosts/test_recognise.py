"""Which models are hosts: families are found by class, and parts that they do not know are refused by name."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from torch import nn

import spvit
from spvit.errors import NotSearchableError, UnsupportedHostError
from spvit.hosts.behaviour.discover import discover
from spvit.hosts.host import Host
from spvit.hosts.recognise import ADAPTERS, family_of
from tiny import ALIKE, FAMILY_OF, HOSTS, make_host

timm = pytest.importorskip("timm")


def test_every_registered_class_has_a_tiny_host() -> None:
    found = {(type(make_host(name)).__module__.split(".")[0], type(make_host(name)).__name__) for name in HOSTS}
    assert found > set(ADAPTERS)
    assert set(FAMILY_OF) == set(HOSTS)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (lambda: timm.create_model("test_resnet"), r"timm\.models\.resnet\.ResNet"),
        (type("VisionTransformer", (nn.Module,), {}), r"test_recognise\.VisionTransformer"),
    ],
)
def test_unknown_families_are_refused_by_name(make: Any, named: str) -> None:
    with pytest.raises(UnsupportedHostError, match=rf"{named} is not supported: "):
        family_of(make())


@pytest.mark.parametrize("name", [name for name in ALIKE if not name.startswith("huggingface")])
def test_what_is_known_by_class_is_what_recognition_finds(name: str) -> None:
    host = Host.of(make_host(name))
    found = discover(host.model, host.input_size)
    assert found.sites == host.blocks
    assert found.classes(host.model) == host.family.classes(host.model)


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


PARTS = {"mlp_layer": _layer("SwiGLU"), "scale_mlp_norm": True}


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
            r"blocks\.0\.attn is a \S+\.DiffAttention, .* supported with exactly \S+\.Attention there",
        ),
        (
            _with_odd_first_layer,
            r"blocks\.1\.mlp\.fc1 is a \S+\._OddLinear, .* supported with exactly \S+\.Linear there",
        ),
    ],
)
def test_parts_that_timm_hosts_may_not_have(make: Any, message: str) -> None:
    host = make()
    with pytest.raises(UnsupportedHostError, match=message):
        spvit.make_searchable(host)


def test_parts_of_another_kind_that_act_as_they_must_are_taken() -> None:
    gated, normed = (Host.of(_timm(**{name: value})) for name, value in PARTS.items())
    assert [rows.linear for rows in gated.blocks[1].ffn.first] == ["blocks.1.mlp.fc1_g", "blocks.1.mlp.fc1_x"]
    assert normed.blocks[1].ffn.norm == "blocks.1.mlp.norm"
    with pytest.raises(NotSearchableError, match=r"^blocks\.0\.mlp\.norm is a norm over an FFN's hidden units"):
        spvit.make_searchable(normed)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("layers.1", "SwinTransformerStage"),
        ("layers.0.blocks.1.attn", "WindowAttention"),
        ("layers.0.blocks.1.attn.qkv", "Linear"),
        ("layers.0.blocks.1.attn.proj", "Linear"),
        ("layers.1.blocks.1.mlp.fc2", "Linear"),
    ],
)
def test_parts_that_swin_hosts_may_not_have(path: str, wanted: str) -> None:
    host = make_host("swin")
    host.set_submodule(path, nn.Identity())
    message = rf" {re.escape(path)} is a \S+\.Identity, but timm SwinTransformer hosts .* exactly \S+\.{wanted} there"
    with pytest.raises(UnsupportedHostError, match=message):
        spvit.make_searchable(host)


def test_swin_hosts_may_not_norm_their_hidden_units() -> None:
    host = make_host("swin")
    host.layers[0].blocks[1].mlp.norm = nn.LayerNorm(72)
    with pytest.raises(UnsupportedHostError, match=r"layers\.0\.blocks\.1\.mlp\.norm is a LayerNorm over the hidden "):
        spvit.make_searchable(host)


def test_recognition_needs_no_values_but_of_buffers() -> None:
    host = make_host("huggingface")
    assert family_of(copy.deepcopy(host).to("meta")) == family_of(host)
    with pytest.raises(
        UnsupportedHostError, match=r"Eva is not supported: it is on the meta device, where \S+ has no values; load"
    ):
        family_of(timm.create_model("eva02_tiny_patch14_224", depth=1).to("meta"))
