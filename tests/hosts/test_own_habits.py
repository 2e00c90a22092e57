"""Own models as people leave them: tensors here and there, compiled blocks, maps that a forward pass keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import spvit

pytest.importorskip("einops")
from own_models import OWN, ImageOutput
from own_refused import REFUSED


class _Table(nn.Module):
    """Adds numbers to tokens from a tensor that is no buffer, and from one that it makes without saying where."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.linspace(0, 1, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table + torch.arange(24) / 24


class _Move(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def test_tensors_that_a_model_leaves_on_the_cpu_do_not_keep_its_macs_from_being_counted() -> None:
    plain, model = OWN["separate"](), OWN["separate"]()
    model.patch_embed = nn.Sequential(
        model.patch_embed, nn.Flatten(2), _Move(), _Table(), _Move(), nn.Unflatten(2, (4, 4))
    )
    x = torch.zeros(2, 3, 32, 32)
    assert spvit.cost(spvit.recognise(model, x))["macs"] == spvit.cost(spvit.recognise(plain, x))["macs"]


def test_blocks_that_are_compiled_are_refused_by_name() -> None:
    model = OWN["separate"]().eval()
    model.blocks[1].compile(backend="eager")
    with pytest.raises(spvit.SpvitError, match=r"blocks\.1 is compiled; prune the model as it was before"):
        spvit.recognise(model, torch.zeros(2, 3, 32, 32))


def test_models_that_cannot_be_copied_say_why() -> None:
    x = torch.zeros(2, 3, 32, 32)
    keeps, masked = OWN["separate"]().eval(), OWN["separate"]().eval()
    keeps.blocks[0].attn.map = keeps(x).sum()
    prune.l1_unstructured(masked.blocks[0].mlp.fc1, "weight", 0.5)
    for model, name in ((keeps, "attn.map"), (masked, "mlp.fc1.weight")):
        with pytest.raises(spvit.SpvitError, match=rf"blocks\.0\.{name} is computed and has a gradient.*torch.no_grad"):
            spvit.recognise(model, x)
    with torch.no_grad():
        keeps.blocks[0].attn.map = keeps(x).sum()
    spvit.recognise(keeps, x)


def test_a_model_that_casts_inside_is_refused_in_a_line() -> None:
    class Casting(type(OWN["separate"]())):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model = OWN["separate"]().eval()
    model.__class__ = Casting
    with pytest.raises(spvit.UnsupportedHostError, match="linear projection of what its heads return") as caught:
        spvit.recognise(model, torch.zeros(2, 3, 32, 32))
    assert "\n" not in str(caught.value)


def test_layer_scales_that_training_has_not_moved_hide_nothing() -> None:
    make, reason = REFUSED["gated_quietly"]
    with pytest.raises(spvit.UnsupportedHostError, match=reason):
        spvit.recognise(make().eval(), torch.zeros(2, 3, 32, 32))


def _separate(forward: Any = None, change: Any = None) -> nn.Module:
    """Return a model with another forward, or whose attention layers answer what is made of them, of x and output."""
    model = OWN["separate"]().eval()
    if forward is not None:
        model.__class__ = type("Own", (type(model),), {"forward": forward})
    for block in model.blocks if change is not None else ():
        inner: Any = type(block.attn)
        changed = {"forward": lambda self, x, inner=inner: change(self, x, inner.forward(self, x))}
        block.attn.__class__ = type("OwnAttention", (inner,), changed)
    return model


def test_a_forward_that_reads_an_ffn_from_outside_its_block_is_refused_by_name() -> None:
    def scaled(self: Any, x: Tensor) -> Tensor:
        return self.head(self.encode(self.embed(x))[:, 0] * self.blocks[1].mlp.fc1.out_features ** -0.5)  # type: ignore[no-any-return]

    def counted(self: Any, x: Tensor) -> Tensor:
        assert self.blocks[2].mlp.fc2.in_features == 72
        return self.head(self.encode(self.embed(x))[:, 0])  # type: ignore[no-any-return]

    def told(self: Any, x: Tensor) -> ImageOutput:
        return ImageOutput(scaled(self, x))

    for forward, message in (
        (scaled, r"blocks\.1\.mlp\.fc2: the model with half its units is not the one that reads no others"),
        (told, r"blocks\.1\.mlp\.fc2: the model with half its units is not the one that reads no others"),
        (counted, r"blocks\.2\.mlp\.fc2: the FFN does not run with fewer units .* no forward of the model may name"),
    ):
        with pytest.raises(spvit.UnsupportedHostError, match=message):
            spvit.recognise(_separate(forward), torch.zeros(2, 3, 32, 32))


def test_attention_that_computes_otherwise_in_training_is_refused() -> None:
    model = _separate(change=lambda self, x, out: out * 2 if self.training else out)
    with pytest.raises(spvit.UnsupportedHostError, match=r"blocks\.0\.attn computes something else in training mode"):
        spvit.recognise(model, torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("change", [lambda self, x, out: x + out, lambda self, x, out: out * x.sigmoid()])
def test_what_acts_behind_the_projection_is_named(change: Any) -> None:
    message = r"looked for output = W .*; found blocks\.0\.attn\.\w+ behind the heads, but the layer answers something"
    with pytest.raises(spvit.UnsupportedHostError, match=message):
        spvit.recognise(_separate(change=change), torch.zeros(2, 3, 32, 32))


def test_buffers_that_a_forward_updates_are_put_back() -> None:
    def counting(self: Any, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.head(self.encode(self.embed(x))[:, 0])  # type: ignore[no-any-return]

    model, x = _separate(counting), torch.randn(96, 3, 32, 32)
    model.register_buffer("seen", torch.zeros(()))
    host = spvit.recognise(model, x)
    pruned = spvit.prune(host, spvit.decide(host, macs="70%", scores=spvit.score(host, x)), repair=x)
    assert model.seen == pruned.seen == 0
