"""The last block for its prefix tokens alone: what it answers, costs, exports and saves."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spvit
from own_models import EXPECTED, OWN
from spvit.architecture import FFN, Architecture, Attention, Block, dense
from spvit.cost import count_params
from spvit.errors import ArchitectureError
from spvit.hosts.host import Host
from spvit.replacements.narrow import NarrowAttention
from spvit.replacements.prefix_only import PrefixOnly
from tiny import (
    HOSTS,
    assert_all_close,
    assert_close,
    assert_differ,
    backward,
    count_macs,
    logits,
    make_host,
    randomise,
)

BY_TOKEN = [
    "class_token",
    "distilled",
    "options",
    "no_biases",
    "non_square",
    "dynamic_padded",
    "huggingface",
    "huggingface_options",
]
"""Families' hosts behind whose last block prefix tokens alone are read: one, or two."""
OWN_BY_TOKEN = [
    "packed_registers",
    "head_major",
    "pairs",
    "multihead",
    "encoder_pre_norm",
    "encoder_post_norm",
    "clip",
    "parallel",
    "packed_swiglu",
    "rope_buffer",
    "keyword",
]
POOLED = ["registers", "rms_map_pool", "tutorial", "segmenter", "backbone"]
"""Hosts with prefix tokens of which the patch tokens are read, too."""


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[Host, Tensor]:
    """Return a randomised host in evaluation mode, and three images."""
    generator = torch.Generator().manual_seed(5)
    if name in HOSTS:
        host = Host.of(make_host(name, dtype))
        return host, torch.randn(3, *host.input_size, generator=generator, dtype=torch.float64).to(dtype)
    images = torch.randn(3, 3, *(8 * side for side in EXPECTED[name].grid), generator=generator, dtype=torch.float64)
    model = randomise(OWN[name]()).to(dtype).eval()
    return spvit.recognise(model, images.to(dtype)), images.to(dtype)


def prefix_alone(architecture: Architecture, **changed: Any) -> Architecture:
    """Return an architecture whose last block runs for prefix tokens alone, changed in other ways, too."""
    last = replace(architecture.blocks[-1], tokens="prefix", **changed)
    return replace(architecture, blocks=(*architecture.blocks[:-1], last))


def everything(host: Host) -> Architecture:
    return dense([block.ffn.units for block in host.blocks])


def narrow(host: Host) -> Architecture:
    """Return an architecture that narrows each block, the last one as far as its attention can be."""
    site = host.blocks[-1].attention
    attention = Attention("msa", (0, 2) if site.narrows_values else None, 4 if site.narrows_queries else None)
    ffn = FFN(host.blocks[-1].ffn.units, tuple(range(0, host.blocks[-1].ffn.units, 3)))
    return replace(everything(host), blocks=(Block(attention, ffn),) * len(host.blocks))


@pytest.mark.parametrize("name", [*BY_TOKEN, *OWN_BY_TOKEN])
def test_it_answers_what_the_whole_block_does(name: str) -> None:
    host, x = make(name)
    for architecture in (everything(host), narrow(host)):
        expected = spvit.prune(host, architecture)
        small = spvit.fold(spvit.prune(host, prefix_alone(architecture)))
        assert_close(logits(small, x), logits(expected, x))
        assert sum(isinstance(module, PrefixOnly) for module in small.modules()) >= 2
        assert spvit.cost(host, prefix_alone(architecture)) == {
            "macs": count_macs(small, x[:1].to("meta")),
            "params": count_params(small),
        }
        assert spvit.cost(host, prefix_alone(architecture))["macs"] < spvit.cost(host, architecture)["macs"]


@pytest.mark.parametrize("name", POOLED)
def test_where_patch_tokens_are_read_it_is_another_network(name: str) -> None:
    host, x = make(name)
    assert_differ(logits(spvit.prune(host, prefix_alone(everything(host))), x), logits(host.model, x))


def test_gradients_are_those_of_the_whole_block() -> None:
    host, x = make("class_token")
    expected = backward(host.model, x)
    found = backward(spvit.prune(host, prefix_alone(everything(host))), x)
    query, key_value = (found.pop(f"blocks.3.attn.{name}.weight") for name in ("query", "key_value"))
    biases = [found.pop(f"blocks.3.attn.{name}.bias") for name in ("query", "key_value")]
    found = {
        key.replace("mlp.fc1.linear", "mlp.fc1").replace("mlp.fc2.linear", "mlp.fc2"): grad
        for key, grad in found.items()
    }
    packed = {"blocks.3.attn.qkv.weight": torch.cat([query, key_value]), "blocks.3.attn.qkv.bias": torch.cat(biases)}
    assert_all_close({**found, **packed}, expected)


@pytest.mark.parametrize("name", ["class_token", "distilled", "huggingface"])
def test_it_is_copied_saved_and_exported(name: str, tmp_path: Path) -> None:
    host, x = make(name, torch.float32)
    small = spvit.prune(host, prefix_alone(narrow(host)))
    expected = logits(small, x)
    assert_close(logits(copy.deepcopy(small), x), expected)
    if name != "distilled":
        again = spvit.load(spvit.save(small, tmp_path / "small"))
        assert torch.equal(logits(again, x), expected)
        assert spvit.describe(tmp_path / "small").architecture == prefix_alone(narrow(host))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(small, (x,), dynamic_shapes=[{0: batch}])
    assert_close(logits(program.module(), torch.cat([x, x])), torch.cat([expected, expected]))


def test_it_follows_images_of_another_size() -> None:
    host, _ = make("dynamic_padded")
    x = torch.randn(2, 3, 96, 160, dtype=torch.float64)
    small = spvit.prune(host, prefix_alone(narrow(host)))
    assert_close(logits(small, x), logits(spvit.prune(host, narrow(host)), x))


def test_flags_and_modules_are_those_of_the_layers() -> None:
    host, _ = make("class_token")
    host.model.train()
    for name, parameter in host.model.blocks[3].named_parameters():
        parameter.requires_grad_("fc1" in name)
    block: Any = spvit.prune(host, prefix_alone(everything(host))).get_submodule("blocks.3")
    assert isinstance(block.attn, NarrowAttention)
    assert all(module.training for module in block.modules())
    flags = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    assert all(flag == ("fc1" in name) for name, flag in flags.items())
    assert "first=1" in str(block.attn)
    assert "prefix_tokens=1" in str(block.mlp.fc1)
    assert type(block.mlp.fc1.linear) is nn.Linear


def test_a_skipped_layer_goes_with_it() -> None:
    host, x = make("class_token")
    architecture = prefix_alone(everything(host), attention=Attention("skip"))
    whole = replace(architecture, blocks=(*architecture.blocks[:-1], replace(architecture.blocks[-1], tokens="all")))
    small = spvit.prune(host, architecture)
    assert_close(logits(small, x), logits(spvit.prune(host, whole), x))
    assert spvit.cost(host, architecture)["macs"] == count_macs(small, x[:1].to("meta"))


def test_a_failure_puts_the_block_back() -> None:
    host, x = make("class_token")
    expected, keys = logits(host.model, x), list(host.model.state_dict())
    with pytest.raises(spvit.CalibrationError):
        spvit.prune(host, prefix_alone(narrow(host)), repair=x * torch.inf, inplace=True)
    assert list(host.model.state_dict()) == keys
    assert torch.equal(logits(host.model, x), expected)


def test_a_host_without_prefix_tokens_refuses_it() -> None:
    host, _ = make("average_pooling")
    with pytest.raises(ArchitectureError, match="block 3: the architecture computes prefix tokens alone, but this"):
        spvit.prune(host, prefix_alone(everything(host)))


@pytest.mark.parametrize("name", ["class_token", "distilled", "huggingface", "encoder_pre_norm"])
def test_repaired_it_is_nearer_than_cut(name: str) -> None:
    host, x = make(name)
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(64, *x.shape[1:], generator=generator, dtype=torch.float64)
    architecture = prefix_alone(
        replace(everything(host), blocks=(*everything(host).blocks[:-1], narrow(host).blocks[-1]))
    )
    wanted = logits(host.model, x)
    cut, repaired = (logits(spvit.prune(host, architecture, repair=given), x) for given in (None, images))
    assert (repaired - wanted).norm() < 0.7 * (cut - wanted).norm()
