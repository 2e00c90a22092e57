"""The budget as a loss term, against the specification and beside the other terms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reference
import spvit
from spvit.architecture import Attention
from spvit.errors import BudgetError, NotSearchableError
from spvit.search.budget_loss import BUDGET_WEIGHT
from spvit.search.network import gated_layers, search_record
from spvit.train.losses import distillation_loss, task_loss
from tiny import MIXED, assert_close, choose, images, logits, make_host, make_net


@pytest.mark.parametrize("weight", [None, 3.0])
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_budget_loss_is_the_formula(metric: str, weight: float | None) -> None:
    _, net = make_net("class_token", dtype=torch.float32)
    options = {} if weight is None else {"weight": weight}
    loss = spvit.BudgetLoss(net, **{metric: "70%"}, **options)()
    loss.backward()

    cost = search_record(net).costs[metric]
    block = cost.blocks[0]
    kinds = (block.attention(Attention(kind)) for kind in ("msa", "conv3", "conv1"))
    layers = gated_layers(net)
    attention = [layer.gate_logits.detach().double().requires_grad_() for layer, _ in layers]
    ffn = [layer.gate_logits.detach().double().requires_grad_() for _, layer in layers]
    expected = reference.expected_cost(attention, ffn, cost.fixed, *kinds, block.unit)
    naive = (BUDGET_WEIGHT if weight is None else weight) * (
        expected / cost.dense - round(0.7 * cost.dense) / cost.dense
    ) ** 2
    naive.backward()
    assert loss.shape == ()
    assert_close(loss.detach(), naive.detach().float())
    for (own_attention, own_ffn), naive_attention, naive_ffn in zip(layers, attention, ffn):
        assert_close(own_attention.gate_logits.grad, naive_attention.grad.float())
        assert_close(own_ffn.gate_logits.grad, naive_ffn.grad.float())


@pytest.mark.parametrize("kinds", [MIXED, ("msa",) * 4, ("skip",) * 4])
def test_expected_cost_is_the_cost_of_the_decision(kinds: tuple[str, ...]) -> None:
    _, net = make_net("class_token", kinds, torch.float32)
    for metric in ("macs", "params"):
        loss = spvit.BudgetLoss(net, **{metric: "50%"})
        cost = search_record(net).costs[metric].of(spvit.decide(net))
        assert_close(loss.expected_cost().detach(), torch.tensor(float(cost)))


def test_budget_loss_pulls_the_gates_towards_the_budget() -> None:
    _, net = make_net("class_token", dtype=torch.float32)
    cost = search_record(net).costs["macs"]
    assert 1.1 * cost.smallest < cost.of(spvit.decide(net)) < 0.9 * cost.dense
    for target, sign in ((cost.smallest, 1), (cost.dense, -1)):
        net.zero_grad()
        spvit.BudgetLoss(net, macs=target)().backward()
        for _, ffn in gated_layers(net):
            assert (ffn.gate_logits.grad * sign > 0).all()


def test_budget_loss_follows_the_gates_and_only_them() -> None:
    _, net = make_net("class_token", dtype=torch.float32)
    loss = spvit.BudgetLoss(net, macs="50%")
    before = loss().item()
    choose(net, ("skip",) * 4)
    assert loss().item() != before
    loss().backward()
    gates = {id(parameter) for parameter in spvit.gate_parameters(net)}
    assert {id(parameter) for parameter in net.parameters() if parameter.grad is not None} == gates


def test_budget_loss_takes_amounts_and_half_precision_gates() -> None:
    _, net = make_net("class_token", dtype=torch.float32)
    cost = search_record(net).costs["params"]
    half = round(cost.dense * 0.5)
    assert_close(spvit.BudgetLoss(net, params=half)(), spvit.BudgetLoss(net, params="50%")())
    assert torch.isfinite(spvit.BudgetLoss(net.to(torch.bfloat16), macs="50%")())


def test_budget_loss_refuses_what_has_no_gates_and_budgets_it_cannot_meet() -> None:
    host, net = make_net("class_token")
    with pytest.raises(NotSearchableError, match=r"this VisionTransformer is not searchable; pass what "):
        spvit.BudgetLoss(host, macs="50%")
    with pytest.raises(BudgetError, match="one of macs, params or latency, found none"):
        spvit.BudgetLoss(net)
    with pytest.raises(BudgetError, match="above the dense model's"):
        spvit.BudgetLoss(net, macs="1T")
    with pytest.raises(BudgetError, match="malformed"):
        spvit.BudgetLoss(net, params="half")


def test_a_step_with_all_terms_moves_every_parameter() -> None:
    host, net = make_net("average_pooling", ("msa",) * 4, torch.float32)
    net.train()
    x = images(host, batch=4)
    teacher = logits(make_host("average_pooling", torch.float32), x)
    out = net(x)
    loss = task_loss(out, torch.arange(4), 0.1) + distillation_loss(out, teacher, 2.0)
    (loss + spvit.BudgetLoss(net, macs="50%")()).backward()
    assert isinstance(net, nn.Module)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all(layer.gate_logits.grad.any() for pair in gated_layers(net) for layer in pair)
