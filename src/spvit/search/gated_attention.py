"""The gated attention layer as it stands while searching.

The original layer lives on inside and computes its own branch. Exactly one candidate carries gradients to weights in a
forward pass; the others are needed in value only, for the gradient of the gates, so they are computed without one.

Shapes: B batch, N tokens = P prefix tokens + G grid tokens, D width, H heads, E head width, K = 9 positions.
Where attention works in windows, [B, N, D] stands for [B x windows, tokens of one, D].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvit.hosts.calling import batch_first, tokens_in
from spvit.hosts.grid import Grid, as_tokens
from spvit.hosts.sites import AttentionSite
from spvit.hosts.walk import tokens_of
from spvit.hosts.weights import AttentionWeights, read_weights
from spvit.replacements import kernels
from spvit.replacements.bottleneck import Searched
from spvit.replacements.kernels import CENTRE, POSITIONS
from spvit.search.gates import INITIAL_LOGIT, GateDraws, is_open, nest, opened, straight_through

NESTED = ("skip", "conv1", "conv3", "msa")
"""What a layer becomes by how many of its nested gates are open (paper section 3.3)."""
CANDIDATES = NESTED[:0:-1]


def candidate_mixture(gates: Tensor) -> Tensor:
    """Return the weights of (msa, conv3, conv1) in the layer's output, [3], from its sampled gates, [3].

    A = c3 msa + c2 (1 - c3) conv3 + c1 (1 - c2)(1 - c3) conv1 (paper section 3.3).
    """
    c1, c2, c3 = nest(gates).unbind(-1)
    return torch.stack([c3, c2 * (1 - c3), c1 * (1 - c2) * (1 - c3)])


@torch.inference_mode(False)  # whoever imports this may be within no_grad
@torch.enable_grad()
def gate_sensitivity(bits: tuple[bool, ...]) -> list[list[float]]:
    """Return d(mixture) / d(gates) at sampled gates: one row a gate, one column a candidate (msa, conv3, conv1).

    For example all three open: attention is chosen, c1 and c2 are detached, and c3 = b1 b2 b3 gives every gate the row
    (1, -1, 0): closing any of them would put conv3 in attention's place. Columns that are zero throughout are
    candidates whose values are not needed at all.
    """
    gates = torch.tensor([float(bit) for bit in bits], device="cpu", requires_grad=True)
    mixture = candidate_mixture(gates)
    rows = [torch.autograd.grad(part, gates, retain_graph=True, allow_unused=True)[0] for part in mixture]
    return torch.stack([torch.zeros_like(gates) if row is None else row for row in rows], dim=1).tolist()


# Once, not in a forward pass, where a checkpoint of activations would save what is computed here.
SENSITIVITY = {bits: gate_sensitivity(bits) for bits in itertools.product((False, True), repeat=3)}


class _Choose(torch.autograd.Function):
    """Passes the chosen output on; gives the gates the inner products of its gradient with what they would change.

    Inputs: the chosen output [B, N, D]; gates [3]; for each gate the index of its difference (-1: none); how many
    differences follow; the differences [B, N, D]; then tensors that receive a gradient of zero (or none).
    """

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, gates: Tensor, rows: tuple[int, ...], count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        ctx.rows, ctx.count = rows, count
        ctx.gates_like = gates.detach()
        ctx.silent_like = [
            (tensor.shape, {"dtype": tensor.dtype, "device": tensor.device}) for tensor in tensors[count:]
        ]
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        grad_gates = None
        if ctx.needs_input_grad[1]:
            grad_gates = torch.zeros_like(ctx.gates_like)
            products = [_inner(grad, difference).to(grad_gates.dtype) for difference in ctx.saved_tensors]
            for gate, row in enumerate(ctx.rows):
                if row >= 0:
                    grad_gates[gate] = products[row]
        silent = [
            torch.zeros(shape, **like) if needed else None
            for (shape, like), needed in zip(ctx.silent_like, ctx.needs_input_grad[4 + ctx.count :])
        ]
        grad_chosen = grad if ctx.needs_input_grad[0] else None
        return (grad_chosen, grad_gates, None, None, *[None] * ctx.count, *silent)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype != b.dtype or a.dtype in (torch.bfloat16, torch.float16):
        a, b = a.float(), b.float()
    return torch.dot(a.reshape(-1), b.reshape(-1))


@dataclass(frozen=True)
class Drawn:
    """What one layer drew for a forward pass."""

    gates: Tensor
    """Sampled, [3]."""
    kind: str
    """What they choose."""
    sensitivity: Sequence[Sequence[float]]
    """How the mixture follows the gates, as `gate_sensitivity` says; empty where they do not learn."""

    def needed(self) -> set[str]:
        """Return the kind that was drawn, and the candidates whose values the gates' gradients need."""
        columns = zip(CANDIDATES, zip(*self.sensitivity))
        return {self.kind} | {name for name, column in columns if any(column)}

    def answer(self, outputs: dict[str, Tensor], silent: Sequence[Tensor]) -> Tensor:
        """Return the chosen one of outputs [B, N, D]; it gives the gates their gradients, and silent tensors zero."""
        differences, rows = _differences(self.sensitivity, outputs)
        return _Choose.apply(outputs[self.kind], self.gates, rows, len(differences), *differences, *silent)


class GatedAttention(nn.Module):
    """An attention layer that may become a 3 x 3 or 1 x 1 convolution of its own weights, or nothing.

    Three nested gates choose. It is called as the original layer is, and answers in the same form. Attributes:
    `attention`, the original layer; `gate_logits` [3]; `head_logits` M [H, 9]; `bn1`, `bn3`; `draws`.
    """

    def __init__(
        self, attention: nn.Module, site: AttentionSite, grid: Grid, temperature: float, draws: GateDraws | None = None
    ) -> None:
        """Wrap the layer of a site; the grid is as its attention gets it. Without draws the layer draws for itself."""
        super().__init__()
        value_weight = read_weights(attention, site).value_weight
        heads, width = value_weight.shape[:2]
        like: dict[str, Any] = {"device": value_weight.device, "dtype": value_weight.dtype}
        self.attention = attention
        self.site = site
        self.grid = grid
        self.temperature = temperature
        self.gate_logits = nn.Parameter(torch.full((3,), INITIAL_LOGIT, **like))
        self.head_logits = nn.Parameter(torch.ones(heads, POSITIONS, **like))
        self.bn1 = nn.BatchNorm2d(width, **like)
        self.bn3 = nn.BatchNorm2d(width, **like)
        self.draws = draws if draws is not None else GateDraws()
        self.draws.join(self, read_bits=True)
        self.train(attention.training)

    def decided(self) -> str:
        """Return the kind that the gates choose in evaluation: `msa`, `conv3`, `conv1` or `skip`."""
        return NESTED[opened(is_open(self.gate_logits).tolist())]

    def head_mix(self) -> Tensor:
        """Return S [H, K]."""
        return kernels.head_mix(self.head_logits, self.temperature)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the original layer takes, and returns its output in the same form."""
        if self.training:
            return batch_first(self.site, self._search(args, kwargs))
        kind = self.decided()
        if kind == "msa":
            return self.attention(*args, **kwargs)
        x = tokens_in(self.site, self.attention, args, kwargs)
        return batch_first(self.site, self._convolve(x, kind) if kind != "skip" else torch.zeros_like(x))

    def searched(self, kind: str) -> Searched | None:
        """Return what the search has found for a kind: head mix and batch norm of a convolution."""
        if kind not in ("conv3", "conv1"):
            return None
        return Searched(self.head_mix(), self.bn3 if kind == "conv3" else self.bn1)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Change the windows of the original layer, as timm's Swin asks for; the grid follows the block."""
        layer: Any = self.attention
        layer.set_window_size(window_size)

    def _draw(self) -> Drawn:
        """Return what is drawn for this forward pass."""
        gates = straight_through(self.gate_logits, self.draws.noise(self))
        bits = self.draws.sampled_bits(self)
        gates_learn = torch.is_grad_enabled() and gates.requires_grad
        return Drawn(gates, NESTED[opened(bits)], SENSITIVITY[bits] if gates_learn else [])

    def _convolve(self, x: Tensor, kind: str) -> Tensor:
        """Return one convolution candidate by its kernels, as the pruned network computes it: [B, N, D]."""
        weights = read_weights(self.attention, self.site)
        tokens = self.grid.gather(x, self.site.prefix_tokens)  # [B, G, D]
        if kind == "conv3":
            conv3 = kernels.conv3_weights(self.head_mix(), weights)
            hidden = F.conv2d(self.grid.as_map(tokens), conv3.in_weight, conv3.in_bias, padding=1)
            return self._finish(x, self.bn3(hidden), conv3.out_weight, weights)
        conv1 = kernels.conv1_weights(self.head_mix(), weights)
        hidden = self.grid.as_map(F.linear(tokens, conv1.in_weight, conv1.in_bias))
        return self._finish(x, self.bn1(hidden), conv1.out_weight, weights)

    def _finish(self, x: Tensor, normalised: Tensor, out_weight: Tensor, weights: AttentionWeights) -> Tensor:
        """Return a bottleneck's output, shaped as x, from its batch-normalised activations [B, E, height, width]."""
        hidden = self.grid.scatter(as_tokens(torch.relu(normalised)))
        out = F.linear(hidden, out_weight, weights.out_bias)
        if self.site.prefix_tokens == 0:
            return out
        return torch.cat([x[:, : self.site.prefix_tokens].to(out.dtype), out], dim=1)

    def _search(self, args: Any, kwargs: Any) -> Tensor:
        drawn, x = self._draw(), tokens_in(self.site, self.attention, args, kwargs)
        kind, needed = drawn.kind, drawn.needed()
        outputs: dict[str, Tensor] = {"skip": torch.zeros_like(x)} if kind == "skip" else {}
        if "msa" in needed:
            with gradients_if(kind == "msa"):
                outputs["msa"] = batch_first(self.site, tokens_of(self.attention(*args, **kwargs)))
        outputs.update(self._convolve_values(x, kind, needed))
        return drawn.answer(outputs, self._silent(kind, x))

    def _convolve_values(self, x: Tensor, kind: str, needed: set[str]) -> dict[str, Tensor]:
        """Return the outputs [B, N, D] of the convolutions that are needed, and update both batch norms' statistics."""
        weights = read_weights(self.attention, self.site)
        heads, width = weights.value_weight.shape[:2]
        size = (self.grid.height, self.grid.width)
        outputs = {}
        with gradients_if(kind == "conv3"):
            mix = self.head_mix()
            bias = kernels.mixed_value_bias(mix, weights)  # [K, E]
            # Attention computes values too; to catch them in layers of all libraries is more trouble than a product.
            tokens = F.linear(self.grid.gather(x, self.site.prefix_tokens), weights.value_weight.flatten(0, 1))
            self.grid.as_map(tokens)  # a view, which refuses tokens that do not fit the grid
            summed, centre = kernels.convolve_values(tokens.unflatten(2, (heads, width)), mix, size)
            summed = summed + bias.sum(0)  # [B, G, E]
            normalised = self.bn3(self.grid.as_map(summed))
            if "conv3" in needed:
                out_weight = kernels.mixed_out_weight(mix, weights)
                outputs["conv3"] = self._finish(x, normalised, out_weight, weights)
        if kind == "conv1":
            outputs["conv1"] = self._convolve(x, "conv1")
            return outputs
        with torch.no_grad():
            normalised = self.bn1(self.grid.as_map(centre + bias[CENTRE]))
            if "conv1" in needed:
                out_weight = kernels.mixed_out_weight(mix[:, CENTRE : CENTRE + 1], weights)
                outputs["conv1"] = self._finish(x, normalised, out_weight, weights)
        return outputs

    def _silent(self, kind: str, x: Tensor) -> list[Tensor]:
        """Return the tensors that the chosen candidate does not use; the method gives them a gradient of zero."""
        silent: list[Tensor] = []
        if kind != "conv3":
            silent += self.bn3.parameters()
        if kind != "conv1":
            silent += self.bn1.parameters()
        if kind in ("msa", "skip"):
            silent.append(self.head_logits)
        if kind != "msa":
            silent += self.attention.parameters()
        if kind == "skip":
            silent.append(x)
        return silent


def gradients_if(condition: bool) -> torch.autograd.grad_mode.set_grad_enabled:
    """Return a context that tracks gradients if the condition holds and they are tracked already."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and condition)


@torch.no_grad()
def _differences(
    sensitivity: Sequence[Sequence[float]], outputs: dict[str, Tensor]
) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return the distinct ways in which opening a gate would change the output, and which one each gate has (or -1)."""
    distinct = list(dict.fromkeys(tuple(row) for row in sensitivity if any(row)))
    differences = []
    for row in distinct:
        first, *rest = [(factor, outputs[name]) for factor, name in zip(row, CANDIDATES) if factor]
        total = first[0] * first[1]
        for factor, output in rest:
            total = torch.add(total, output, alpha=factor)
        differences.append(total)
    return differences, tuple(distinct.index(tuple(row)) if any(row) else -1 for row in sensitivity)
