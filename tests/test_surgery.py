"""The walker over a host: searchable = pruned = folded = saved and loaded, what is kept stays, and what is decided."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from spvit.search.gated_linear import GatedLinear
from spvit.pruned import BottleneckConv
from spvit.search.gated_attention import GatedAttention
from torch import nn

import spvit
from spvit.architecture import FFN, dense
from spvit.cost import NetworkCost
from spvit.errors import ArchitectureError, BudgetError, NotSearchableError, UnsupportedHostError
from spvit.surgery import gated_layers, pruned_record, search_record
from tiny import (
    BLOCKS,
    BOTH,
    EVERYTHING,
    FAMILY_OF,
    HOSTS,
    MIXED,
    WIDTH,
    assert_close,
    choose,
    images,
    logits,
    make_host,
    make_net,
    randomise,
)


class Wrapper(nn.Module):
    """Holds a network one level down, as distributed wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_pruning_without_a_search_averages_the_heads() -> None:
    host = make_host("class_token")
    x = images(host)
    fresh = choose(spvit.make_searchable(host), MIXED)
    pruned = spvit.prune(host, spvit.decide(fresh))
    assert_close(logits(pruned, x), logits(fresh, x))
    value_weight = host.blocks[0].attn.qkv.weight[48:].unflatten(0, (3, 8)).mean(0)
    conv_in = pruned.blocks[0].attn.conv_in.weight
    assert_close(conv_in, value_weight[:, :, None, None].expand(-1, -1, 3, 3))


@pytest.mark.parametrize("emptied", [MIXED, ("skip",) * BLOCKS])
def test_ffns_can_be_emptied(emptied: tuple[str, ...]) -> None:
    host, net = make_net("class_token", emptied)
    x = images(host)
    with torch.no_grad():
        for _, ffn in gated_layers(net)[1:]:
            ffn.gate_logits.abs_().neg_()
    architecture = spvit.decide(net)
    assert architecture.widths()[1:] == (0, 0, 0)
    pruned = spvit.prune(host, architecture, weights=net)
    assert_close(logits(pruned, x), logits(net, x))
    assert_close(logits(spvit.fold(pruned), x), logits(net, x))


def test_a_search_in_another_precision_prunes_a_host_in_its_own() -> None:
    host, net = make_net("class_token", dtype=torch.float32)
    pruned = spvit.prune(host, spvit.decide(net), weights=copy.deepcopy(net).to(torch.float64))
    assert {tensor.dtype for tensor in pruned.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert_close(logits(pruned, images(host)), logits(net, images(host)))


def test_call_signature_and_return_type_stay() -> None:
    transformers = pytest.importorskip("transformers")
    host, net = make_net("huggingface")
    x = images(host)
    pruned = spvit.prune(host, spvit.decide(net), weights=net)
    for model in (net, net.train(), pruned):
        out = model(pixel_values=x, labels=torch.tensor([0, 3]), output_hidden_states=True)
        assert isinstance(out, transformers.modeling_outputs.ImageClassifierOutput)
        assert out.loss.requires_grad
        assert len(out.hidden_states) == BLOCKS + 1
    host, net = make_net("class_token")
    pruned = spvit.prune(host, spvit.decide(net), weights=net)
    x = images(host)
    assert_close(pruned.forward_features(x), net.forward_features(x))
    assert_close(pruned.forward_head(pruned.forward_features(x)), net(x))


def test_distilled_hosts_keep_both_heads_in_training() -> None:
    host, net = make_net("distilled")
    host.set_distilled_training(True)
    for model in (spvit.make_searchable(host), spvit.prune(host, spvit.decide(net))):
        out = model.train()(images(host))
        assert isinstance(out, tuple)
        assert [part.shape for part in out] == [(2, 7), (2, 7)]


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


def test_a_pruned_network_knows_what_it_is() -> None:
    host, net = make_net("class_token")
    architecture = spvit.decide(net)
    pruned = spvit.prune(host, architecture)
    folded = spvit.fold(pruned)
    assert pruned_record(host) is None
    assert pruned_record(net) is None
    assert pruned_record(pruned).architecture == pruned_record(folded).architecture == architecture
    assert (pruned_record(pruned).folded, pruned_record(folded).folded) == (False, True)
    assert pruned_record(copy.deepcopy(folded)).folded
    again = spvit.fold(folded)
    assert torch.equal(logits(again, images(host)), logits(folded, images(host)))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert sum(isinstance(module, BottleneckConv) for module in folded.modules()) == 2


def _cost(net: nn.Module, metric: str) -> NetworkCost:
    return search_record(net).costs[metric]


def test_without_a_budget_the_decision_is_the_gates() -> None:
    _, net = make_net("class_token")
    architecture = spvit.decide(net)
    for (_, ffn), block in zip(gated_layers(net), architecture.blocks):
        assert list(block.ffn.units) == [i for i, logit in enumerate(ffn.gate_logits.tolist()) if logit > 0]
    rounded = spvit.decide(net, multiple=8)
    assert rounded.kinds() == MIXED
    for width, exact in zip(rounded.widths(), architecture.widths()):
        assert width % 8 == 0
        assert abs(width - exact) <= 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("name", BOTH)
def test_decisions_land_on_the_budget(name: str, metric: str, seed: int) -> None:
    _, net = make_net(name)
    randomise(net, seed=10 + seed)
    cost = _cost(net, metric)
    unbound = spvit.decide(net)
    bounds = [
        cost.of(replace(unbound, blocks=tuple(replace(b, ffn=FFN(WIDTH, tuple(range(n)))) for b in unbound.blocks)))
        for n in (8, WIDTH)
    ]
    for share in (0.0, 0.1, 0.33, 0.5, 0.77, 1.0):
        target = round(bounds[0] + share * (bounds[1] - bounds[0]))
        architecture = spvit.decide(net, **{metric: target})
        assert abs(cost.of(architecture) - target) <= 0.005 * target
        assert architecture.kinds() == unbound.kinds()
        for (_, ffn), block in zip(gated_layers(net), architecture.blocks):
            kept = torch.zeros(WIDTH, dtype=torch.bool)
            kept[list(block.ffn.units)] = True
            if 0 < kept.sum() < WIDTH:
                assert ffn.gate_logits[kept].min() > ffn.gate_logits[~kept].max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", ["55%", "70%", "85%"])
def test_widths_are_multiples_of_eight_where_they_can_be(budget: str, seed: int) -> None:
    timm = pytest.importorskip("timm")
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=24, depth=4, num_heads=3, mlp_ratio=16)
    net = choose(randomise(spvit.make_searchable(host), seed=seed), ("msa", "conv3", "msa", "msa"))
    cost = _cost(net, "macs")
    architecture = spvit.decide(net, macs=budget)
    assert all(width % 8 == 0 for width in architecture.widths())
    assert abs(cost.of(architecture) / cost.dense - float(budget[:-1]) / 100) < 0.005 * float(budget[:-1]) / 100
    odd = spvit.decide(net, macs=budget, multiple=1)
    assert any(width % 8 for width in odd.widths())
    assert abs(cost.of(odd) / cost.dense - float(budget[:-1]) / 100) < 0.005 * float(budget[:-1]) / 100
    widths = spvit.decide(net, macs=budget, multiple=16).widths()
    assert all(width % 16 == 0 for width in widths)


def test_all_blocks_share_one_threshold() -> None:
    _, net = make_net("class_token")
    architecture = spvit.decide(net, macs="65%", multiple=1)
    kept, dropped = [], []
    for (_, ffn), block in zip(gated_layers(net), architecture.blocks):
        values = ffn.gate_logits.tolist()
        kept += sorted(values[i] for i in block.ffn.units)[:-1]  # each block keeps its best unit in any case
        dropped += [value for i, value in enumerate(values) if i not in block.ffn.units]
    assert min(kept) > max(dropped)


def test_ties_go_evenly_over_the_blocks() -> None:
    net = spvit.make_searchable(make_host("class_token"))
    for budget in ("76%", "85%", "95%"):
        widths = spvit.decide(net, macs=budget).widths()
        assert max(widths) < WIDTH
        assert max(widths) - min(widths) <= 8
    assert spvit.decide(net, macs="100%") == EVERYTHING


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_unreachable_budgets_name_the_nearest_that_is_reachable(metric: str) -> None:
    _, net = make_net("class_token")
    cost = _cost(net, metric)
    for word, target in (("smallest", cost.smallest), ("largest", cost.dense)):
        message = rf"cannot be reached with the attention layers that the gates keep: the {word} reachable is "
        with pytest.raises(BudgetError, match=message) as caught:
            spvit.decide(net, **{metric: target})
        bound = int(re.search(rf"([\d,]+) {metric}\)", str(caught.value))[1].replace(",", ""))
        assert cost.of(spvit.decide(net, **{metric: bound})) == bound
        beyond = round(bound * (0.99 if word == "smallest" else 1.01))
        with pytest.raises(BudgetError, match=rf"the {word} reachable is"):
            spvit.decide(net, **{metric: beyond})


def test_budgets_that_cannot_be_decided_are_refused() -> None:
    _, net = make_net("class_token")
    with pytest.raises(BudgetError, match=r"no FFN widths that are multiples of 36 come within 0\.5% of .* macs; use"):
        spvit.decide(net, macs="69.5%", multiple=36)
    with pytest.raises(BudgetError, match="multiple is 0, expected 1 or more units"):
        spvit.decide(net, multiple=0)
    with pytest.raises(BudgetError, match="found both"):
        spvit.decide(net, macs="50%", params="50%")
    with pytest.raises(BudgetError, match="malformed"):
        spvit.decide(net, macs="half")
    with pytest.raises(BudgetError, match="above the dense model's"):
        spvit.decide(net, params="1T")
    with pytest.raises(BudgetError, match=r"of 7\.422k macs \(1\.0%\) cannot be reached: the smallest reachable is"):
        spvit.decide(net, macs="1%")


def test_models_in_the_wrong_state_are_refused() -> None:
    host, net = make_net("class_token")
    pruned = spvit.prune(host, spvit.decide(net))
    for call in (spvit.decide, spvit.gate_parameters, search_record, gated_layers):
        for model in (host, pruned):
            with pytest.raises(
                NotSearchableError, match=r"this VisionTransformer is not searchable; pass what spvit\."
            ):
                call(model)
    for model in (net, pruned):
        with pytest.raises(
            NotSearchableError, match="already searchable or pruned by spvit; start from the dense host"
        ):
            spvit.make_searchable(model)
        with pytest.raises(
            NotSearchableError, match="prune takes the dense host; pass a searchable network as weights="
        ):
            spvit.prune(model, EVERYTHING)
    with pytest.raises(NotSearchableError, match="is not searchable"):
        spvit.prune(host, EVERYTHING, weights=host)
    for model in (host, net):
        with pytest.raises(UnsupportedHostError, match=r"fold takes a model that spvit\.prune returned, found a "):
            spvit.fold(model)
    for call in (spvit.make_searchable, lambda model: spvit.prune(model, EVERYTHING)):
        with pytest.raises(UnsupportedHostError, match=r"torch\.nn\.modules\.linear\.Linear is not a supported model"):
            call(nn.Linear(2, 2))


def test_architectures_that_do_not_fit_are_refused() -> None:
    host = make_host("class_token")
    with pytest.raises(ArchitectureError, match="the architecture has 3 blocks, but this VisionTransformer has 4; use"):
        spvit.prune(host, dense([WIDTH] * 3))
    with pytest.raises(ArchitectureError, match="block 2: the architecture is for an FFN of 71 units, but this "):
        spvit.prune(host, dense([WIDTH, WIDTH, 71, WIDTH]))


@pytest.mark.parametrize("other", ["distilled", "non_square", "huggingface"])
def test_weights_of_another_host_are_refused_and_nothing_is_changed(other: str) -> None:
    assert set(FAMILY_OF) == set(HOSTS)
    host = make_host("class_token")
    net = make_net(other)[1]
    with pytest.raises(NotSearchableError, match="the searchable network was made from another host: "):
        spvit.prune(host, EVERYTHING, weights=net)
    x = images(host)
    assert torch.equal(logits(host, x), logits(make_host("class_token"), x))
