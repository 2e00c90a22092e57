"""The contract of every host, by the public calls: all forms of a network agree, and what is not touched stays."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block, dense
from tiny import (
    ALIKE,
    BOTH,
    FAMILY_OF,
    HOSTS,
    MIXED,
    ONE_A_FAMILY,
    OTHER_SIZES,
    TURNS,
    assert_all_close,
    assert_close,
    assert_differ,
    backward,
    choose,
    count_macs,
    ffn_widths,
    images,
    logits,
    make_host,
    make_net,
    paths_of,
    randomise,
    with_kinds,
)

OURS = ("gate_logits", "head_logits", "bn1", "bn3")
ONE_EACH = pytest.mark.parametrize("case", ONE_A_FAMILY, indirect=True)


class Case:
    """A host with what is made of it once; a test that changes one of them works on a copy."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.host, self.net = make_net(name)
        self.x = images(self.host)
        self.architecture = spvit.decide(self.net)

    @cached_property
    def pruned(self) -> nn.Module:
        return spvit.prune(self.host, self.architecture, weights=self.net)

    @cached_property
    def narrowable(self) -> bool:
        """Whether heads and values of its attention may be cut, which a norm over all of them forbids."""
        return self.name != "options"

    @cached_property
    def narrows_queries(self) -> bool:
        """Whether queries and keys may be cut, beside which a bias of the places of tokens may not be."""
        return self.narrowable and FAMILY_OF[self.name] != "timm_swin"

    @cached_property
    def head_width(self) -> int:
        attention = self.host.get_submodule(paths_of(self.host)[0].attention)
        return (getattr(attention, "proj", None) or attention.o_proj).in_features // 3

    @cached_property
    def mixed(self) -> Architecture:
        """Every kind of attention, some FFN units of every block, and rules that cost something."""
        blocks = (
            Block(
                Attention(kind, value_rank=4 if kind == "msa" and self.narrowable else None),
                FFN(width, tuple(range(0, width, 2))),
            )
            for kind, width in zip(MIXED, ffn_widths(self.host))
        )
        return Architecture(tuple(blocks), prefix_rule="linear", skip_rule="mean")

    @cached_property
    def dense(self) -> spvit.Host:
        """The host in single precision, in the form that knows its sites and costs."""
        return spvit.Host.of(make_host(self.name, torch.float32))

    @cached_property
    def dense_cost(self) -> dict[str, int]:
        return spvit.cost(self.dense)

    @cached_property
    def scores(self) -> spvit.Scores:
        return spvit.score(self.dense, images(self.dense.model, 16), multiple=4)

    @cached_property
    def repaired(self) -> nn.Module:
        return spvit.prune(self.host, self.mixed, repair=images(self.host, 32))


@pytest.fixture(name="case", scope="module", params=HOSTS)
def _case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_searchable_pruned_folded_and_loaded_agree(case: Case, tmp_path: Path) -> None:
    expected = logits(case.net, case.x)
    assert_differ(expected[0], expected[1])
    assert_differ(logits(case.host, case.x), expected)
    widths = ffn_widths(case.host)
    assert case.architecture.kinds() == MIXED
    assert all(0 < kept < width for kept, width in zip(case.architecture.widths(), widths))
    for stage, model in {"pruned": case.pruned, "folded": spvit.fold(case.pruned)}.items():
        assert_close(logits(model, case.x), expected)
        loaded = spvit.load(spvit.save(model, tmp_path / stage))
        assert torch.equal(logits(loaded, case.x), logits(model, case.x))
    # Neither the weights nor the architecture is left out.
    assert_differ(logits(spvit.prune(case.host, dense(widths), weights=case.net), case.x), expected)
    assert_differ(logits(spvit.prune(case.host, case.architecture), case.x), expected)


@pytest.mark.parametrize("kinds", [*TURNS[1:], ("skip",) * 4, ("conv3",) * 4], ids="-".join)
@pytest.mark.parametrize("case", [*BOTH, *(name for name in HOSTS if name not in ALIKE)], indirect=True)
def test_searchable_pruned_and_folded_agree_with_every_kind_in_every_block(case: Case, kinds: tuple[str, ...]) -> None:
    net = choose(copy.deepcopy(case.net), kinds)
    expected = logits(net, case.x)
    architecture = spvit.decide(net)
    assert architecture.kinds() == kinds
    pruned = spvit.prune(case.host, architecture, weights=net)
    assert_close(logits(pruned, case.x), expected)
    assert_close(logits(spvit.fold(pruned), case.x), expected)
    assert_differ(logits(case.host, case.x), expected)


@pytest.mark.parametrize("block", range(4))
@ONE_EACH
def test_every_decision_shows_in_the_logits(case: Case, block: int) -> None:
    expected = logits(case.net, case.x)
    for kind in ("msa", "conv3", "conv1", "skip"):
        kinds = (*MIXED[:block], kind, *MIXED[block + 1 :])
        found = logits(spvit.prune(case.host, with_kinds(case.architecture, *kinds), weights=case.net), case.x)
        assert_close(found, logits(choose(copy.deepcopy(case.net), kinds), case.x))
        (assert_close if kind == MIXED[block] else assert_differ)(found, expected)
    blocks = list(case.architecture.blocks)
    width = blocks[block].ffn.width
    blocks[block] = replace(blocks[block], ffn=FFN(width, tuple(range(width))))
    whole = spvit.prune(case.host, replace(case.architecture, blocks=tuple(blocks)), weights=case.net)
    assert_differ(logits(whole, case.x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeping_everything_changes_no_bit(case: Case, dtype: torch.dtype) -> None:
    host = copy.deepcopy(case.host).to(dtype)
    x = images(host)
    expected = logits(host, x)
    net = spvit.make_searchable(host)
    assert torch.equal(logits(net, x), expected)
    everything = dense(ffn_widths(host))
    assert spvit.decide(net) == everything
    for options in ({}, {"weights": net}, {"repair": x}):
        kept = spvit.prune(host, everything, **options)
        for model in (kept, spvit.fold(kept)) if not options else (kept,):
            assert torch.equal(logits(model, x), expected)
            state = model.state_dict()
            assert list(state) == list(host.state_dict())
            assert all(torch.equal(state[key], value) for key, value in host.state_dict().items())
            assert [type(module) for module in model.modules()] == [type(module) for module in host.modules()]


@pytest.mark.parametrize("repair", [False, True], ids=["as cut", "repaired"])
def test_what_is_not_replaced_keeps_its_modules_keys_and_tensors(case: Case, repair: bool) -> None:
    whole = dense(ffn_widths(case.host)).blocks
    architecture = replace(case.mixed, blocks=(*case.mixed.blocks[:3], whole[3]))
    pruned = spvit.prune(case.host, architecture, repair=images(case.host, 32) if repair else None)
    state, own = pruned.state_dict(), case.host.state_dict()
    replaced, narrowed = [], []
    for paths, block in zip(paths_of(case.host)[:3], architecture.blocks):
        replaced += [paths.attention]
        if block.attention.kind == "skip" and case.name != "residual_post_norm":  # there the norm follows
            replaced += [paths.norm]
        narrowed += [paths.first, paths.second]
        units = list(block.ffn.units)
        assert torch.equal(state[f"{paths.first}.weight"], own[f"{paths.first}.weight"][units])
        if not repair:
            assert torch.equal(state[f"{paths.second}.weight"], own[f"{paths.second}.weight"][:, units])
    if repair:  # a whole FFN behind them mends what changed
        narrowed += [paths_of(case.host)[3].second]
    modules = dict(pruned.named_modules())
    for name, module in case.host.named_modules():
        if not f"{name}.".startswith(tuple(f"{path}." for path in replaced)):
            assert type(modules[name]) is type(module), name
    for key, value in own.items():
        if not key.startswith(tuple(f"{path}." for path in (*replaced, *narrowed))):
            assert torch.equal(state[key], value), key


COSTED = {"-".join(kinds): tuple(Attention(kind) for kind in kinds) for kinds in TURNS[:2]} | {
    "narrow": (
        Attention(heads=(1,)),
        Attention(query_key_rank=3, value_rank=5),
        Attention(query_key_rank=7),
        Attention(heads=(0, 2), query_key_rank=1, value_rank=8),
    )
}


@pytest.mark.parametrize("kept", COSTED)
def test_costs_are_those_that_pytorch_counts(case: Case, kept: str) -> None:
    host = case.dense.model
    x = images(host, batch=1)
    widths = ffn_widths(host)
    units = [(0, 5, 70), tuple(range(1, widths[1], 2)), (), tuple(range(widths[3]))]
    attention = COSTED[kept]
    if case.narrowable and not case.narrows_queries:
        attention = tuple(replace(own, query_key_rank=None) for own in attention)
    blocks = tuple(Block(own, FFN(*ffn)) for own, ffn in zip(attention, zip(widths, units)))
    whole = Architecture(blocks)
    architecture = whole if kept == "-".join(MIXED) else replace(whole, prefix_rule="linear", skip_rule="mean")
    if kept == "narrow" and not case.narrowable:
        with pytest.raises(spvit.ArchitectureError, match="block 0: "):
            spvit.cost(case.dense, architecture)
        return
    small = spvit.fold(spvit.prune(case.dense, architecture))
    x = x.to("meta") if kept == "narrow" else x
    assert spvit.cost(case.dense, architecture) == {"macs": count_macs(small, x), "params": _params(small)}
    if kept == "narrow":
        assert spvit.cost(host, architecture) == spvit.cost(case.dense, architecture)
        assert case.dense_cost == {"macs": count_macs(host, x), "params": _params(host)}


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_narrow_attention_of_full_rank_is_the_host(case: Case) -> None:
    width = case.head_width
    whole = dense(ffn_widths(case.host))

    def narrow(kept: Attention, **options: Any) -> Tensor:
        architecture = replace(whole, blocks=tuple(replace(block, attention=kept) for block in whole.blocks))
        return logits(spvit.prune(case.host, architecture, **options), case.x)

    full = Attention(heads=(0, 1, 2), query_key_rank=width, value_rank=width)
    if not case.narrows_queries:
        with pytest.raises(spvit.ArchitectureError, match="block 0: "):
            narrow(full)
        return
    expected = logits(case.host, case.x)
    found = narrow(full, repair=images(case.host, 16, seed=1))
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    parts = (Attention(heads=(0, 1, 2)), Attention(query_key_rank=width), Attention(value_rank=width))
    for kept in (full, *parts):
        assert (narrow(kept) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert_differ(narrow(Attention(query_key_rank=2)), expected)
    assert_differ(narrow(Attention(value_rank=2)), expected)
    assert_differ(narrow(Attention(heads=(0, 2))), expected)


def test_repair_brings_outputs_nearer_on_images_it_has_not_seen(case: Case, tmp_path: Path) -> None:
    unseen = images(case.host, 16, seed=9)
    expected = logits(case.host, unseen)
    cut = spvit.prune(case.host, case.mixed)
    errors = [(logits(model, unseen) - expected).square().mean() for model in (case.repaired, cut)]
    assert errors[0] < 0.5 * errors[1]
    for twin in (spvit.fold(case.repaired), spvit.load(spvit.save(case.repaired, tmp_path))):
        assert_close(logits(twin, unseen), logits(case.repaired, unseen))
    low = make_host(case.name, torch.bfloat16)
    found = spvit.prune(low, case.mixed, repair=images(low, 24))
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert logits(found, images(low)).isfinite().all()


@ONE_EACH
def test_deciding_from_images_is_scoring_them_first_and_leaves_the_host_as_it_is(case: Case) -> None:
    host = copy.deepcopy(case.dense.model)
    x = images(host, 16)
    expected, state, hooks = logits(host, x), copy.deepcopy(host.state_dict()), _hooks(host)
    steps: list[tuple[int, int]] = []
    found = spvit.decide(host, macs="70%", multiple=4, calibration=x, report=lambda _, *step: steps.append(step[:2]))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found == spvit.decide(case.dense, macs="70%", multiple=4, scores=case.scores)
    assert _hooks(host) == hooks
    assert all(torch.equal(host.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(logits(host, x), expected)


def test_scores_decide_on_any_budget_and_repair_serves_the_decision(case: Case, tmp_path: Path) -> None:
    host = case.dense.model
    architecture = spvit.decide(host, macs="70%", scores=case.scores)
    case.scores.save(tmp_path)
    assert spvit.Scores.load(tmp_path) == case.scores
    for budget, metric in ((0.7, "macs"), (0.8, "params")):
        found = spvit.decide(case.dense, **{metric: f"{budget:.0%}"}, scores=case.scores)
        assert 0.995 * budget <= spvit.cost(case.dense, found)[metric] / case.dense_cost[metric] <= budget
        assert Architecture.from_json(found.to_json()) == found
    unseen = images(host, 16, seed=3)
    expected = logits(host, unseen)
    models = [spvit.prune(host, architecture, repair=repair) for repair in (images(host, 16), None)]
    repaired, cut = ((logits(model, unseen) - expected).square().mean() for model in models)
    assert repaired < cut


def test_every_candidate_has_a_score(case: Case) -> None:
    for block, width in zip(case.scores.blocks, ffn_widths(case.host)):
        kept = [attention for attention, _ in block.attention]
        values = [value for _, value in block.attention]
        assert kept[0] == Attention()
        assert kept[-3:] == [Attention("conv3"), Attention("conv1"), Attention("skip")]
        if case.narrows_queries:
            ranks = (*range(4, case.head_width, 4), None)
            shapes = [(heads, *pair) for pair in itertools.product(ranks, ranks) for heads in (1, 2, 3)]
            found = [(len(item.heads or range(3)), item.query_key_rank, item.value_rank) for item in kept[:-3]]
            assert sorted(found, key=str) == sorted(shapes, key=str)
        elif case.narrowable:
            assert len(kept) > 4
            assert {item.query_key_rank for item in kept} == {None}
        else:
            assert len(kept) == 4
        assert values[0] == block.ffn[-1] == 0
        assert min(values[1:]) > 0
        assert len(block.ffn) == width + 1
        assert all(fewer > more for fewer, more in itertools.pairwise(block.ffn))
        assert sorted(block.ranking.units) == list(range(width))


def test_a_search_step_moves_everything_and_its_decision_costs_what_the_loss_expects(case: Case) -> None:
    net = choose(copy.deepcopy(case.net), ("msa",) * 4).train()
    for metric in ("macs", "params"):
        loss = spvit.BudgetLoss(net, **{metric: "80%"})
        found = spvit.cost(case.dense, spvit.decide(net))[metric]
        assert loss.expected_cost().item() == pytest.approx(found, rel=1e-6)
    torch.manual_seed(0)
    backward(net, case.x)
    loss().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(parameter.grad.any() for parameter in spvit.gate_parameters(net))


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_decisions_of_a_search_land_on_the_budget(case: Case, metric: str) -> None:
    bounds = []
    for share in (8, 1):
        blocks = tuple(
            replace(block, ffn=FFN(block.ffn.width, tuple(range(block.ffn.width // share))))
            for block in case.architecture.blocks
        )
        bounds.append(spvit.cost(case.dense, replace(case.architecture, blocks=blocks))[metric])
    for share in (0.1, 0.5, 0.9):
        target = round(bounds[0] + share * (bounds[1] - bounds[0]))
        found = spvit.decide(case.net, **{metric: target})
        assert found.kinds() == MIXED
        assert abs(spvit.cost(case.dense, found)[metric] - target) <= 0.005 * target


@ONE_EACH
def test_exported_programs_take_any_batch(case: Case) -> None:
    model = spvit.fold(case.repaired)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (images(case.host, 3),), dynamic_shapes=dynamic).module()
    for batch in (2, 5):
        x = images(case.host, batch, seed=batch)
        assert_close(logits(program, x), logits(model, x))


VERBS: dict[str, Callable[[Case, nn.Module], nn.Module]] = {
    "make_searchable": lambda case, host: spvit.make_searchable(host),
    "prune": lambda case, host: spvit.prune(host, case.mixed, repair=images(host, 32)),
    "fold": lambda case, host: spvit.fold(spvit.prune(host, case.mixed)),
}


@pytest.mark.parametrize(("verb", "device"), [("make_searchable", "cpu"), ("prune", "cpu"), ("fold", "meta")])
def test_dtype_device_flags_and_hooks_survive(case: Case, verb: str, device: str) -> None:
    dtype = torch.bfloat16 if device == "meta" else torch.float64
    host = copy.deepcopy(case.host).to(device, dtype).train()
    first, second = (f"{paths.block}." for paths in paths_of(host)[:2])
    host.get_submodule(first[:-1]).eval()
    host.get_submodule(second[:-1]).requires_grad_(False)
    calls: list[str] = []
    embed = next(path for path, module in host.named_modules() if isinstance(module, nn.Conv2d))
    for path in (embed, paths_of(host)[3].block):
        host.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    state, classes = copy.deepcopy(host.state_dict()), [type(module) for module in host.modules()]
    hooks = _hooks(host)

    net = VERBS[verb](case, host)
    calls.clear()
    for name, module in net.named_modules():
        assert module.training == (not f"{name}.".startswith(first)), name
    for name, parameter in net.named_parameters():
        ours = verb == "make_searchable" and any(part in name for part in OURS)
        assert parameter.requires_grad == (not name.startswith(second) or ours), name
        assert parameter.is_leaf
    tensors = [*net.parameters(), *net.buffers()]
    assert {tensor.device.type for tensor in tensors} == {device}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    net(images(host).to(device))
    assert calls == [embed, paths_of(host)[3].block]

    assert net is not host
    assert [type(module) for module in host.modules()] == classes
    assert all(module.training == (not f"{name}.".startswith(first)) for name, module in host.named_modules())
    assert _hooks(host) == hooks
    if device == "cpu":
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1)
        assert all(torch.equal(host.state_dict()[key], value) for key, value in state.items())


@ONE_EACH
def test_a_search_can_be_set_up_where_weights_have_no_values(case: Case) -> None:
    net = spvit.make_searchable(copy.deepcopy(case.host).to("meta", torch.bfloat16))
    tensors = [*net.parameters(), *net.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.bfloat16}


def _hooks(model: nn.Module) -> dict[str, int]:
    """Return how many hooks every module of a model has, where there are any."""
    counts = {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for name, module in model.named_modules()
    }
    return {name: count for name, count in counts.items() if count}


def test_in_place_changes_the_host_itself_and_states_load_strictly(case: Case) -> None:
    host, expected = copy.deepcopy(case.host), logits(case.net, case.x)
    searchable = copy.deepcopy(host)
    assert spvit.make_searchable(searchable, inplace=True) is searchable
    searchable.load_state_dict(case.net.state_dict(), strict=True)
    assert torch.equal(logits(searchable, case.x), expected)
    assert spvit.prune(host, case.architecture, weights=case.net, inplace=True) is host
    assert_close(logits(host, case.x), expected)
    assert spvit.fold(host, inplace=True) is host
    assert_close(logits(host, case.x), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in host.modules())

    for finish in (lambda model: model, spvit.fold):
        source, target = finish(case.pruned), finish(spvit.prune(case.host, case.architecture))
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(logits(target, case.x), logits(source, case.x))


def _pickled(net: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["copy", "pickle"])
def test_copies_work_on_their_own(case: Case, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    sizes = OTHER_SIZES.get(case.name, [None])
    options = _options(case.name) if sizes[0] else {}
    for model in (case.net, case.pruned, case.repaired):
        expected = logits(model, case.x)
        twin = duplicate(model)
        # A copy that shared its grid with the model would now work on the wrong one.
        logits(model, images(case.host, size=sizes[0], seed=5), **options)
        assert torch.equal(logits(twin, case.x), expected)
        randomise(twin, seed=9)
        assert torch.equal(logits(model, case.x), expected)
        assert_differ(logits(twin, case.x), expected)


@ONE_EACH
@pytest.mark.parametrize("after_a_step", [True, False])
def test_copies_of_a_searchable_network_learn_alike(case: Case, after_a_step: bool) -> None:
    net = copy.deepcopy(case.net).train()
    if after_a_step:
        backward(net, case.x)
    twins = [net, copy.deepcopy(net), _pickled(net)]
    gradients = []
    for model in twins:
        torch.manual_seed(3)
        gradients.append(backward(model, case.x))
        assert spvit.decide(model) == case.architecture
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        assert all(torch.equal(other[key], value) for key, value in gradients[0].items())
    assert not torch.equal(logits(net, case.x), logits(net, case.x))  # every pass draws anew


def _options(name: str) -> dict[str, Any]:
    """Return what a host is called with when images have another size."""
    return {"interpolate_pos_encoding": True} if FAMILY_OF[name] == "huggingface" else {}


@pytest.mark.parametrize("case", OTHER_SIZES, indirect=True)
def test_images_of_any_size_pass_the_same_networks(case: Case) -> None:
    folded = spvit.fold(case.pruned)
    options, sizes = _options(case.name), OTHER_SIZES[case.name]
    for size in (*sizes, sizes[0]):
        x = images(case.host, size=size)
        expected = logits(case.net, x, **options)
        assert_close(logits(case.pruned, x, **options), expected)
        assert_close(logits(folded, x, **options), expected)


@ONE_EACH
def test_skip_can_mean_the_normalised_input(case: Case) -> None:
    tuples = FAMILY_OF[case.name] == "huggingface"
    expected = copy.deepcopy(case.host)
    layer = expected.get_submodule(paths_of(expected)[1].attention)
    layer.forward = lambda hidden, *args, **options: (hidden, None) if tuples else hidden
    architecture = with_kinds(dense(ffn_widths(case.host)), "msa", "skip", "msa", "msa")
    found = spvit.prune(case.host, replace(architecture, skip_rule="normalised_input"))
    assert_close(logits(found, case.x), logits(expected, case.x))
    zero = spvit.prune(case.host, replace(architecture, skip_rule="zero"))
    assert_differ(logits(zero, case.x), logits(expected, case.x))


@pytest.mark.parametrize("seed", [0, 1])
@ONE_EACH
def test_gradient_checkpointing_changes_no_gradient(case: Case, seed: int) -> None:
    host = copy.deepcopy(case.host)
    if FAMILY_OF[case.name] == "huggingface":
        getattr(host, "activation_checkpointing_enable", host.gradient_checkpointing_enable)()
    else:
        host.set_grad_checkpointing(True)
    other = spvit.make_searchable(host)
    other.load_state_dict(case.net.state_dict())
    gradients = []
    for net in (other, copy.deepcopy(case.net)):
        torch.manual_seed(seed)
        gradients.append(backward(net.train(), case.x))
    assert_all_close(*gradients)
