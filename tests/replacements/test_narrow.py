"""Narrow attention: the best logits of a rank, the best directions of values, and what `prune` allows of them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import spvit
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.errors import ArchitectureError, CalibrationError
from spvit.hosts.host import Host
from spvit.hosts.weights import AttentionWeights, read_weights
from spvit.replacements.narrow import (
    LONGEST,
    low_rank_logits,
    narrow_blindly,
    narrow_heads,
    narrow_values,
    value_directions,
)
from tiny import assert_close, assert_differ, images, logits, make_host, randomise

DOUBLE = torch.float64
DIM, HEADS, WIDTH = 12, 3, 5
NARROW = {
    "heads": Attention(heads=(0, 2)),
    "query_key_rank": Attention(query_key_rank=3),
    "value_rank": Attention(value_rank=5),
    "all": Attention(heads=(1, 2), query_key_rank=5, value_rank=3),
    "full": Attention(heads=(0, 1, 2), query_key_rank=8, value_rank=8),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def moment(width: int, seed: int) -> Tensor:
    """Return a well-conditioned second moment [width, width]."""
    factor = randn(width, width, seed=seed)
    return factor @ factor.T + 0.1 * torch.eye(width, dtype=DOUBLE)


def weights_of_layer(bias: bool = True) -> AttentionWeights:
    query, key, value, out = randn(4, HEADS, WIDTH, DIM, seed=5)
    query_bias, key_bias, value_bias = randn(3, HEADS, WIDTH, seed=6) if bias else [None] * 3
    out_bias = randn(DIM) if bias else None
    out_weight = out.permute(2, 0, 1).contiguous()
    return AttentionWeights(query, query_bias, key, key_bias, value, value_bias, out_weight, out_bias)


def one_head(out_weight: Tensor) -> AttentionWeights:
    """Return weights of a layer with one head and this output projection [D, E]."""
    projection = torch.eye(out_weight.shape[1], dtype=DOUBLE)[None]
    return AttentionWeights(projection, None, projection, None, projection, None, out_weight[:, None], None)


def directions_of(covariance: Tensor, out_weight: Tensor, rank: int) -> Tensor:
    """Return the directions of a head's values that are kept, [V, E]."""
    return value_directions(one_head(out_weight), covariance[None])[0, :rank]


def predicting(covariance: Tensor, out_weight: Tensor, directions: Tensor) -> Tensor:
    """Return the output projection [D, V] that best predicts a head's contribution from some directions."""
    kept = Attention(value_rank=len(directions))
    return narrow_values(one_head(out_weight), directions[None], kept, covariance[None])[0].out_weight[:, 0]


def with_attention(*kept: Attention) -> Architecture:
    """Return an architecture with whole FFNs; the given attentions take turns over four blocks."""
    blocks = (Block(kept[index % len(kept)], FFN(72, tuple(range(72)))) for index in range(4))
    return Architecture(tuple(blocks))


def logit_loss(query_moment: Tensor, key_moment: Tensor, product: Tensor) -> float:
    """Return the mean squared error of q^T M k in place of q^T k, for independent q and k: tr(D^T C_Q D C_K)."""
    error = product - torch.eye(len(product), dtype=DOUBLE)
    return float((error.T @ query_moment @ error @ key_moment).trace())


@pytest.mark.parametrize("rank", range(1, WIDTH + 1))
@pytest.mark.parametrize("seed", [1, 3])
def test_logits_are_the_best_of_their_rank(seed: int, rank: int) -> None:
    queries, keys = moment(WIDTH, seed), moment(WIDTH, seed + 1)
    a, b = low_rank_logits(queries, keys, rank)
    assert a.shape == b.shape == (WIDTH, rank)
    loss = logit_loss(queries, keys, a @ b.T)
    tail = torch.linalg.eigvals(queries @ keys).real.sort().values[: WIDTH - rank].sum()  # Eckart and Young
    total = logit_loss(queries, keys, torch.zeros(WIDTH, WIDTH, dtype=DOUBLE))
    assert loss == pytest.approx(float(tail), abs=2e-6 * total)
    for start in range(3):  # alternating least squares, from anywhere, ends no lower
        left = randn(WIDTH, rank, seed=start)
        for _ in range(300):
            left = torch.linalg.qr(left).Q
            right = torch.linalg.solve(left.T @ queries @ left, left.T @ queries).T
            left = torch.linalg.solve(right.T @ keys @ right, right.T @ keys).T
        assert logit_loss(queries, keys, left @ right.T) >= loss - 1e-6 * total
    assert_close(a.T @ queries @ a, b.T @ keys @ b, scale=1e5)  # both sides share each direction's weight
    if rank == WIDTH:
        assert (a @ b.T - torch.eye(WIDTH)).abs().max() < 1e-9


def test_logits_of_singular_moments_stay_finite_and_right() -> None:
    basis = randn(2, WIDTH)
    singular = basis.T @ basis
    for keys in (moment(WIDTH, 3), singular, torch.zeros(WIDTH, WIDTH, dtype=DOUBLE)):
        a, b = low_rank_logits(singular, keys, 2)
        assert a.isfinite().all()
        assert b.isfinite().all()
        # A pair of two-dimensional sets needs two dimensions.
        assert logit_loss(singular, keys, a @ b.T) <= 1e-5 * logit_loss(singular, keys, torch.zeros_like(keys)) + 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_narrow_queries_and_keys_are_folded_into_weights_and_biases(bias: bool) -> None:
    layer, x = weights_of_layer(bias), randn(40, DIM, seed=9)
    augmented = torch.cat([x, torch.ones(40, 1)], dim=1)
    narrow = narrow_heads(layer, Attention(query_key_rank=2), augmented.T @ augmented / 40)
    query, query_bias, key, key_bias = narrow.query_weight, narrow.query_bias, narrow.key_weight, narrow.key_bias
    assert query.shape == key.shape == (HEADS, 2, DIM)
    assert (query_bias is not None, key_bias is not None) == (bias, bias)
    zero = torch.zeros(HEADS, WIDTH, dtype=DOUBLE)
    for head in range(HEADS):
        queries = x @ layer.query_weight[head].T + (layer.query_bias if bias else zero)[head]
        keys = x @ layer.key_weight[head].T + (layer.key_bias if bias else zero)[head]
        a, b = low_rank_logits(queries.T @ queries / 40, keys.T @ keys / 40, 2)
        found_queries = x @ query[head].T + (query_bias[head] if bias else 0)
        found_keys = x @ key[head].T + (key_bias[head] if bias else 0)
        assert_close(found_queries @ found_keys.T, queries @ a @ b.T @ keys.T)
        assert_differ(found_queries @ found_keys.T, queries @ keys.T)


def value_loss(covariance: Tensor, out_weight: Tensor, directions: Tensor) -> float:
    """Return the mean squared error of the best prediction of P o from the directions of o."""
    kept = directions @ covariance
    predicted = torch.linalg.solve(kept @ directions.T, kept @ out_weight.T)  # [V, D]
    return float((out_weight @ covariance @ out_weight.T).trace() - (predicted.T @ kept @ out_weight.T).trace())


@pytest.mark.parametrize("rank", range(1, WIDTH + 1))
def test_value_directions_are_the_best_of_their_number(rank: int) -> None:
    covariance, out_weight = moment(WIDTH, 1), randn(DIM, WIDTH, seed=2)
    directions = directions_of(covariance, out_weight, rank)
    assert directions.shape == (rank, WIDTH)
    total = float((out_weight @ covariance @ out_weight.T).trace())
    loss = value_loss(covariance, out_weight, directions)
    tail = torch.linalg.eigvalsh(out_weight @ covariance @ out_weight.T).sort(descending=True).values[rank:].sum()
    assert loss == pytest.approx(float(tail), abs=1e-6 * total)
    for seed in range(20):
        assert value_loss(covariance, out_weight, randn(rank, WIDTH, seed=seed)) >= loss - 1e-6 * total
    variance = directions @ covariance @ directions.T  # uncorrelated, as large as what they replace
    level = covariance.diagonal().mean()
    assert (variance - level * torch.eye(rank)).abs().max() < 1e-5 * level
    projection = predicting(covariance, out_weight, directions)
    kept = directions @ covariance
    assert_close(projection, torch.linalg.solve(kept @ directions.T, kept @ out_weight.T).T, scale=1e5)
    if rank == WIDTH:
        assert (projection @ directions - out_weight).abs().max() < 1e-6


def test_directions_in_which_a_head_hardly_varies_do_not_become_noise() -> None:
    basis = randn(2, WIDTH)
    directions = directions_of(basis.T @ basis, randn(DIM, WIDTH), 4)
    assert directions.norm(dim=1).max() < LONGEST * 1.001
    assert (directions[:2].norm(dim=1) < LONGEST / 2).all()
    assert value_loss(basis.T @ basis + 1e-9 * torch.eye(WIDTH), randn(DIM, WIDTH), directions) < 1e-6


def test_there_may_be_more_value_directions_than_outputs() -> None:
    directions = directions_of(moment(WIDTH, 1), randn(2, WIDTH), 4)
    assert directions.shape == (4, WIDTH)
    assert torch.linalg.matrix_rank(directions) == 4
    assert value_loss(moment(WIDTH, 1), randn(2, WIDTH), directions) == pytest.approx(0, abs=1e-5)


def test_constant_heads_and_singular_covariances_have_directions() -> None:
    for covariance in (torch.zeros(WIDTH, WIDTH, dtype=DOUBLE), torch.ones(WIDTH, WIDTH, dtype=DOUBLE)):
        directions = directions_of(covariance, randn(DIM, WIDTH), 3)
        assert directions.isfinite().all()
        projection = predicting(covariance, randn(DIM, WIDTH), directions)
        assert projection.isfinite().all()
        found = projection @ directions @ covariance
        assert (found - randn(DIM, WIDTH) @ covariance).abs().max() < 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_narrow_values_fold_their_rotation(bias: bool) -> None:
    layer = weights_of_layer(bias)
    covariances = torch.stack([moment(WIDTH, seed) for seed in range(HEADS)])
    whole = narrow_heads(layer, Attention(value_rank=3), torch.eye(DIM + 1, dtype=DOUBLE))
    narrow, rotation = narrow_values(whole, value_directions(whole, covariances), Attention(value_rank=3), covariances)
    assert rotation.shape == (HEADS, 3, WIDTH)
    for head in range(HEADS):
        assert_close(rotation[head], directions_of(covariances[head], whole.out_weight[:, head], 3))
        assert_close(narrow.value_weight[head], rotation[head] @ layer.value_weight[head])
        if bias:
            assert_close(narrow.value_bias[head], rotation[head] @ layer.value_bias[head])
        expected = predicting(covariances[head], whole.out_weight[:, head], rotation[head])
        assert (narrow.out_weight[:, head] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (narrow.value_bias is None) == (not bias)
    assert narrow.query_weight is whole.query_weight


def test_heads_that_stay_whole_keep_their_weights_bit_for_bit() -> None:
    layer = weights_of_layer()
    kept = narrow_heads(layer, Attention(heads=(0, 2)), torch.eye(DIM + 1, dtype=DOUBLE))
    for name in ("query", "key"):
        for part in ("weight", "bias"):
            assert torch.equal(getattr(kept, f"{name}_{part}"), getattr(layer, f"{name}_{part}")[[0, 2]])
    assert torch.equal(kept.value_weight, layer.value_weight[[0, 2]])
    assert torch.equal(kept.out_weight, layer.out_weight[:, [0, 2]])
    assert torch.equal(kept.out_bias, layer.out_bias)
    assert torch.equal(narrow_blindly(layer, Attention(heads=(0, 2))).value_bias, layer.value_bias[[0, 2]])


@pytest.mark.parametrize("bias", [True, False])
def test_without_images_inputs_count_as_white(bias: bool) -> None:
    layer = weights_of_layer(bias)
    narrow = narrow_blindly(layer, Attention(query_key_rank=2, value_rank=2))
    for head in range(HEADS):
        biases = (layer.query_bias[head], layer.key_bias[head]) if bias else (torch.zeros(WIDTH),) * 2
        query, key = (
            torch.cat([weight[head], own[:, None]], dim=1)
            for weight, own in zip((layer.query_weight, layer.key_weight), biases)
        )
        left, values, right = torch.linalg.svd(query.T @ key)  # of white inputs this is the best in plain squares
        best = left[:, :2] * values[:2] @ right[:2]
        parts = [(narrow.query_weight, narrow.query_bias), (narrow.key_weight, narrow.key_bias)]
        found = [
            torch.cat([weight[head], own[head][:, None] if bias else torch.zeros(2, 1)], dim=1) for weight, own in parts
        ]
        assert (found[0].T @ found[1] - best).abs().max() < 1e-5 * best.abs().max()
        mixed = layer.out_weight[:, head] @ layer.value_weight[head]
        left, values, right = torch.linalg.svd(mixed, full_matrices=False)
        best = left[:, :2] * values[:2] @ right[:2]
        found_values = narrow.out_weight[:, head] @ narrow.value_weight[head]
        assert (found_values - best).abs().max() < 1e-5 * best.abs().max()


@pytest.mark.parametrize("kept", [NARROW[name] for name in ("heads", "query_key_rank", "value_rank", "all")], ids=str)
@pytest.mark.parametrize("name", ["class_token", "no_biases", "huggingface_options", "registers"])
def test_pruned_hosts_compute_what_their_weights_say(name: str, kept: Attention) -> None:
    host = make_host(name)
    model = spvit.prune(host, with_attention(kept))
    expected = copy.deepcopy(host)
    for sites in Host.of(host).blocks:
        layer = read_weights(host.get_submodule(sites.attention.path), sites.attention)
        view = SimpleNamespace(**vars(narrow_blindly(layer, kept)), scale=sites.attention.scale)

        def forward(x: Tensor, *args: Any, _view: Any = view, **kwargs: Any) -> Any:
            out = torch.einsum("bnhv,dhv->bnd", reference.heads_out(x, _view), _view.out_weight)
            out = out if _view.out_bias is None else out + _view.out_bias
            return (out, None) if name.startswith("huggingface") else out

        expected.get_submodule(sites.attention.path).forward = forward
    x = images(host)
    assert_close(logits(model, x), logits(expected, x))
    assert_differ(logits(model, x), logits(host, x))


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        (
            "class_token",
            Attention(heads=(1, 3)),
            "block 1: head 3 is out of range, timm VisionTransformer has heads 0 to 2 ",
        ),
        (
            "class_token",
            Attention(query_key_rank=9),
            "block 1: query_key_rank is 9, expected at most the head width of ",
        ),
        (
            "huggingface_options",
            Attention(value_rank=17),
            "block 1: value_rank is 17, expected at most the .*ViT.*, 16",
        ),
        ("options", Attention(query_key_rank=4), "block 1: the attention of timm .* cannot be narrowed; keep it whole"),
        ("options", Attention(heads=(0,)), "block 1: the attention of timm .* cannot be narrowed; keep it whole"),
    ],
)
def test_narrowings_that_a_host_cannot_take_are_refused(name: str, kept: Attention, message: str) -> None:
    host = make_host(name)
    keys = list(host.state_dict())
    with pytest.raises(ArchitectureError, match=message):
        spvit.prune(host, with_attention(Attention(), kept), inplace=True)
    assert list(host.state_dict()) == keys


@pytest.mark.parametrize("norm", ["of queries and keys", "of all outputs"])
def test_norms_forbid_to_narrow_what_they_are_over(norm: str) -> None:
    host = make_host("options")
    for block in host.blocks:
        names = ("norm",) if norm == "of queries and keys" else ("q_norm", "k_norm")
        for name in names:
            setattr(block.attn, name, torch.nn.Identity())
    queries, values = Attention(query_key_rank=4), [Attention(value_rank=4), Attention(heads=(0,))]
    allowed, forbidden = (values, [queries]) if norm == "of queries and keys" else ([queries], values)
    for kept in allowed:
        assert logits(spvit.prune(host, with_attention(Attention(), kept)), images(host)).isfinite().all()
    message = "queries and keys are .*; leave query_key_rank out"
    if norm == "of all outputs":
        message = "the outputs of all heads are normalised together there, .*; leave heads and value_rank out"
    for kept in forbidden:
        with pytest.raises(ArchitectureError, match=f"block 1: {message}"):
            spvit.prune(host, with_attention(Attention(), kept))


def test_gated_attention_cannot_be_narrowed() -> None:
    from timm.models.vision_transformer import Attention as TimmAttention

    host = make_host("class_token")
    host.blocks[2].attn = TimmAttention(24, 3, qkv_bias=True, gated=True).double()
    with pytest.raises(
        ArchitectureError, match="block 2: the attention of timm VisionTransformer hosts cannot be narrow"
    ):
        spvit.prune(host, with_attention(Attention(), Attention(), Attention(heads=(0,)), Attention()))


def test_weights_that_are_not_finite_are_refused() -> None:
    host = make_host("class_token")
    host.blocks[0].attn.qkv.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="cannot be factorised"):
        spvit.prune(host, with_attention(Attention(query_key_rank=4)))


@pytest.mark.parametrize(("heads", "rank"), [((0, 2), 8), (None, 3)])
def test_a_norm_of_queries_and_keys_lives_on(heads: tuple[int, ...] | None, rank: int) -> None:
    import timm

    torch.manual_seed(0)
    arguments = {"img_size": 64, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 3, "num_classes": 7}
    host = randomise(timm.create_model("vit_tiny_patch16_224", qk_norm=True, **arguments)).double().eval()
    model = spvit.prune(host, with_attention(Attention(heads=heads, value_rank=rank)))
    narrow, own = model.blocks[1].attn, host.blocks[1].attn
    assert narrow.query_norm is not own.q_norm
    assert torch.equal(narrow.query_norm.weight, own.q_norm.weight)
    assert torch.equal(narrow.key_norm.weight, own.k_norm.weight)
    x = torch.randn(2, 17, 24, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    outputs = []
    for layer, count in ((own, 3), (narrow, narrow.heads)):
        query, key = (part.view(2, 17, count, 8) for part in layer.qkv(x)[..., : 2 * 8 * count].chunk(2, dim=-1))
        kept = list(heads or range(3)) if layer is own else list(range(count))
        query = (own.q_norm(query) * own.scale)[:, :, kept]
        outputs.append(torch.softmax(torch.einsum("bnhe,bmhe->bhnm", query, own.k_norm(key)[:, :, kept]), dim=-1))
    assert_close(outputs[1], outputs[0])
    value = narrow.qkv(x)[..., 2 * 8 * narrow.heads :].view(2, 17, narrow.heads, rank)
    heads_out = torch.einsum("bhnm,bmhv->bnhv", outputs[0], value)
    assert_close(narrow.heads_out(x), heads_out.flatten(2))
