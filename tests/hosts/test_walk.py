"""Images on their way through a network, block by block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spvit.errors import CalibrationError
from spvit.hosts.host import Host
from spvit.hosts.walk import BlockPair, advance, calibration_batches, evaluating, first_inputs, reached, through
from tiny import HOSTS, images, make_host, paths_of


@pytest.mark.parametrize("name", HOSTS)
def test_inputs_of_blocks_are_those_of_a_whole_forward_pass(name: str) -> None:
    model = make_host(name)
    host, parts = Host.of(model), images(model, 3).split(2)  # some processors round a batch of three otherwise
    seen: list[Tensor] = []
    for paths in paths_of(model):
        model.get_submodule(paths.block).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    last = model.get_submodule(paths_of(model)[-1].block)
    outputs: list[Tensor] = []
    handle = last.register_forward_hook(
        lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for part in parts:
            model(part)
        expected = [(seen[index], seen[len(host.blocks) + index]) for index in range(len(host.blocks))]
        handle.remove()
        inputs = first_inputs(host, parts)
        for index, wanted in enumerate(expected):
            assert all(torch.equal(own, other) for own, other in zip(inputs, wanted, strict=True))
            if index + 1 < len(expected):
                advance(host, index, inputs)
        ends = [through(host, len(expected) - 1, own) for own in inputs]
        assert all(torch.equal(own, other) for own, other in zip(ends, outputs, strict=True))


def test_flags_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    with pytest.raises(CalibrationError), evaluating(model):
        reached(model, torch.zeros(1, 2), nn.ReLU(), output=False)
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_layers_that_the_forward_pass_leaves_out_are_named() -> None:
    with pytest.raises(CalibrationError, match="the model's ReLU was not reached; its forward pass leaves it out"):
        reached(nn.Linear(2, 2), torch.zeros(1, 2), nn.ReLU(), output=False)


def test_reached_gives_inputs_by_position_or_name_and_stops_there() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.inner(input=x + 1)
            raise AssertionError("nothing after it runs")

    model = Calls()
    assert torch.equal(reached(model, torch.zeros(1, 2), model.inner, output=False), torch.ones(1, 2))
    assert torch.equal(reached(model, torch.zeros(1, 2), model.inner, output=True), model.inner(torch.ones(1, 2)))
    assert not model.inner._forward_hooks
    assert not model.inner._forward_pre_hooks


def test_a_pair_is_thinned_to_images_from_all_over() -> None:
    host = Host.of(make_host("class_token"))
    path = host.blocks[0].attention.path
    with torch.no_grad():
        inputs = first_inputs(host, images(host.model, 24).split(10))
        pair = BlockPair(host.model, host, 0, inputs, inputs).knowing(path)
        thin = pair.thinned(8 * 17)  # 17 tokens an image
        assert [len(x) for x in thin.dense_inputs] == [4, 4, 2]
        assert all(torch.equal(a, b[::3]) for a, b in zip(thin.dense_inputs, inputs, strict=True))
        outputs = [list(some.wanted(path)) for some in (thin, pair)]
        assert all(torch.equal(a, b[::3]) for a, b in zip(*outputs, strict=True))
        assert [len(x) for x in pair.thinned(10**6).dense_inputs] == [10, 10, 4]


def test_calibration_images_that_are_none_are_named() -> None:
    host = Host.of(make_host("class_token"))
    with pytest.raises(CalibrationError, match="calibration images are NoneType, expected a tensor"):
        next(calibration_batches(host, None))  # type: ignore[arg-type]
