"""How much a network's outputs move with each layer's output: from one backward pass, whatever the layer becomes.

Let a layer's output change by d, let J be the derivative of the outputs that count by it, and F the curvature of their
distance (`Objective.direction`). To second order the distance is d^T J^T F J d. With u random of second moment F and
g = J^T u, the gradient of u's product with the outputs, it is the mean of (g . d)^2 over u. Every image has a u of its
own, or several where there are few images, since images are averaged too.

Shapes: B images, N tokens, D width, U directions an image.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from spvit.errors import CalibrationError
from spvit.hosts.calling import answers_changed, batch_first
from spvit.hosts.host import Host
from spvit.moments import cholesky
from spvit.repair.interpolation import FLOOR
from spvit.repair.objective import Objective, answer_of

TOKENS_AT_ONCE = 1024
"""Tokens of the first block, or one image, whose forward pass is kept for the backward pass."""
MOST_GRADIENTS = (8, 20_000)
"""Directions of an image at most, and tokens of the first block of all images in all directions; one direction at
least. Gradients stay in memory for every layer."""
DAMPING = 1e-7
"""Of the gradients' second moment, which may be singular."""


def gradients(host: Host, objective: Objective, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """Return random gradients of the outputs by each layer's output, [U, B, N D], by path and batch of images.

    Layers are attention and the second linear layer of every FFN. The sum of (g . d)^2 is the distance, as the
    objective counts it for all of these images.

    Raises:
        CalibrationError: the objective has no gradient, or it is not finite.
    """
    dense = [objective.parts(answer_of(host, batch)) for batch in batches]
    scales = [max(objective.scale(list(parts)), FLOOR) for parts in zip(*dense)]
    first, generator = host.blocks[0].attention, torch.Generator().manual_seed(0)
    at_once = max(1, TOKENS_AT_ONCE // first.tokens)
    most, limit = MOST_GRADIENTS
    count = max(1, min(most, limit // (first.tokens * sum(map(len, batches)))))
    scales = [len(scales) * count * scale for scale in scales]
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        passes = [_backward(host, objective, scales, some, count, generator) for some in batch.split(at_once)]
        for path in passes[0]:
            found.setdefault(path, []).append(torch.cat([each[path] for each in passes], dim=1))
    if not all(bool(each.isfinite().all()) for own in found.values() for each in own):
        raise CalibrationError("the model's outputs, or their gradients, are not finite; check its weights")
    return found


def _backward(
    host: Host, objective: Objective, scales: list[float], images: Tensor, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the gradients of one forward pass along several directions, [U, B, N D]."""
    sites = {path: block.attention for block in host.blocks for path in (block.attention.path, block.ffn.second)}
    answers: dict[str, Tensor] = {}

    def keep(path: str, answer: Tensor) -> Tensor:
        answers[path] = answer
        return answer.clone()  # some blocks add to it in place

    keeping = {host.model.get_submodule(path): functools.partial(keep, path) for path in sites}
    with answers_changed(keeping), torch.enable_grad():
        parts = objective.parts(answer_of(host, images.clone().requires_grad_()))
        if not any(part.requires_grad for part in parts):
            raise CalibrationError(
                f"the objective, {objective.name}, has no gradient by what layers answer; return a tensor that was "
                "computed from the model's output with gradients"
            )
        own: dict[str, list[Tensor]] = {path: [] for path in sites}
        for _ in range(count):
            along = torch.zeros((), device=images.device)
            for part, scale in zip(parts, scales):
                along = along + (part * objective.direction(part.detach(), generator)).sum() / math.sqrt(scale)
            layers = [answers[path] for path in sites]
            for path, each in zip(
                sites,
                torch.autograd.grad(along, layers, retain_graph=True, allow_unused=True, materialize_grads=True),
            ):
                own[path].append(batch_first(sites[path], each).reshape(len(images), -1))
    return {path: torch.stack(each) for path, each in own.items()}


def metric(own: list[Tensor], width: int) -> Tensor:
    """Return R [D, D] for which the mean of |R d|^2 over tokens is the distance, if errors d do not know the gradients.

    R^T R is the second moment of a layer's gradients, summed over tokens; own: [U, B, N D] for every batch.
    """
    products = [tokens.T @ tokens for tokens in (each.reshape(-1, width).double() for each in own)]
    return cholesky(torch.stack(products).sum(0), DAMPING).T
