"""What may stand where an attention layer was: made of its weights, run, fitted, folded, priced. One file a kind.

A kind is one object with the protocol below, in a file of its own, and one line of `spvit.architecture.KINDS`.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from torch import nn

from spvit.architecture import KINDS, Attention, Rules
from spvit.cost import AttentionCost
from spvit.hosts.grid import Grid
from spvit.hosts.host import Host
from spvit.hosts.sites import AttentionSite
from spvit.hosts.walk import BlockPair


class Replacement(Protocol):
    """One kind of what may stand where an attention layer was."""

    def make(
        self, layer: nn.Module, site: AttentionSite, kept: Attention, rules: Rules, grid: Grid, **hints: Any
    ) -> nn.Module:
        """Return the module that stands in place of a dense attention layer, made of its weights.

        It maps tokens [B, N, D] to tokens [B, N, D], and takes further arguments as the layer does.

        Args:
            layer: the dense layer, which stays as it is.
            site: where it is.
            kept: what stays of it.
            rules: of the architecture.
            grid: of the patches, kept at that of the images that pass.
            hints: what a kind may use: `searched` (head mix and batch norm of a search), `fitted` (whether `fit`
                follows, so that weights need no care now), `tokens` (of the block, as in its architecture).
        """
        ...

    def fit(self, module: nn.Module, pair: BlockPair, kept: Attention) -> None:
        """Set the module's weights in closed form, in place: from what arrives, and from its targets."""
        ...

    def cost(self, host: Host, site: AttentionSite, metric: str) -> AttentionCost:
        """Return what the kind costs at a site in a metric, `macs` of one image or `params` as deployed."""
        ...


def replacement(kind: str) -> Replacement:
    """Return the replacement of a kind that `KINDS` lists."""
    module, _, name = KINDS[kind].partition(":")
    found: Replacement = getattr(importlib.import_module(module), name)
    return found
