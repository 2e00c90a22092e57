"""Hidden states in the loss: which they are, how their error counts, and that distillation brings them nearer."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spvit.errors import DataError
from spvit.hosts.host import Host
from spvit.hosts.walk import advance, first_inputs
from spvit.train.figures import Answering, Reference, reference_of
from spvit.train.hidden import LEAST, HiddenStates, hidden_error, scales_of
from spvit.train.loop import Loop, Phase, Run, run_phase
from spvit.train.run_folder import RunFolder
from spvit.train.settings import LoopConfig, PhaseConfig
from spvit.train.step_loss import HIDDEN_SHARE
from tiny import randomise
from training import digits, micro_host, short
from walked_hosts import WALKED_HOSTS, host_and_images


def naive_error(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for own, dense in zip(found, wanted):
        own, dense = own.reshape(-1, own.shape[-1]), dense.reshape(-1, dense.shape[-1])
        variances = [(dense[:, index] - dense[:, index].mean()).square().mean() for index in range(dense.shape[1])]
        least = LEAST * torch.stack(variances).mean()
        for index, variance in enumerate(variances):
            error = (own[:, index] - dense[:, index]).square().mean() / max(variance, least)
            total = total + error / len(variances) / len(found)
    return total


def test_the_error_is_relative_to_the_variance_of_each_dimension() -> None:
    torch.manual_seed(0)
    scales = torch.tensor([1.0, 100.0, 1e-4, 0.0, 2.0])
    wanted = [torch.randn(3, 4, 5) * scales + 7, torch.randn(2, 2, 3, 5) * scales]
    found = [(own + 0.1 * torch.randn_like(own)).requires_grad_() for own in wanted]
    error, naive = hidden_error(found, wanted, list(map(scales_of, wanted))), naive_error(found, wanted)
    torch.testing.assert_close(error, naive, rtol=1e-4, atol=0)
    gradients = [torch.autograd.grad(value, found, retain_graph=True) for value in (error, naive)]
    for own, other in zip(*gradients):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-8)
    assert hidden_error(wanted, wanted, list(map(scales_of, wanted))) == 0
    assert hidden_error([torch.zeros(2, 3)], [torch.zeros(2, 3)], [scales_of(torch.zeros(2, 3))]) == 0


@pytest.mark.parametrize("name", WALKED_HOSTS)
def test_they_are_what_arrives_at_all_blocks_but_the_first(name: str) -> None:
    model, dense, x = host_and_images(name)
    other = randomise(copy.deepcopy(model), seed=1)
    states = HiddenStates(other, dense, x)
    with torch.no_grad():
        other(x)
        with states.keeping():
            other(x)
            dense.model(x)
            assert states.kept is not None
            kept = states.kept
        for host, found in zip((dense.on(other), dense), kept, strict=True):
            inputs = first_inputs(host, [x])
            assert len(found) == len(host.blocks) - 1
            for index, own in enumerate(found):
                advance(host, index, inputs)
                torch.testing.assert_close(own, inputs[0])
    states.close()
    for own in (model, other):
        assert not any(module._forward_pre_hooks for module in own.modules())


def run_of(folder: Path, reference: Reference | None = None) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(digits(batch_size=128), RunFolder(folder), LoopConfig(), reference=reference)


def error_of(model: nn.Module, dense: Host, x: Tensor) -> float:
    validation = digits().validation
    states = HiddenStates(model, dense, torch.stack([validation[index][0] for index in range(32)]))
    with states.keeping(), torch.no_grad():
        model(x)
        dense.model(x)
        error = float(states.error())
    states.close()
    return error


@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_their_error_is_a_share_of_the_loss_without_labels(tmp_path: Path, share: float | None) -> None:
    dense, x = micro_host(0, num_classes=0), torch.randn(64, 1, 8, 8)
    reference = reference_of(dense, replace(digits(), classes=()), LoopConfig())
    model, own = micro_host(1, num_classes=0), micro_host(1, num_classes=0)
    loop = Loop(Phase("finetune", model, short(1, distillation_hidden=share)), run_of(tmp_path, reference))
    losses = loop.step([(x, torch.zeros(64))], 0)
    hidden = error_of(own, reference.host, x)
    outputs = float(reference.loss(Answering(own, reference)(x), reference.parts(x), PhaseConfig()).detach())
    share = HIDDEN_SHARE if share is None else share
    assert float(losses["loss"]) == pytest.approx((1 - share) * outputs + share * hidden, rel=1e-4)
    if share:
        assert float(losses["hidden_loss"]) == pytest.approx(hidden, rel=1e-4)
    else:
        assert "hidden_loss" not in losses


def test_a_host_of_one_block_has_none(tmp_path: Path) -> None:
    dense = micro_host(0, num_classes=0, depth=1)
    reference = reference_of(dense, replace(digits(), classes=()), LoopConfig())
    loop = Loop(Phase("finetune", micro_host(1, num_classes=0, depth=1), short(1)), run_of(tmp_path, reference))
    losses = loop.step([(torch.randn(8, 1, 8, 8), torch.zeros(8))], 0)
    assert losses["loss"] == losses["agreement_loss"]


def test_training_brings_them_nearer_and_leaves_models_as_they_were(tmp_path: Path) -> None:
    dense, x = micro_host(0, num_classes=0), torch.stack([digits().validation[index][0] for index in range(64)])
    reference = reference_of(dense, replace(digits(), classes=()), LoopConfig())
    errors, other = [], micro_host(1, num_classes=0).state_dict()
    near = {name: torch.lerp(value, other[name], 0.3) for name, value in dense.state_dict().items()}
    for share in (0.75, 0.0):
        model = micro_host(1, num_classes=0)
        model.load_state_dict(near)
        phase = Phase("finetune", model, short(2, distillation_hidden=share))
        run_phase(phase, run_of(tmp_path / f"{share}", reference))
        assert not any(module._forward_pre_hooks for module in (*model.modules(), *dense.modules()))
        errors.append(error_of(model, reference.host, x))
    assert errors[0] < 0.95 * errors[1]


def test_with_labels_they_count_where_that_is_asked_for(tmp_path: Path) -> None:
    dense = micro_host(0)
    for hidden, outputs in ((None, 0.0), (0.5, 0.0), (0.5, 0.5)):
        folder = tmp_path / f"{hidden} {outputs}"
        config = short(1, distillation_hidden=hidden, distillation=outputs)
        run_phase(Phase("finetune", micro_host(1), config, teacher=dense), run_of(folder))
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert all(("hidden_loss" in line) == (hidden is not None) for line in steps if line["event"] == "step")


def test_what_nobody_teaches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="finetune.distillation_hidden is 1.0, but there is no teacher"):
        Loop(Phase("finetune", micro_host(), short(1, distillation_hidden=1.0)), run_of(tmp_path))
    with pytest.raises(
        DataError, match=r"distillation_hidden is 0.9, which .* but the teacher is resnet; leave out one"
    ):
        PhaseConfig(distillation=0.5, distillation_hidden=0.9, teacher="resnet")
    with pytest.raises(DataError, match="distillation_hidden is -1"):
        PhaseConfig(distillation_hidden=-1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_finite_in_both_precisions(tmp_path: Path, precision: str) -> None:
    dense: nn.Module = micro_host(0, num_classes=0)
    reference = reference_of(dense, replace(digits(), classes=()), LoopConfig(precision=precision))
    run = replace(run_of(tmp_path, reference), config=LoopConfig(precision=precision))
    loop = Loop(Phase("finetune", micro_host(1, num_classes=0), short(1)), run)
    losses = loop.step([(torch.randn(8, 1, 8, 8), torch.zeros(8))], 0)
    assert all(value.isfinite() for value in losses.values())
