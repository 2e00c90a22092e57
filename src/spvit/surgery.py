"""Prunes a host to an architecture, and folds it: what stands there in the end is plain modules, called as before."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from spvit.architecture import Architecture
from spvit.errors import NotSearchableError, UnsupportedHostError
from spvit.hosts.calling import in_mode
from spvit.hosts.family import Family
from spvit.hosts.host import Host
from spvit.hosts.rebuild import keep_arguments
from spvit.hosts.recognise import RECORD, family_of
from spvit.hosts.walk import Finished, Report, where_float64_is
from spvit.repair.repair import repair as repair_in_place
from spvit.replacements.bottleneck import BottleneckConv
from spvit.replacements.install import check_fits, keep_units, replace_attention
from spvit.replacements.prefix_only import answer_prefix
from spvit.search.network import dense_state, gated_layers

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class PrunedRecord:
    """What a pruned network knows of itself."""

    architecture: Architecture
    folded: bool
    family: Family


def pruned_record(model: nn.Module) -> PrunedRecord | None:
    """Return what a pruned network knows of itself, or None for a model that spvit has not pruned."""
    record = getattr(model, RECORD, None)
    return record if isinstance(record, PrunedRecord) else None


def prune(
    host: Model | Host,
    architecture: Architecture,
    *,
    weights: nn.Module | None = None,
    repair: Tensor | Iterable[Any] | None = None,
    inplace: bool = False,
    report: Report | None = None,
    finished: Finished | None = None,
) -> Model:
    """Return the host cut down to an architecture, in plain stock modules with the same forward.

    What is kept keeps its modules, weights and keys. A convolution's kernel is made from its attention layer's weights;
    the FFNs' linear layers lose rows and columns.

    Args:
        host: the dense model (or its `Host`).
        architecture: what to keep.
        weights: a searchable network made from such a host: take all weights, head mixes and batch norms from it.
            None takes the host's weights, with equal head mixes and fresh batch norms, as the method fine-tunes.
        repair: calibration images, better 1,000 than a few hundred, unlabelled, normalised as in training: a tensor
            [images, channels, height, width] or batches of such (a data loader's labels are passed over); images that
            are alike side by side. What pruning breaks is then repaired in closed form, layer by layer. None leaves the
            repair to training.
        inplace: change the host itself instead of a copy. If pruning fails the host stays as it was.
        report: with a repair, called after each block with ("repair", blocks repaired, blocks, {}).
        finished: with a repair, gets each block's weights as they are found, and those of a call that was cut short are
            taken from it; a dictionary will do. The other arguments must be the same.

    Raises:
        ArchitectureError: the architecture does not fit the host.
        NotSearchableError: `weights` is not searchable, or the host is not dense.
        CalibrationError: the calibration images do not fit the host, are too few, or give values that are not finite.
    """
    if getattr(host.model if isinstance(host, Host) else host, RECORD, None) is not None:
        raise NotSearchableError("prune takes the dense host; pass a searchable network as weights=")
    dense = Host.of(host)
    searched = None if weights is None else gated_layers(weights)
    trained = None if weights is None else _trained_state(dense.model, weights)
    pruned = dense if inplace else dense.on(copy.deepcopy(dense.model))
    model = pruned.model
    with ExitStack() as undo:
        if trained is not None:
            undo.callback(model.load_state_dict, copy.deepcopy(model.state_dict()) if inplace else model.state_dict())
            model.load_state_dict(trained)
            with in_mode(True, model):  # layers that keep what they made of former weights, timm's biases, make it anew
                pass
        # What the repair aims at: the model before it loses anything, with the weights that it has by now.
        target = dense
        if repair is not None and (inplace or trained is not None):
            target = dense.on(copy.deepcopy(model))
        states = None if finished is None else [finished]
        cut([pruned], target, [architecture], undo, repair, report, states, searched)
        undo.pop_all()
    return cast(Model, model)


def prune_each(
    host: Host,
    architectures: Sequence[Architecture],
    repair: Tensor | Iterable[Any],
    report: Report | None = None,
    finished: Sequence[Finished] | None = None,
) -> list[nn.Module]:
    """Return a host cut down to each of several architectures as `prune` does it, repaired side by side.

    The host runs once for all. Each model takes the memory of its tokens of all images, and so do what the host
    answers, three times, and one model's next tokens. `finished` holds one of these for each architecture.
    """
    pruned = [host.on(copy.deepcopy(host.model)) for _ in architectures]
    with ExitStack() as undo:
        cut(pruned, host, architectures, undo, repair, report, finished)
        undo.pop_all()
    return [own.model for own in pruned]


def cut(
    pruned: Sequence[Host],
    target: Host,
    architectures: Sequence[Architecture],
    undo: ExitStack,
    repair: Tensor | Iterable[Any] | None = None,
    report: Report | None = None,
    finished: Sequence[Finished] | None = None,
    searched: Sequence[Any] | None = None,
    fitted: bool = False,
) -> None:
    """Cut models of one host down to an architecture each, in place, and repair them towards the target.

    fitted: whether narrow layers get their weights later, as they do from a repair.
    """
    grids = []
    for own, architecture in zip(pruned, architectures):
        check_fits(own, architecture)
        keep_arguments(own.model)
        blocks = architecture.blocks
        replaced = [index for index, kept in enumerate(blocks) if kept.attention.kind != "msa" or kept.tokens != "all"]
        grids.append(own.family.whole_grids(own.model, replaced, undo))
        with where_float64_is(own.model):
            for index, kept in enumerate(blocks):
                found = None if searched is None else searched[index][0].searched(kept.attention.kind)
                hints = {"searched": found, "fitted": fitted or repair is not None, "tokens": kept.tokens}
                replace_attention(own, index, kept.attention, architecture.rules, grids[-1], undo, **hints)
                keep_units(own, index, kept.ffn, undo)
    if repair is not None:
        repair_in_place([own.model for own in pruned], target, architectures, repair, report, finished)
    for own, architecture, grid in zip(pruned, architectures, grids):
        last = len(architecture.blocks) - 1
        if architecture.blocks[last].tokens == "prefix":
            answer_prefix(own, last, grid[last], undo)
        setattr(own.model, RECORD, PrunedRecord(architecture, False, own.family))


def _trained_state(model: nn.Module, net: nn.Module) -> Mapping[str, Tensor]:
    """Return what a searchable network has trained. Raises NotSearchableError when it is of another host."""
    state, own = dense_state(net), model.state_dict()
    for key in (*own, *state):
        if key not in state or key not in own or state[key].shape != own[key].shape:
            found = "nothing" if key not in state else list(state[key].shape)
            expected = "nothing" if key not in own else list(own[key].shape)
            raise NotSearchableError(
                f"the searchable network was made from another host: {key} is {found} there, expected {expected}"
            )
    return state


def fold(model: Model, *, inplace: bool = False) -> Model:
    """Return a pruned model with every batch norm of its convolutions folded in: the form to deploy.

    In evaluation mode the output stays the same. A model that is already folded comes back unchanged.

    Raises:
        UnsupportedHostError: the model was not pruned by spvit.
    """
    record = pruned_record(model)
    if record is None:
        family_of(model)  # says which part of a wrapper to pass
        raise UnsupportedHostError(f"fold takes a model that spvit.prune returned, found a {type(model).__name__}")
    folded = model if inplace else copy.deepcopy(model)
    for module in folded.modules():
        if isinstance(module, BottleneckConv):
            module.fold_batchnorm()
    setattr(folded, RECORD, replace(record, folded=True))
    return folded
