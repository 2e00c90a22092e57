"""Own models and families of libraries: what is found, the contract by public calls, what is refused and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block, dense
from spvit.hosts.walk import tokens_of

pytest.importorskip("transformers")
from library_models import LIBRARY, LIBRARY_EXPECTED, WINDOWED, WINDOWED_EXPECTED
from own_models import EXPECTED, OWN, Expected
from own_refused import EITHER, REFUSED, TextTransformer
from tiny import (
    BLOCKS,
    MIXED,
    TURNS,
    assert_close,
    assert_differ,
    assert_untouched,
    backward,
    choose,
    count_macs,
    everything_of,
    logits,
    randomise,
)

MODELS = {name: (make, EXPECTED[name]) for name, make in OWN.items()}
MODELS |= {name: (make, LIBRARY_EXPECTED[name]) for name, make in LIBRARY.items()}
MODELS |= {f"windows {name}": (make, WINDOWED_EXPECTED[name]) for name, make in WINDOWED.items()}


class Case:
    """A model, what is found in it, and what is made of it; a test that changes one of them makes its own."""

    def __init__(self, make: Callable[[], nn.Module], expected: Expected) -> None:
        self.make, self.expected = make, expected
        self.model = randomise(make()).to(torch.float64).eval()
        self.x = self.images(2)

    def images(self, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.expected.image, generator=generator, dtype=torch.float64).to(dtype)

    @cached_property
    def host(self) -> spvit.Host:
        return spvit.recognise(self.model, self.images(4, seed=2))

    @cached_property
    def single(self) -> spvit.Host:
        """The same in single precision."""
        model = randomise(self.make()).eval()
        return spvit.recognise(model, self.images(4, seed=2, dtype=torch.float32))

    @cached_property
    def mixed(self) -> Architecture:
        """Every kind of attention, some units of every FFN, and rules that cost something."""
        last = Attention(heads=(0, 2), value_rank=4) if self.expected.narrows_values else Attention()
        kept = (Attention("conv3"), Attention("skip"), Attention("conv1"), last)
        widths = self.whole.widths()
        units = (range(0, widths[0], 2), range(5), range(widths[2]), range(1, widths[3], 3))
        blocks = tuple(Block(attention, FFN(*own)) for attention, *own in zip(kept, widths, map(tuple, units)))
        return Architecture(blocks, prefix_rule="linear", skip_rule="mean")

    @cached_property
    def whole(self) -> Architecture:
        return dense([self.expected.units(block) for block in range(self.expected.blocks)])

    def everywhere(self, heads: Sequence[int] | None = None, **ranks: int | str | None) -> Architecture:
        """Return an architecture that keeps all FFN units and has such attention in every block."""
        blocks = []
        for block, site in zip(self.whole.blocks, (own.attention for own in self.host.blocks)):
            own = {name: site.head_width if rank == "all" else rank for name, rank in ranks.items()}
            kept = tuple(range(site.heads)) if heads == "all" else heads
            blocks.append(replace(block, attention=Attention(heads=kept, **own)))
        return replace(self.whole, blocks=tuple(blocks))

    @cached_property
    def repaired(self) -> nn.Module:
        return spvit.prune(self.host, self.mixed, repair=self.images(32, seed=1))


@pytest.fixture(name="case", scope="module", params=MODELS)
def _case(request: pytest.FixtureRequest) -> Case:
    return Case(*MODELS[request.param])


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest magnitude."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _mean_square(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    return (logits(model, x) - expected).square().mean().item()


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _counted_plainly() -> Iterator[None]:
    """Switch PyTorch's fused encoder off: its counter does not look into it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _one_line(error: BaseException) -> str:
    message = str(error)
    assert message.strip()
    assert "\n" not in message, message
    return message


def test_the_models_tell_images_apart_and_answer_what_is_expected_of_them(case: Case) -> None:
    out = logits(case.model, case.x)
    assert torch.equal(logits(case.model, case.x), out)
    assert_differ(out[0], out[1])
    assert not case.expected.classes or out.shape[1] == case.expected.classes


def test_all_is_found_and_nothing_is_changed(case: Case) -> None:
    before, out = everything_of(case.model), logits(case.model, case.x)
    host = spvit.recognise(case.model, case.images(4, seed=2))
    assert_untouched(case.model, before)
    assert torch.equal(logits(case.model, case.x), out)
    assert host.model is case.model
    assert host.input_size == case.expected.image
    assert len(host.blocks) == case.expected.blocks
    expected = case.expected
    for index, block in enumerate(host.blocks):
        site = block.attention
        assert (site.heads, site.head_width) == expected.heads(index)
        assert (site.grid, site.windows) == (expected.grid_of(index), expected.windows[index])
        assert (site.prefix_tokens, block.ffn.units) == (expected.prefix_tokens, expected.units(index))
        assert (site.narrows_queries, site.narrows_values) == (expected.narrows_queries, expected.narrows_values)
        assert (block.before is None) == (not expected.stages or index != 2)


def test_what_is_found_depends_on_neither_weights_nor_images_nor_precision(case: Case) -> None:
    assert case.single.blocks == case.host.blocks
    other = randomise(case.make(), seed=5).eval()
    assert spvit.recognise(other, case.images(1, seed=3, dtype=torch.float32)).blocks == case.host.blocks


def test_a_model_fresh_from_its_constructor_is_found_the_same(case: Case) -> None:
    """Its positions, biases and tables may be zero and its layers scaled to nearly nothing."""
    found = spvit.recognise(case.make().eval(), case.images(2, dtype=torch.float32))
    assert found.input_size == case.host.input_size
    assert [block.path for block in found.blocks] == [block.path for block in case.host.blocks]
    for own, block in zip(found.blocks, case.host.blocks):
        assert own.ffn == block.ffn
        parts = ("path", "heads", "head_width", "prefix_tokens", "grid")
        assert all(getattr(own.attention, part) == getattr(block.attention, part) for part in parts)


def test_costs_are_those_that_pytorch_counts(case: Case) -> None:
    small = spvit.fold(spvit.prune(case.host, case.mixed))
    x = case.images(1).to("meta")
    with _counted_plainly():
        expected = {"macs": count_macs(case.model, x), "params": _params(case.model)}
        expected_small = {"macs": count_macs(small, x), "params": _params(small)}
    assert spvit.cost(case.host) == spvit.cost(case.host, case.whole) == expected
    assert spvit.cost(case.host, case.mixed) == expected_small


def _check_keeping_everything(case: Case) -> None:
    expected = logits(case.model, case.x)
    if all(block.ffn.norm is None for block in case.host.blocks):
        assert torch.equal(logits(spvit.make_searchable(case.host), case.x), expected)
    for kept in (spvit.prune(case.host, case.whole), spvit.prune(case.host, case.whole, repair=case.images(4))):
        assert torch.equal(logits(kept, case.x), expected)
        state, own = kept.state_dict(), case.model.state_dict()
        assert list(state) == list(own)
        assert all(torch.equal(state[key], value) for key, value in own.items())
        assert [type(module) for module in kept.modules()] == [type(module) for module in case.model.modules()]
    assert torch.equal(logits(spvit.fold(kept), case.x), expected)


def test_keeping_everything_changes_no_bit(case: Case) -> None:
    _check_keeping_everything(case)


def _check_full_rank(case: Case) -> None:
    expected = logits(case.model, case.x)

    def narrow(heads: Sequence[int] | None = None, repair: bool = False, **ranks: int | str) -> Tensor:
        images = case.images(32, seed=1) if repair else None
        return logits(spvit.prune(case.host, case.everywhere(heads, **ranks), repair=images), case.x)

    if not case.host.blocks[0].attention.narrows_values:
        with pytest.raises(spvit.ArchitectureError, match=r"block 0: .* cannot be narrowed"):
            narrow("all")
        return
    assert _error(narrow("all", repair=True, value_rank="all"), expected) <= 1e-9
    for kept in ({"heads": "all", "value_rank": "all"}, {"heads": "all"}, {"value_rank": "all"}):
        assert _error(narrow(**kept), expected) <= 1e-6
    assert_differ(narrow((0, 2)), expected)
    assert_differ(narrow(value_rank=2), expected)
    full = {"heads": "all", "query_key_rank": "all", "value_rank": "all"}
    if not case.host.blocks[0].attention.narrows_queries:
        with pytest.raises(spvit.ArchitectureError, match="block 0: queries and keys"):
            narrow(**full)
        return
    assert _error(narrow(**full, repair=True), expected) <= 1e-9
    assert _error(narrow(**full), expected) <= 1e-6
    assert_differ(narrow(query_key_rank=2), expected)


def test_narrow_attention_of_full_rank_is_the_host(case: Case) -> None:
    _check_full_rank(case)


def test_what_single_heads_add_sums_to_the_whole_layer_but_for_a_constant(case: Case) -> None:
    if not case.expected.narrows_values:
        pytest.skip("its attention stays whole")
    index, outputs = 1, []  # type: int, list[Tensor]
    for heads in (*((head,) for head in range(case.expected.heads(index)[0])), None):
        blocks = list(case.whole.blocks)
        blocks[index] = replace(blocks[index], attention=Attention(heads=heads))
        pruned = spvit.prune(case.host, replace(case.whole, blocks=tuple(blocks)))
        layer = pruned.get_submodule(case.host.blocks[index].attention.path)
        layer.register_forward_hook(lambda *call: outputs.append(tokens_of(call[-1]).clone()))
        with torch.set_grad_enabled(True):  # so that no fused encoder passes the layer by
            pruned(case.x)
    *single, whole = outputs
    left = torch.stack(single).sum(0) - whole
    assert (left - left[:1, :1]).abs().max() <= 1e-9 * whole.abs().max()


def _check_forms(case: Case, kinds: tuple[str, ...]) -> None:
    net = choose(randomise(spvit.make_searchable(case.host), seed=1), kinds).eval()
    expected = logits(net, case.x)
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    assert_differ(logits(case.model, case.x), expected)
    architecture = spvit.decide(net)
    assert architecture.kinds() == kinds
    assert all(0 < kept < width for kept, width in zip(architecture.widths(), case.whole.widths()))
    pruned = spvit.prune(case.host, architecture, weights=net)
    assert_close(logits(pruned, case.x), expected)
    assert_close(logits(spvit.fold(pruned), case.x), expected)
    # Neither the weights nor the architecture is left out.
    assert_differ(logits(spvit.prune(case.host, case.whole, weights=net), case.x), expected)
    assert_differ(logits(spvit.prune(case.host, architecture), case.x), expected)


@pytest.mark.parametrize("kinds", TURNS[:2], ids="-".join)
def test_searchable_pruned_and_folded_agree(case: Case, kinds: tuple[str, ...]) -> None:
    _check_forms(case, kinds)


def test_a_search_step_reaches_every_gate_and_costs_what_is_decided(case: Case) -> None:
    net = choose(randomise(spvit.make_searchable(case.host), seed=1), ("msa",) * BLOCKS).train()
    loss = spvit.BudgetLoss(net, macs="60%")
    assert loss.expected_cost().item() == pytest.approx(spvit.cost(case.host, spvit.decide(net))["macs"], rel=1e-6)
    torch.manual_seed(0)
    gradients = backward(net, case.x)
    loss().backward()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(parameter.grad.any() for parameter in spvit.gate_parameters(net))


def test_a_decision_from_scores_lands_on_the_budget_and_repair_serves_it(case: Case) -> None:
    host = case.single
    x, unseen = (case.images(32, seed, torch.float32) for seed in (1, 9))
    scores = spvit.score(host, x, multiple=4)
    architecture = spvit.decide(host, macs="50%", scores=scores)
    assert 0.9 * 0.5 <= spvit.cost(host, architecture)["macs"] / spvit.cost(host)["macs"] <= 0.5
    expected = logits(host.model, unseen)
    repaired, cut = (spvit.fold(spvit.prune(host, architecture, repair=images)) for images in (x, None))
    assert logits(repaired, unseen).shape == expected.shape
    assert _mean_square(repaired, unseen, expected) < _mean_square(cut, unseen, expected)


def test_repair_brings_outputs_nearer_on_images_it_has_not_seen(case: Case) -> None:
    unseen = case.images(16, seed=9)
    expected = logits(case.model, unseen)
    cut = spvit.prune(case.host, case.mixed)
    assert _mean_square(case.repaired, unseen, expected) < _mean_square(cut, unseen, expected)
    assert_close(logits(spvit.fold(case.repaired), unseen), logits(case.repaired, unseen))


def test_exported_programs_take_any_batch(case: Case) -> None:
    model = spvit.fold(case.repaired)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (case.images(3),), dynamic_shapes=dynamic).module()
    for batch in (2, 5):
        x = case.images(batch, seed=batch)
        assert_close(logits(program, x), logits(model, x))


@pytest.mark.filterwarnings("error:Converting a tensor")
def test_saved_models_load_onto_a_new_model_bit_for_bit(case: Case, tmp_path: Path) -> None:
    for stage, model in {"repaired": case.repaired, "folded": spvit.fold(case.repaired)}.items():
        folder = spvit.save(model, tmp_path / stage)
        loaded = spvit.load(folder, host=case.make())
        assert not loaded.training
        assert torch.equal(logits(loaded, case.x), logits(model, case.x))
        if type(case.model).__module__.startswith(("timm.", "transformers.")):
            assert torch.equal(logits(spvit.load(folder), case.x), logits(model, case.x))
            continue
        with pytest.raises(spvit.SpvitError, match="host=") as caught:
            spvit.load(folder)
        _one_line(caught.value)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("error:std")
def test_models_that_spvit_cannot_serve_are_refused_for_their_reason(name: str) -> None:
    make, reason = REFUSED[name]
    model = randomise(make()).to(torch.float64).eval()
    before = everything_of(model)
    with pytest.raises(spvit.UnsupportedHostError) as caught:
        spvit.recognise(model, torch.randn(4, 3, 32, 32, dtype=torch.float64))
    names = "|".join({type(module).__name__ for module in model.modules()})  # a name alone gives no reason
    message = re.sub(rf"\w+(\.\w+)+|\b({names})\b", "", _one_line(caught.value))
    assert re.search(reason, message, re.IGNORECASE), caught.value
    assert_untouched(model, before)


@pytest.mark.parametrize("name", EITHER)
def test_odd_models_are_refused_or_right(name: str) -> None:
    case = Case(EITHER[name], Expected())
    before = everything_of(case.model)
    try:
        sites = case.host.blocks
    except spvit.UnsupportedHostError as error:
        _one_line(error)
        assert_untouched(case.model, before)
        return
    assert len(sites) == BLOCKS
    _check_keeping_everything(case)
    norm = sites[0].ffn.norm
    if norm is not None and not isinstance(case.model.get_submodule(norm), nn.Conv2d):
        with pytest.raises(spvit.NotSearchableError, match=r"a norm over an FFN's hidden units"):
            spvit.make_searchable(case.host)
    else:
        _check_forms(case, MIXED)
    _check_full_rank(case)
    with _counted_plainly():
        assert spvit.cost(case.host)["macs"] == count_macs(case.model, case.images(1).to("meta"))


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 40, 40), torch.zeros(2, 1, 32, 32), torch.zeros(3, 32, 32), torch.zeros(0, 3, 32, 32), "images"],
    ids=["size", "channels", "no batch", "no images", "text"],
)
def test_images_that_do_not_fit_are_refused(images: object) -> None:
    model = OWN["separate"]().eval()
    before = everything_of(model)
    with pytest.raises(spvit.SpvitError, match="imag") as caught:
        spvit.recognise(model, images)
    _one_line(caught.value)
    assert_untouched(model, before)


def test_text_is_no_image() -> None:
    with pytest.raises(spvit.SpvitError, match=r"imag|int64") as caught:
        spvit.recognise(TextTransformer().eval(), torch.randint(0, 100, (2, 17)))
    _one_line(caught.value)


@pytest.mark.parametrize("name", ["packed_registers", "encoder_pre_norm", "pairs"])
def test_models_in_training_are_left_so_and_dropout_does_not_mislead(name: str) -> None:
    case = Case(OWN[name], EXPECTED[name])
    model = randomise(case.make()).to(torch.float64).train()
    before = everything_of(model)
    try:
        found = spvit.recognise(model, case.x).blocks
    except spvit.SpvitError as refusal:
        found, message = None, _one_line(refusal)
    assert found == case.host.blocks if found else re.search(r"train|eval|dropout", message)
    assert_untouched(model, before)


def test_models_that_were_not_recognised_say_how() -> None:
    for call in (spvit.cost, spvit.make_searchable, spvit.recognise):
        with pytest.raises(spvit.UnsupportedHostError, match=r"recognise\(|images") as caught:
            call(OWN["separate"]().eval())
        _one_line(caught.value)
