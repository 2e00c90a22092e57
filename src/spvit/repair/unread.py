"""Whether anything reads the patch tokens behind the last block: found by changing them there.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens, D width.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from spvit.architecture import FFN, Attention, Block
from spvit.hosts.calling import answers_changed, batch_first
from spvit.hosts.host import Host
from spvit.hosts.walk import evaluating
from spvit.repair.objective import Asked, Objective, answer_of
from spvit.replacements.install import has_prefix, installed
from spvit.replacements.prefix_only import answer_prefix

CLOSE = 1e-5
"""Largest difference of outputs that is rounding, relative to the largest magnitude, in single precision or more."""


def patches_unread(host: Host, objective: Asked) -> bool:
    """Return whether the last block may run for its prefix tokens alone, by an objective of a host's outputs.

    So it does in a copy, where patch tokens behind it are random numbers besides: all outputs that count must stay.
    Objectives that count tokens, or that are functions, always need all.
    """
    if objective not in ("auto", "logits", "pooled") or not has_prefix(host.blocks[-1].attention):
        return False
    counted = Objective.of(objective, host)
    if counted.name == "features":
        return False
    if counted.name not in host.unread:
        host.unread[counted.name] = _found_unread(host, counted)
    return host.unread[counted.name]


def _found_unread(host: Host, counted: Objective) -> bool:
    parameter = next(host.model.parameters())
    if parameter.is_meta:  # which cannot be told without values
        return False
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *host.input_size, generator=generator).to(parameter)
    twin = host.on(copy.deepcopy(host.model))
    try:
        with evaluating(host.model, twin.model), _running_for_prefix(twin):
            found, wanted = (counted.parts(answer_of(model, images)) for model in (twin, host))
    except Exception:  # whatever a block wants of tokens or layers that is not there
        return False
    tolerance = max(CLOSE, 4 * torch.finfo(parameter.dtype).eps)
    return all(
        bool((own - dense).abs().max() <= tolerance * dense.abs().max()) and not torch.equal(dense[0], dense[1])
        for own, dense in zip(found, wanted, strict=True)
    )


def _running_for_prefix(host: Host) -> ExitStack:
    """Have the last block run for its prefix tokens alone in the context, with noise for patch tokens behind it."""
    last, stack = len(host.blocks) - 1, ExitStack()
    sites = host.blocks[last]
    stack.enter_context(installed(host, last, Block(Attention(), FFN.whole(sites.ffn.units), "prefix")))
    answer_prefix(host, last, host.family.whole_grids(host.model, [last], stack)[last], stack)
    block = host.model.get_submodule(sites.path)

    def disturb(answer: Tensor) -> Tensor:
        tokens = batch_first(sites.attention, answer).clone()
        patches = tokens[:, sites.attention.prefix_tokens :]
        patches.copy_(10 * torch.randn(patches.shape, generator=torch.Generator().manual_seed(1)))
        return batch_first(sites.attention, tokens)

    end = block[-1] if isinstance(block, nn.ModuleList) else block
    stack.enter_context(answers_changed({end: disturb}))
    return stack
