"""Sites that users declare: they are verified, serve every verb, and what does not hold is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.errors import UnsupportedHostError
from spvit.hosts.recognise import DECLARED
from tiny import MIXED, assert_close, assert_differ, choose, logits, randomise

pytest.importorskip("einops")
import own_models
import own_parts as parts


@pytest.fixture(autouse=True)
def _own_declarations() -> Iterator[None]:
    kept = dict(DECLARED)
    yield
    DECLARED.clear()
    DECLARED.update(kept)


class HiddenSoftmax(parts.EagerAttention):
    """Attention that no softmax function shows."""

    def logits(self, logits: Tensor) -> Tensor:
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        return (weights / weights.sum(-1, keepdim=True)).log()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        weights = self.logits(q @ k.mT * q.shape[-1] ** -0.5).exp()
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Hidden(own_models.ViT):
    def __init__(self) -> None:
        super().__init__(lambda: own_models.Block(HiddenSoftmax(), parts.Mlp()))


EAGER = spvit.Sites(
    attention="blocks.{}.attn", query="to_q", key="to_k", value="to_v", out="to_out", heads=3,
    first="blocks.{}.mlp.fc1", second="blocks.{}.mlp.fc2", prefix_tokens=1, grid=(4, 4), input_size=(3, 32, 32),
)  # fmt: skip
PACKED = replace(EAGER, query="qkv", key="qkv", value="qkv", out="proj")
OTHERS: dict[str, tuple[Any, spvit.Sites]] = {
    "packed": (lambda: own_models.vit(parts.PackedAttention), PACKED),
    "separate, gated": (
        lambda: own_models.vit(parts.SeparateAttention, parts.GatedFFN, prefix=0),
        replace(
            EAGER, query="w_q", key="w_k", value="w_v", out="w_o", prefix_tokens=None, grid=None,
            first=("blocks.{}.mlp.gate_proj", "blocks.{}.mlp.up_proj"), second="blocks.{}.mlp.down_proj",
        ),
    ),
    "packed keys, packed gate": (
        lambda: own_models.vit(parts.PackedKeysAttention, parts.PackedGatedFFN),
        replace(PACKED, query="q", key="kv", value="kv", first=("blocks.{}.mlp.w12",) * 2, second="blocks.{}.mlp.w3"),
    ),
    "head-major": (
        lambda: own_models.vit(parts.HeadMajorAttention),
        replace(
            EAGER, out="out", query=spvit.Rows("qkv.weight", by_head=30), key=spvit.Rows("qkv.weight", None, 10, 30),
            value=spvit.Rows("qkv.weight", None, 20, 30),
        ),
    ),
    "multi-head attention, tokens first": (
        own_models.ClipTower,
        replace(
            EAGER, attention="resblocks.{}.attn", query="in_proj_weight", key="in_proj_weight", value="in_proj_weight",
            out="out_proj", first="resblocks.{}.mlp.c_fc", second="resblocks.{}.mlp.c_proj", token_first=True,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_declared_is_what_is_found(name: str) -> None:
    make, sites = OTHERS[name]
    model = randomise(make()).to(torch.float64).eval()
    found = spvit.recognise(model, torch.zeros(1, 3, 32, 32)).blocks
    spvit.register(type(model), sites)
    assert spvit.recognise(model).blocks == found


def test_declared_models_serve_every_verb(tmp_path: Path) -> None:
    model = randomise(Hidden()).to(torch.float64).eval()
    x = torch.randn(24, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(UnsupportedHostError, match="Hidden is not supported: no self-attention was found"):
        spvit.recognise(model, x)
    spvit.register(own_models.ViT, EAGER)  # subclasses count
    host = spvit.recognise(model)
    assert (host.input_size, len(host.blocks), host.family.classes(model)) == ((3, 32, 32), 4, 7)
    full = Attention(heads=(0, 1, 2), query_key_rank=8, value_rank=8)
    whole = spvit.prune(model, Architecture((Block(full, FFN.whole(72)),) * 4))
    assert (logits(whole, x) - logits(model, x)).abs().max() <= 1e-6 * logits(model, x).abs().max()
    net = choose(randomise(spvit.make_searchable(model), seed=1), MIXED).eval()
    architecture = spvit.decide(net)
    pruned = spvit.prune(model, architecture, weights=net)
    assert_close(logits(pruned, x), logits(net, x))
    repaired = spvit.prune(model, architecture, repair=x)
    assert_differ(logits(repaired, x), logits(model, x))
    for name, own in (("dense", model), ("repaired", repaired)):
        folder = spvit.save(own, tmp_path / name)
        spvit.register(own_models.ViT, None)  # the file has the sites
        assert torch.equal(logits(spvit.load(folder, host=Hidden()), x), logits(own, x))
        spvit.register(own_models.ViT, EAGER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "layers.{}.attn"}, r"no module is called 'layers\.\{\}\.attn', with one \{\} for a number"),
        ({"attention": "blocks.0.attn"}, r"no module is called 'blocks\.0\.attn', with one \{\}"),
        (
            {"attention": "blocks.{}.norm1"},
            r"blocks\.0\.norm1 has no linear layer or parameter 'to_out'; it has w",
        ),
        ({"query": "q"}, r"blocks\.0\.attn has no linear layer or parameter 'q'; it has to_q\.weight, to_q\.bias, "),
        ({"heads": 5}, r"blocks\.0\.attn: the 24 columns of to_out are not 5 heads"),
        ({"value": "to_q"}, r"to_q\.weight is \[24, 24\], expected at least 48 rows of 24 for 3 heads of 8"),
        ({"key": spvit.Rows("to_k.weight", "to_k.bias", 8)}, r"to_k\.weight is \[24, 24\], expected at least 32 rows"),
        ({"query": "to_k", "key": "to_q", "scale": 1.0}, "no module around attention answers with a linear projection"),
        ({"heads": 6}, "no module around attention answers with a linear projection of what its heads return"),
        ({"value": "to_out", "out": "to_v"}, "no module around attention answers with a linear projection"),
        ({"norm": "before"}, r"blocks\.0\.attn\.before does not run in a forward pass"),
        (
            {"first": "blocks.{}.mlp.fc2", "second": "blocks.{}.mlp.fc1"},
            r"mlp\.fc1: the hidden units of this FFN do",
        ),
        ({"first": "blocks.{}.ffn.fc1"}, r"there is no layer blocks\.0\.ffn\.fc1; name the FFN's linear layers"),
        ({"first": "blocks.1.mlp.fc1"}, r"blocks\.1\.mlp\.fc1 does not run in blocks\.0; name the linear layers"),
        (
            {"first": "blocks.{}.norm2"},
            r"blocks\.0\.norm2 is a \S+LayerNorm, but these hosts are supported",
        ),
        ({"prefix_tokens": 0}, r"blocks\.0\.attn: prefix_tokens is declared as 0, but found as 1"),
        ({"grid": (2, 8)}, r"blocks\.0\.attn: grid is declared as \(2, 8\), but found as \(4, 4\)"),
        ({"input_size": (3, 40, 40)}, r"its forward pass fails on images of \[3, 3, 40, 40\]"),
        ({"input_size": None}, "it does not say what images it takes; pass some"),
    ],
)
def test_what_does_not_hold_is_refused(change: dict[str, Any], message: str) -> None:
    spvit.register(Hidden, replace(EAGER, **change))
    model = randomise(Hidden()).eval()
    with pytest.raises(UnsupportedHostError, match=f"^the sites registered for Hidden do not hold: .*{message}"):
        spvit.make_searchable(model)


def test_positions_that_no_name_says_are_refused() -> None:
    model = randomise(own_models.vit(lambda: parts.BiasedAttention((4, 4)), prefix=0)).eval()
    spvit.register(type(model), replace(EAGER, prefix_tokens=0))
    with pytest.raises(UnsupportedHostError, match="do not hold: .*no module around attention answers with a linear"):
        spvit.recognise(model)


def test_only_classes_of_models_are_registered() -> None:
    for cls in (Hidden(), int, "ViT"):
        with pytest.raises(UnsupportedHostError, match="register takes a class of models, found "):
            spvit.register(cls, EAGER)
