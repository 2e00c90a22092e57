"""On an accelerator everything is what it is on the CPU; without one nothing of this file runs.

`python benchmarks/gpu.py` runs it on a machine that has one. Double precision where the accelerator knows it, without
TF32: so that what differs is the code, not the rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block

pytest.importorskip("transformers")
from library_models import LIBRARY, LIBRARY_EXPECTED
from own_models import EXPECTED, OWN
from tiny import HOSTS, MIXED, assert_close, backward, choose, input_size, logits, logits_of, randomise

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator is at hand"),
]
MODELS: dict[str, Callable[[], nn.Module]] = {**HOSTS, **OWN, **LIBRARY}
ANSWERS = {**EXPECTED, **LIBRARY_EXPECTED}
SWIN = [name for name in HOSTS if name.startswith("swin")]


class Pair:
    """A model on the CPU and its copy on the accelerator, with what spvit knows of each."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.dtype = torch.float32 if self.device.type == "mps" else dtype
        model = randomise(MODELS[name]()).to(self.dtype).eval()
        self.size = ANSWERS[name].image if name in ANSWERS else input_size(model)
        self.host = spvit.recognise(model, self.images(3))
        self.there = spvit.recognise(copy.deepcopy(model).to(self.device), self.images(3).to(self.device))

    def images(self, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.size, generator=generator, dtype=torch.float64).to(self.dtype)

    @property
    def mixed(self) -> Architecture:
        """Every kind of attention, and some units of every FFN."""
        narrow = self.host.blocks[0].attention.narrows_values
        kept = tuple(Attention(kind, value_rank=4 if kind == "msa" and narrow else None) for kind in MIXED)
        sizes = [block.ffn.units for block in self.host.blocks]
        ffns = [FFN(units, tuple(range(0, units, 2))) for units in sizes]
        return Architecture(tuple(map(Block, kept, ffns)), prefix_rule="linear", skip_rule="mean")


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


def _there(model: nn.Module, device: torch.device) -> None:
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device.type}


@pytest.mark.parametrize("name", MODELS)
def test_sites_repairs_and_saved_models_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    pair = Pair(name, torch.float64)
    assert pair.there.blocks == pair.host.blocks
    x, unseen = pair.images(32, seed=1), pair.images(4, seed=2)
    expected = spvit.prune(pair.host, pair.mixed, repair=x)
    for images in (x, x.to(pair.device)):
        found = spvit.prune(pair.there, pair.mixed, repair=images)
        _there(found, pair.device)
        there = logits(found, unseen.to(pair.device)).cpu()
        # Solvers differ: which of nearly equal directions values keep is decided by rounding.
        assert (there - logits(expected, unseen)).abs().max() <= 1e-2 * there.abs().max()
    folded = spvit.fold(found)
    _there(folded, pair.device)
    loaded = spvit.load(spvit.save(folded, tmp_path / "model"), host=MODELS[name]().to(pair.dtype))
    assert_close(logits(loaded.cpu(), unseen), logits(found.cpu(), unseen))


@pytest.mark.parametrize("name", MODELS)
def test_scores_decide_as_on_the_cpu(name: str) -> None:
    pair = Pair(name, torch.float64)
    x = pair.images(24, seed=1)
    scores, there = (spvit.score(host, x, multiple=4) for host in (pair.host, pair.there))
    for budget in ("75%", "50%"):
        decided = spvit.decide(pair.there, macs=budget, scores=there)
        assert decided == spvit.decide(pair.host, macs=budget, scores=scores)


@pytest.mark.parametrize("name", MODELS)
def test_a_search_step_has_the_gradients_of_the_cpu(name: str) -> None:
    pair = Pair(name, torch.float64)
    if any(block.ffn.norm for block in pair.host.blocks):
        return
    net = choose(randomise(spvit.make_searchable(pair.host), seed=1), MIXED).eval()
    there = copy.deepcopy(net).to(pair.device)
    x = pair.images(3)
    expected, found = backward(net, x), backward(there, x.to(pair.device))
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for gradient_name, gradient in expected.items():
        assert_close(found[gradient_name].cpu(), gradient, scale, gradient_name)
    assert spvit.decide(there) == spvit.decide(net)


@pytest.mark.parametrize("name", MODELS)
def test_all_forms_run_and_learn_under_bf16_autocast(name: str) -> None:
    pair = Pair(name, torch.float32)
    x = pair.images(32, seed=1).to(pair.device)
    forms = [spvit.prune(pair.there, pair.mixed, repair=x)]
    if not any(block.ffn.norm for block in pair.host.blocks):
        forms.append(choose(randomise(spvit.make_searchable(pair.there), seed=1), MIXED))
    for net in forms:
        exact = logits(net.eval(), x[:4])
        with torch.autocast(pair.device.type, torch.bfloat16):
            out = logits_of(net.train()(x[:4]))
            loss = out.float().square().mean()
            if net is not forms[0]:
                loss = loss + spvit.BudgetLoss(net, macs="50%")()
        loss.backward()
        gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
        with torch.autocast(pair.device.type, torch.bfloat16):
            rough = logits(net.eval(), x[:4]).float()
        assert (rough - exact).square().mean() <= 0.04 * exact.square().mean()


@pytest.mark.parametrize("name", ["class_token", *SWIN])
def test_compiled_models_answer_alike(name: str) -> None:
    pair = Pair(name, torch.float32)
    x = pair.images(32, seed=1).to(pair.device)
    folded = spvit.fold(spvit.prune(pair.there, pair.mixed, repair=x)).eval()
    torch._dynamo.reset()
    assert_close(logits(torch.compile(folded), x[:4]), logits(folded, x[:4]))
