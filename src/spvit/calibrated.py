"""The gated attention layer of a search that starts from repaired candidates, each with weights of its own.

In place of convolutions that share the attention's weights stand those that regression fitted to its outputs, and the
attention's dimensions are rotated into the order of their use, so that gates may narrow it. As in the published layer
exactly one candidate carries gradients in a forward pass; others are computed in value only, where gates need them.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens, D width, H heads, E head width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from spvit.architecture import Attention
from spvit.gated_linear import RankGatedLinear
from spvit.gates import INITIAL_LOGIT, GateDraws
from spvit.pruned import BottleneckConv, Grid, NarrowAttention
from spvit.searchable import AttentionAccess, GatedAttention, gradients_if


class CalibratedAttention(GatedAttention):
    """An attention layer that may become narrower, or one of its repaired replacements.

    Attributes: `msa`, `conv3`, `conv1`, `skip`, the candidates; `gate_logits` [3].
    """

    def __init__(
        self,
        candidates: Mapping[str, nn.Module],
        access: AttentionAccess,
        *,
        prefix_tokens: int,
        grid: Grid,
        ranks: Sequence[int],
        draws: GateDraws | None = None,
    ) -> None:
        """Put candidates behind gates.

        Args:
            candidates: by kind, what would stand there alone. Where `msa` is narrow attention of all dimensions it gets
                gates on its ranks, otherwise it stays whole.
            access: the family's.
            prefix_tokens: P.
            grid: of the patches, in the form in which attention gets them.
            ranks: dimensions a head that may stay, ascending, the last one E.
            draws: of the network.
        """
        super().__init__()
        self.access = access
        self.prefix_tokens = prefix_tokens
        self.grid = grid
        self.msa, self.conv3, self.conv1, self.skip = (candidates[kind] for kind in ("msa", "conv3", "conv1", "skip"))
        like = next(self.msa.parameters())
        self.gate_logits = nn.Parameter(like.new_full((3,), INITIAL_LOGIT))
        self.draws = draws if draws is not None else GateDraws()
        self.draws.join(self, read_bits=True)
        if isinstance(self.msa, NarrowAttention) and len(ranks) > 1:
            self.msa.qkv = RankGatedLinear(self.msa.qkv, self.msa.heads, ranks, self.draws)
        self.train(self.msa.training)

    def rank_gates(self) -> RankGatedLinear | None:
        """Return the layer with gates on the ranks of attention, if it has any."""
        projection = getattr(self.msa, "qkv", None)
        return projection if isinstance(projection, RankGatedLinear) else None

    def kept(self) -> Attention:
        """Return what the gates choose in evaluation; narrow attention says its rank also where that is whole."""
        kind = self.decided()
        if kind != "msa" or not isinstance(self.msa, NarrowAttention):
            return Attention(kind)
        gates = self.rank_gates()
        rank = self.msa.value_rank if gates is None else gates.decided()
        return Attention.narrow(rank)

    def replacement(self, kept: Attention) -> nn.Module:
        """Return a copy of a candidate as it stands in the pruned network, attention at its rank."""
        # The draws know every gated layer of the network, which are not to be copied too.
        module = copy.deepcopy(getattr(self, kept.kind), {id(self.draws): GateDraws()})
        if isinstance(module, NarrowAttention):
            if isinstance(module.qkv, RankGatedLinear):
                module.qkv = module.qkv.linear
            assert kept.value_rank is not None
            module = module.first(kept.value_rank)
        return module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x: [B, N, D], normalised; further arguments go to attention. Returns [B, N, D] in the host's form."""
        if not self.training:
            return self._answer(self._run(self.decided(), x, args, kwargs))
        drawn = self._draw()
        outputs = {}
        for name in sorted(drawn.needed() | ({"skip"} if drawn.needs_skip() else set())):
            with gradients_if(name == drawn.kind):
                outputs[name] = self._run(name, x, args, kwargs)
        others = [part for name, part in self.named_children() if name != drawn.kind]
        silent: list[Tensor] = [parameter for part in others for parameter in part.parameters()]
        if drawn.kind == "skip":
            silent.append(x)
        return self._answer(drawn.answer(outputs, silent, outputs.get("skip")))

    def _run(self, kind: str, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Return what a candidate makes of x: [B, N, D]."""
        module = getattr(self, kind)
        on_grid = isinstance(module, BottleneckConv) and self.prefix_tokens == 0
        if isinstance(module, BottleneckConv):
            module.grid.height, module.grid.width = self.grid.height, self.grid.width
            args, kwargs = (), {}
        out = module(self.grid.gather(x, 0) if on_grid else x, *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return self.grid.scatter(out) if on_grid else out
