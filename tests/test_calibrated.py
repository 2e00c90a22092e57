"""The search from repaired candidates: what its layers compute, their gradients, and what becomes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit.architecture import FFN, ArchitectureError, Attention, Block
from spvit.calibrated import CalibratedAttention
from spvit.cost import BudgetError
from spvit.gated_linear import RankGatedLinear
from spvit.hosts.base import logits_of
from spvit.surgery import NotSearchableError, gated_layers, search_record
from spvit.train.losses import BudgetLoss
from tiny import (
    HOSTS,
    MIXED,
    assert_all_close,
    assert_close,
    assert_differ,
    choose,
    images,
    logits,
    make_host,
    randomise,
)

MULTIPLE = 2


def calibrated(name: str, kinds: tuple[str, ...] | None = None, moved: bool = True) -> tuple[nn.Module, nn.Module]:
    """Return a host and its calibrated searchable network in evaluation mode, all of whose weights have moved since."""
    host = make_host(name)
    net = spvit.make_searchable(host, calibration=images(host, 64, seed=3), multiple=MULTIPLE)
    if moved:
        randomise(net, seed=1)
    return host, choose(net, kinds or MIXED)


def set_ranks(net: nn.Module, opened: list[int]) -> None:
    """Open so many of the rank gates of each layer; the last of those after a closed one is open, in vain."""
    for (attention, _), count in zip(gated_layers(net), opened):
        gates = attention.rank_gates()
        if gates is not None:
            with torch.no_grad():
                gates.gate_logits[:] = torch.tensor([1.0] * count + [-1.0] + [1.0] * 9)[: len(gates.gate_logits)]


@pytest.mark.parametrize("name", HOSTS)
def test_with_all_gates_open_it_is_the_host(name: str) -> None:
    host = make_host(name)
    net = spvit.make_searchable(host, calibration=images(host, 64, seed=3), multiple=MULTIPLE)
    x = images(host, 4)
    found, expected = logits(net, x), logits(host, x)
    # Rotations are solved by least squares with a ridge of 1e-7, so not to the last digit.
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not net.training
    assert_differ(logits(choose(net, ("skip",) * 4), x), expected)


@pytest.mark.parametrize("kind", ["conv3", "conv1", "skip"])
@pytest.mark.parametrize("name", ["class_token", "average_pooling", "swin_padded", "huggingface"])
def test_candidates_are_what_the_repair_makes_of_them(name: str, kind: str) -> None:
    host = make_host(name)
    calibration, x = images(host, 64, seed=3), images(host, 4)
    net = spvit.make_searchable(host, calibration=calibration, multiple=MULTIPLE)
    index = 1
    choose(net, tuple(kind if number == index else "msa" for number in range(4)))
    units = [ffn.linear.in_features for _, ffn in gated_layers(net)]
    kinds = [kind if number == index else "msa" for number in range(4)]
    blocks = tuple(Block(Attention(kind), FFN.whole(width)) for kind, width in zip(kinds, units))
    pruned = spvit.prune(host, spvit.Architecture(blocks, "linear", "mean"), repair=calibration)
    expected = logits(pruned, x)
    assert (logits(net, x) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert_differ(expected, logits(host, x))


@pytest.mark.parametrize("name", HOSTS)
def test_searched_pruned_folded_and_loaded_are_one(name: str, tmp_path: object) -> None:
    host, net = calibrated(name)
    set_ranks(net, [1, 0, 2, 1])
    x = images(host)
    architecture = spvit.decide(net)
    assert spvit.Architecture.from_json(architecture.to_json()) == architecture
    pruned = spvit.prune(host, architecture, weights=net)
    expected = logits(net, x)
    assert_close(logits(pruned, x), expected)
    assert_close(logits(spvit.fold(pruned), x), expected)
    spvit.save(pruned, f"{tmp_path}/model")
    assert_close(logits(spvit.load(f"{tmp_path}/model"), x), expected)
    assert_differ(expected, logits(host, x))


def test_gates_choose_the_rank() -> None:
    _, net = calibrated("class_token", ("msa",) * 4)
    set_ranks(net, [0, 1, 3, 2])
    kept = [block.attention for block in spvit.decide(net).blocks]
    assert [attention.value_rank for attention in kept] == [2, 4, 8, 6]
    assert all(attention.query_key_rank == attention.value_rank for attention in kept)


def naive_attention(layer: CalibratedAttention, x: Tensor, gates: Tensor) -> Tensor:
    """Return attention with gates on its dimensions, head by head, from the formulas: x [B, N, D], gates [E]."""
    linear = layer.rank_gates().linear
    heads = layer.msa.heads
    packed = x @ linear.weight.T + linear.bias
    query, key, value = (part.unflatten(2, (heads, -1)) for part in packed.chunk(3, dim=2))
    outs = []
    for head in range(heads):
        weights = (((query[:, :, head] * gates) @ key[:, :, head].transpose(1, 2)) * layer.msa.scale).softmax(-1)
        outs.append(weights @ (value[:, :, head] * gates))
    return torch.cat(outs, dim=2) @ layer.msa.proj.weight.T + layer.msa.proj.bias


def naive_layer(layer: CalibratedAttention, x: Tensor, uniforms: Tensor) -> Tensor:
    """Return a training forward pass of a calibrated layer with all candidates computed and mixed by soft gates."""

    def sampled(logits: Tensor, uniform: Tensor) -> Tensor:
        soft = torch.sigmoid(torch.logit(uniform) + logits)
        return (soft > 0.5).to(soft) + soft - soft.detach()

    def nested(gates: Tensor) -> list[Tensor]:
        products, running = [], torch.ones((), dtype=gates.dtype)
        for gate in gates:
            running = running * gate
            products.append(running)
        closed = [bool(product < 0.5) for product in products[1:]] + [True]
        return [product if last else product.detach() for product, last in zip(products, closed)]

    rank_gates = layer.rank_gates()
    kind_gates = sampled(layer.gate_logits, uniforms[:3])
    ranks = nested(sampled(rank_gates.gate_logits, uniforms[3:]))
    width = rank_gates.ranks[-1]
    dimensions = torch.stack(
        [
            torch.ones((), dtype=x.dtype) if d < rank_gates.ranks[0] else
            ranks[sum(d >= rank for rank in rank_gates.ranks) - 1]
            for d in range(width)
        ]
    )  # fmt: skip
    c1, c2, c3 = nested(kind_gates)
    msa = naive_attention(layer, x, dimensions)
    conv3, conv1, skip = layer.conv3(x), layer.conv1(x), layer.skip(x)
    mixed = [c3 * msa, c2 * (1 - c3) * conv3, c1 * (1 - c2) * (1 - c3) * conv1]
    return sum(mixed) + (1 - c3 - c2 * (1 - c3) - c1 * (1 - c2) * (1 - c3)) * skip


@pytest.mark.parametrize("seed", range(8))
def test_training_pass_and_gradients_are_those_of_the_formulas(seed: int) -> None:
    _, net = calibrated("class_token")
    layer = gated_layers(net)[0][0]
    assert isinstance(layer, CalibratedAttention)
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(sum(len(logits) for logits in spvit.gate_parameters(net)), generator=generator).double()
    layer.draws.fix_uniforms(uniforms)
    net.train()
    for part in (layer.conv1, layer.conv3):
        part.bn.momentum = 0.0
    x = torch.randn(2, 17, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    results = []
    for run in (layer, lambda inputs: naive_layer(layer, inputs, uniforms[: 3 + len(layer.rank_gates().gate_logits)])):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        out = run(inputs)
        (out * weight).sum().backward()
        own = {name: value.grad for name, value in layer.named_parameters()}
        results.append((out.detach(), {**own, "x": inputs.grad}))
    (out, gradients), (expected, naive) = results
    assert_close(out, expected)
    kind = {"skip": 0, "conv1": 1, "conv3": 2, "msa": 3}
    chosen = [name for name in kind if any(gradients[key].any() for key in gradients if key.startswith(name + "."))]
    # Candidates that were not drawn learn nothing; the naive pass lets them learn in proportion to a weight of zero.
    assert len(chosen) <= 1
    assert_all_close(gradients, {name: torch.zeros_like(gradients[name]) if value is None else value
                                 for name, value in naive.items()})  # fmt: skip


def test_expected_cost_is_that_of_what_is_decided() -> None:
    for seed in range(6):
        for name in ("class_token", "options", "swin"):
            _, net = calibrated(name)
            randomise(net, seed=seed)
            for metric in ("macs", "params"):
                loss = BudgetLoss(net, **{metric: "50%"})
                assert loss.expected_cost().item() == pytest.approx(loss.cost.of(spvit.decide(net)), rel=1e-6)


def test_the_budget_reaches_every_gate() -> None:
    _, net = calibrated("class_token", ("msa",) * 4)
    set_ranks(net, [3, 3, 3, 3])
    BudgetLoss(net, macs="50%")().backward()
    for parameter in spvit.gate_parameters(net):
        assert parameter.grad is not None
        assert (parameter.grad > 0).all()  # all open: each closed one saves something


def test_gate_parameters_are_all_gates() -> None:
    _, net = calibrated("class_token")
    named = {id(value) for name, value in net.named_parameters() if name.endswith("gate_logits")}
    assert {id(value) for value in spvit.gate_parameters(net)} == named
    assert len(named) == 3 * 4


def test_hosts_whose_attention_must_stay_whole_have_no_rank_gates() -> None:
    for name in ("options", "swin"):
        host, net = calibrated(name, ("msa",) * 4)
        assert all(attention.rank_gates() is None for attention, _ in gated_layers(net))
        architecture = spvit.decide(net)
        assert all(block.attention == Attention() for block in architecture.blocks)
        x = images(host)
        assert_close(logits(spvit.prune(host, architecture, weights=net), x), logits(net, x))


def test_only_what_was_drawn_learns_and_eval_mode_draws_nothing() -> None:
    host, net = calibrated("class_token")
    x = images(host)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert torch.equal(logits(net, x), logits(net, x))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["class_token", "swin", "huggingface"])
def test_it_trains_in_bf16_autocast(name: str) -> None:
    host, net = calibrated(name)
    net = net.float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = logits_of(net(images(host, 4).float())).float().square().mean()
    (loss + BudgetLoss(net, macs="50%")()).backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in spvit.gate_parameters(net)
    )


def test_refuses_what_its_candidates_cannot_become() -> None:
    host, net = calibrated("class_token", ("msa", "conv3", "conv1", "skip"))
    architecture = spvit.decide(net)
    with pytest.raises(NotSearchableError, match="are repaired and trained; leave out repair="):
        spvit.prune(host, architecture, weights=net, repair=images(host, 8))
    with pytest.raises(ArchitectureError, match="prefix rule identity and skip rule mean, but the search was"):
        spvit.prune(host, replace(architecture, prefix_rule="identity"), weights=net)
    for attention in (Attention(), Attention("msa", query_key_rank=4, value_rank=6), Attention("msa", heads=(0, 1))):
        blocks = (replace(architecture.blocks[0], attention=attention), *architecture.blocks[1:])
        with pytest.raises(ArchitectureError, match="block 0: a calibrated search keeps of this attention one rank"):
            spvit.prune(host, replace(architecture, blocks=blocks), weights=net)
    with pytest.raises(spvit.CalibrationError, match="there are no calibration images"):
        spvit.make_searchable(host, calibration=[])
    assert search_record(net).calibrated


def test_rank_gates_say_what_they_keep() -> None:
    layer = RankGatedLinear(nn.Linear(8, 24), heads=2, ranks=(1, 2, 4))
    with torch.no_grad():
        layer.gate_logits[:] = torch.tensor([-1.0, 1.0])
    assert layer.decided() == 1
    layer.eval()
    out = layer(torch.randn(3, 8)).unflatten(1, (3, 2, 4))
    assert out[:, 0, :, 1:].eq(0).all()
    assert out[:, 2, :, 1:].eq(0).all()
    assert out[:, 1].ne(0).all()


def test_a_multiple_of_nothing_is_refused() -> None:
    host = make_host("class_token")
    with pytest.raises(BudgetError, match="multiple is 0, expected 1 or more units"):
        spvit.make_searchable(host, calibration=images(host, 64), multiple=0)
