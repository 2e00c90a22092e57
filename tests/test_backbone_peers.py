"""The peers of benchmarks/backbone.py: equal MACs, nothing changed at full width, and naive forms of their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import spvit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = ("whitened-svd", "vbp", "corp", "snapvit")


@pytest.fixture(name="peers")
def _peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("backbone_peers")


@pytest.fixture(name="model")
def _model() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 56, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
    model = timm.create_model("vit_small_patch14_dinov2", **sizes).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(name="images")
def _images() -> torch.Tensor:
    return torch.randn(12, 3, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("share", [0.8, 0.6])
def test_a_peer_lands_on_the_macs_and_leaves_the_dense_model_alone(
    peers: Any, model: Any, images: torch.Tensor, name: str, share: float
) -> None:
    before = model(images)
    pruned = peers.METHODS[name](model, images)(share)
    assert peers.macs_of(pruned, images) == pytest.approx(share * peers.macs_of(model, images), rel=0.01)
    assert torch.equal(model(images), before)
    assert pruned.forward_features(images).shape == model.forward_features(images).shape


@pytest.mark.parametrize("name", PEERS)
def test_a_share_out_of_reach_is_refused(peers: Any, model: Any, images: torch.Tensor, name: str) -> None:
    with pytest.raises(spvit.BudgetError, match="reach 2% of the MACs"):
        peers.METHODS[name](model, images)(0.02)


@pytest.mark.parametrize("name", ["vbp", "corp", "snapvit"])
def test_at_full_width_a_peer_is_the_model(peers: Any, model: Any, images: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(peers.METHODS[name](model, images)(1.0)(images), model(images))


def test_torch_counts_the_macs_that_spvit_does(peers: Any, model: Any, images: torch.Tensor) -> None:
    assert peers.macs_of(model, images) == spvit.cost(model)["macs"]


@pytest.mark.parametrize(("rows", "columns"), [(9, 5), (5, 9)])
def test_low_rank_is_the_published_truncation(peers: Any, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(columns, rows).double(), torch.randn(40, columns).double()
    square = x.T @ x / 40
    factors = peers.factors_of(layer, square)
    root = torch.linalg.cholesky(square)
    left, values, right = torch.linalg.svd(layer.weight @ root, full_matrices=False)
    wanted = left[:, :3] @ values[:3].diag() @ right[:3] @ root.inverse()
    torch.testing.assert_close(peers.low_rank(layer, *factors, 3)(x), x @ wanted.T + layer.bias)
    torch.testing.assert_close(peers.low_rank(layer, *factors, 5)(x), layer(x))


def test_corp_keeps_the_logits_as_well_as_can_be(peers: Any, model: Any, images: torch.Tensor) -> None:
    block, x = model.blocks[0], next(peers.arriving(model, images))
    given = block.norm1(x)
    query, key, _ = block.attn.qkv(given).flatten(0, 1).unflatten(-1, (3, 3, 16)).permute(1, 2, 0, 3)
    narrow = peers._corp_attention(block.attn, peers.moments_of(block, [block.attn.qkv], [x])[block.attn.qkv], 10)
    found_query, found_key, _ = narrow.qkv(given).flatten(0, 1).split(narrow.sizes, -1)
    for head, (own, other) in enumerate(zip(found_query.chunk(3, -1), found_key.chunk(3, -1))):
        logits = query[head] @ key[head].T  # of all pairs of tokens, as the moments count them
        best = own @ torch.linalg.pinv(own) @ logits @ torch.linalg.pinv(other.T) @ other.T
        torch.testing.assert_close(own @ other.T, best, rtol=1e-3, atol=1e-3)


def test_corp_regresses_units_on_those_kept(peers: Any, model: Any) -> None:
    ffn, x = model.blocks[0].mlp, torch.randn(60, 50, 48).double()
    wanted = ffn(x).flatten(0, 1)
    peers._corp_ffn(ffn, peers.moments_of(ffn, [ffn.fc2], [x])[ffn.fc2], 100)
    kept = ffn.act(ffn.fc1(x)).flatten(0, 1)
    given = torch.cat([kept, torch.ones_like(kept[:, :1])], 1)
    least = (wanted - given @ torch.linalg.lstsq(given, wanted).solution).square().mean()
    missing = ffn(x).flatten(0, 1) - wanted
    assert missing.mean(0).abs().max() < 1e-6  # the constant is fitted
    assert least <= missing.square().mean() < 1.2 * least
