"""A searchable network: where its gates are, what it knows of itself, and that wrappers do not hide it."""

from __future__ import annotations

import torch
from torch import nn

import spvit
from spvit.search.gated_attention import GatedAttention
from spvit.search.gated_linear import GatedLinear
from spvit.search.network import dense_state, search_record
from tiny import BLOCKS, WIDTH, assert_close, images, logits, make_host, make_net, paths_of, randomise


class Wrapper(nn.Module):
    """Holds a network one level down, as distributed wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_gates_sit_where_other_code_looks_for_them() -> None:
    host, net = make_net("class_token")
    assert type(net) is type(host)
    for block in net.blocks:
        assert type(block.attn) is GatedAttention
        assert type(block.mlp.fc2) is GatedLinear
        assert block.attn.gate_logits.shape == (3,)
        assert block.attn.head_logits.shape == (3, 9)
        assert block.mlp.fc2.gate_logits.shape == (WIDTH,)
        assert type(block.attn.bn1) is type(block.attn.bn3) is nn.BatchNorm2d
    named = [parameter for name, parameter in net.named_parameters() if name.endswith("gate_logits")]
    assert {id(parameter) for parameter in spvit.gate_parameters(net)} == {id(parameter) for parameter in named}
    assert len(named) == 2 * BLOCKS


def test_wrapped_networks_are_found() -> None:
    host, net = make_net("class_token")
    x = images(host)
    wrapped = Wrapper(Wrapper(net))
    assert spvit.decide(wrapped) == spvit.decide(net)
    assert search_record(wrapped) is search_record(net)
    assert_close(logits(spvit.prune(host, spvit.decide(net), weights=wrapped), x), logits(net, x))


def test_the_dense_state_has_the_keys_of_the_host_and_the_weights_of_the_search() -> None:
    for name in ("class_token", "swin", "huggingface"):
        host, net = make_net(name)
        state = dense_state(Wrapper(net))
        assert state.keys() == host.state_dict().keys()
        for paths in paths_of(host):
            found, own = state[f"{paths.second}.weight"], net.get_submodule(paths.second).linear.weight
            assert torch.equal(found, own)
            assert not torch.equal(found, host.get_submodule(paths.second).weight)


def test_the_costs_are_kept_with_the_network() -> None:
    host, net = make_net("class_token")
    costs = search_record(net).costs
    assert set(costs) == {"macs", "params"}
    assert {metric: cost.dense for metric, cost in costs.items()} == spvit.cost(host)
    assert {cost.metric for cost in costs.values()} == set(costs)


def test_a_host_can_start_a_search_twice() -> None:
    host = make_host("class_token")
    one, other = spvit.make_searchable(host), spvit.make_searchable(host)
    randomise(one, seed=3)
    assert torch.equal(logits(other, images(host)), logits(host, images(host)))
