"""Gradients at layers' outputs, against what outputs really do when a layer's output is moved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spvit.errors import CalibrationError
from spvit.hosts.calling import batch_first
from spvit.hosts.host import Host
from spvit.repair.gradients import MOST_GRADIENTS, TOKENS_AT_ONCE, gradients, metric
from spvit.repair.objective import Objective, answer_of
from tiny import HOSTS, images, make_host

STEP = 1e-4


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """Scoring runs without gradients but where it asks for them."""
    with torch.no_grad():
        yield


def paths_at(host: Host) -> dict[str, Any]:
    """Return the attention site of every block that has a layer of gradients, by the layer's name."""
    return {path: block.attention for block in host.blocks for path in (block.attention.path, block.ffn.second)}


def moved(host: Host, objective: Objective, x: Tensor, path: str, by: Tensor | float) -> list[Tensor]:
    """Return the parts of the outputs that count when a layer's output is moved."""

    def move(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + by, *output[1:]) if isinstance(output, tuple) else output + by

    handle = host.model.get_submodule(path).register_forward_hook(move)
    parts = objective.parts(answer_of(host, x))
    handle.remove()
    return parts


def shape_at(host: Host, x: Tensor, path: str) -> torch.Size:
    """Return the shape of a layer's output."""
    found: list[torch.Size] = []
    layer = host.model.get_submodule(path)
    handle = layer.register_forward_hook(
        lambda module, args, output: found.append((output[0] if isinstance(output, tuple) else output).shape)
    )
    host.model(x)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("name", HOSTS)
def test_gradients_are_of_the_outputs_along_random_directions(name: str) -> None:
    host = Host.of(make_host(name))
    objective, x = Objective.of("features", host), images(host.model, 3)
    found = gradients(host, objective, [x])
    assert list(found) == list(paths_at(host))
    count, tokens = len(found[host.blocks[0].ffn.second][0]), host.blocks[0].attention.tokens
    assert count == min(MOST_GRADIENTS[0], MOST_GRADIENTS[1] // (3 * tokens))
    parts = moved(host, objective, x, host.blocks[0].ffn.second, 0.0)
    generator, directions = torch.Generator().manual_seed(0), []
    for some in zip(*(part.split(max(1, TOKENS_AT_ONCE // tokens)) for part in parts)):
        directions.append([[objective.direction(part, generator) for part in some] for _ in range(count)])
    # By direction and part, of all images.
    by_part = [[torch.cat(own) for own in zip(*same)] for same in zip(*directions)]
    for path, site in paths_at(host).items():
        shape = shape_at(host, x, path)
        error = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        ahead, behind = (moved(host, objective, x, path, sign * STEP * error) for sign in (1, -1))
        by_image = batch_first(site, error).reshape(len(x), -1)
        for gradient, own in zip(found[path][0], by_part):
            expected = torch.zeros(len(x), dtype=x.dtype)
            for after, before, direction, part in zip(ahead, behind, own, parts):
                along = (after - before) / (2 * STEP) * direction
                expected += along.flatten(1).sum(1) / math.sqrt(len(parts) * count * objective.scale([part]))
            assert torch.allclose((gradient * by_image).sum(1), expected, rtol=1e-5, atol=1e-7), path


@pytest.mark.parametrize("asked", ["logits", "features"])
def test_the_mean_square_along_gradients_is_the_distance_of_outputs(asked: str) -> None:
    host = Host.of(make_host("class_token"))
    objective, x = Objective.of(asked, host), images(host.model, 2)
    many = x.repeat(2000, 1, 1, 1)
    path = host.blocks[1].ffn.second
    error = STEP * torch.randn(shape_at(host, x, path), generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    [own] = gradients(host, objective, [many])[path]
    found = float((own * error.flatten(1).repeat(2000, 1)).sum(2).square().sum())
    after, before = (moved(host, objective, x, path, by) for by in (error, 0.0))
    if asked == "logits":
        wanted, others = (part[0].log_softmax(1) for part in (before, after))
        expected = float((wanted.exp() * (wanted - others)).sum() / 2)
    else:
        pairs = zip(after, before)
        relative = [float((a - b).square().sum() / (b - b.mean(0)).square().sum()) for a, b in pairs]
        expected = sum(relative) / len(relative)
    assert found == pytest.approx(expected, rel=0.1)


def test_the_metric_gives_errors_their_distance_where_they_do_not_know_the_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(2, size, 5 * 4, generator=generator, dtype=torch.float64) for size in (3, 2)]
    errors = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    root = metric(own, 4)
    expected = 0.0  # the mean over errors of the sum over images and tokens of (g . d)^2, which is tr(G E)
    for error in errors:
        for images_of_batch in own:
            for image in images_of_batch.flatten(0, 1):
                for gradient in image.unflatten(0, (5, 4)):
                    expected += float(gradient @ error) ** 2 / len(errors)
    assert float((errors @ root.T).square().sum(1).mean()) == pytest.approx(expected, rel=1e-6)


def test_layers_that_change_nothing_have_no_gradient_and_any_metric() -> None:
    host = Host.of(make_host("class_token"))
    objective = Objective("function", 1, lambda output: output * 0 + 1)
    found = gradients(host, objective, [images(host.model, 2)])
    assert not any(bool(each.any()) for own in found.values() for each in own)
    root = metric(found[host.blocks[0].ffn.second], host.blocks[0].attention.dim)
    assert torch.equal(root, torch.eye(len(root), dtype=torch.float64))


def test_what_has_no_gradient_is_refused() -> None:
    host = Host.of(make_host("class_token"))
    x = images(host.model, 2)
    with pytest.raises(CalibrationError, match="function top, has no gradient by what layers answer; return a tensor"):
        gradients(host, Objective("function top", 1, lambda output: output.argmax(1)), [x])
    host.model.head.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="outputs, or their gradients, are not finite; check its weights"):
        gradients(host, Objective.of("logits", host), [x])
