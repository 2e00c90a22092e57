"""Pruning and folding: what test_contract.py does not ask of every host, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import spvit
from spvit.architecture import dense
from spvit.errors import ArchitectureError, NotSearchableError, UnsupportedHostError
from spvit.replacements.bottleneck import BottleneckConv
from spvit.search.network import gated_layers, search_record
from spvit.surgery import pruned_record
from tiny import (
    BLOCKS,
    EVERYTHING,
    MIXED,
    WIDTH,
    assert_close,
    choose,
    ffn_widths,
    images,
    logits,
    make_host,
    make_net,
)


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


def test_models_in_the_wrong_state_are_refused() -> None:
    host, net = make_net("class_token")
    pruned = spvit.prune(host, spvit.decide(net))
    for call in (spvit.decide, spvit.gate_parameters, search_record, gated_layers):
        for model in (host, pruned):
            advice = r"(give scores=.*, or )?pass what spvit\."
            with pytest.raises(NotSearchableError, match=f"this VisionTransformer is not searchable; {advice}"):
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
        with pytest.raises(UnsupportedHostError, match=r"torch\.nn\.modules\.linear\.Linear is not supported"):
            call(nn.Linear(2, 2))


def test_architectures_that_do_not_fit_are_refused() -> None:
    host = make_host("class_token")
    with pytest.raises(ArchitectureError, match="the architecture has 3 blocks, but this VisionTransformer has 4; use"):
        spvit.prune(host, dense([WIDTH] * 3))
    with pytest.raises(ArchitectureError, match="has 3 blocks, but this VisionTransformer has 4"):
        spvit.cost(host, dense([WIDTH] * 3))
    with pytest.raises(ArchitectureError, match="block 2: the architecture is for an FFN of 71 units, but this "):
        spvit.prune(host, dense([WIDTH, WIDTH, 71, WIDTH]))
    with pytest.raises(ArchitectureError, match="block 2: the architecture is for an FFN of 72 units, but this "):
        spvit.prune(make_host("swin"), EVERYTHING)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("class_token", "distilled"),
        ("class_token", "non_square"),
        ("class_token", "huggingface"),
        ("swin", "swin_padded"),
        ("swin", "class_token"),
    ],
)
def test_weights_of_another_host_are_refused_and_nothing_is_changed(name: str, other: str) -> None:
    host = make_host(name)
    net = make_net(other)[1]
    with pytest.raises(NotSearchableError, match="the searchable network was made from another host: "):
        spvit.prune(host, dense(ffn_widths(host)), weights=net, inplace=True)
    x = images(host)
    assert torch.equal(logits(host, x), logits(make_host(name), x))
