"""MACs, parameters and latency of a network by what its blocks keep.

One table of costs serves architectures (integers) and the expectation of gates (tensors). Costs are MACs of one image,
parameters, or measured nanoseconds of one pass, of the deployed network (batch norms folded).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spvit.architecture import PUBLISHED, Architecture, Attention, Block, Rules

METRICS = ("macs", "params")


@dataclass(frozen=True)
class AttentionCost:
    """What one kind of replacement costs at one attention site."""

    whole: int
    """With all heads and dimensions, under rules that cost nothing."""
    query_key: int = 0
    """One dimension of the queries and keys of one head."""
    value: int = 0
    """One dimension of the values of one head."""
    rest: int = 0
    """Of a narrower layer, what no head and no dimension brings."""
    head: int = 0
    """One head of a narrower layer, beside its dimensions."""
    rules: Mapping[str, int] = field(default_factory=dict)
    """What the architecture's rules for prefix tokens or for skipped layers add."""


@dataclass(frozen=True)
class BlockCost:
    """What the parts of one block cost, in one metric."""

    kinds: Mapping[str, AttentionCost]
    """By kind of what stands where the attention layer was."""
    unit: int
    """One hidden unit of the FFN."""
    units: int
    """Hidden units of the FFN before pruning."""
    heads: int = 0
    """Heads of the attention before pruning."""
    head_width: int = 0
    """Dimensions of a head before pruning."""
    prefix_only: BlockCost | None = None
    """What the parts cost where the block runs for its prefix tokens alone; None where it cannot."""

    @property
    def dense(self) -> int:
        """The cost of keeping everything."""
        return self.attention(Attention()) + self.unit * self.units

    def attention(self, kept: Attention, rules: Rules = PUBLISHED) -> int:
        """Return the cost of what stands where the attention layer was."""
        cost = self.kinds[kept.kind]
        rules_cost = sum(cost.rules.get(rule, 0) for rule in rules)
        if not kept.narrowed():
            return cost.whole + rules_cost
        heads = self.heads if kept.heads is None else len(kept.heads)
        query_key = self.head_width if kept.query_key_rank is None else kept.query_key_rank
        value = self.head_width if kept.value_rank is None else kept.value_rank
        return cost.rest + heads * (cost.head + query_key * cost.query_key + value * cost.value) + rules_cost

    def of(self, block: Block, rules: Rules) -> int:
        """Return the cost of what an architecture keeps of the block."""
        if block.tokens == "prefix" and self.prefix_only is not None:
            return self.prefix_only.of(replace(block, tokens="all"), rules)
        return self.attention(block.attention, rules) + self.unit * len(block.ffn.units)


@dataclass(frozen=True)
class NetworkCost:
    """What a network costs: a fixed part, and what each block's gates decide (paper section 3.4)."""

    metric: str
    """`macs`, `params` or `latency`."""
    fixed: int
    blocks: tuple[BlockCost, ...]
    note: str = ""
    """What to know where a budget cannot be reached."""

    def of(self, architecture: Architecture) -> int:
        """Return the cost of an architecture."""
        pairs = zip(self.blocks, architecture.blocks)
        return self.fixed + sum(cost.of(block, architecture.rules) for cost, block in pairs)

    def expected(self, attention: Tensor, units: Sequence[Tensor]) -> Tensor:
        """Return the cost of gates given in expectation, differentiable.

        attention: nested expected gates, [blocks, 3]; units: for each block, the sum of its expected FFN gates.
        """
        nested = ("skip", "conv1", "conv3", "msa")
        spent = [[block.attention(Attention(kind)) for kind in nested] for block in self.blocks]
        closed = sum(kinds[0] for kinds in spent)
        steps = attention.new_tensor([[high - low for low, high in itertools.pairwise(kinds)] for kinds in spent])
        unit = attention.new_tensor([block.unit for block in self.blocks])
        return self.fixed + closed + (steps * attention).sum() + (unit * torch.stack(list(units))).sum()

    def for_prefix(self) -> NetworkCost:
        """Return the same costs with those of a last block that runs for its prefix tokens alone, if it can."""
        last = self.blocks[-1].prefix_only
        return self if last is None else replace(self, blocks=(*self.blocks[:-1], last))

    @property
    def smallest(self) -> int:
        """The least cost that any architecture can have: no attention, no FFN units."""
        return self.fixed

    @property
    def dense(self) -> int:
        """The cost of keeping everything."""
        return self.fixed + sum(block.dense for block in self.blocks)


def count_macs(model: nn.Module, run: Callable[[nn.Module], object]) -> int:
    """Return the MACs that a forward pass takes, measured without computing anything.

    Linear, convolution and attention products count, as `torch.utils.flop_counter` counts them (halved). `run` calls
    the copy that it is given once; that is on the meta device, since fused attention on CPU escapes the counter.
    """
    return counted(model, run).get_total_flops() // 2


def counted(model: nn.Module, run: Callable[[nn.Module], object]) -> FlopCounterMode:
    """Return what PyTorch's counter counts of a pass of a copy on the meta device, by module too."""
    # Without gradients to track, the counter also accepts blocks that attend to a learned query.
    twin = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    for module in twin.modules():  # tensors that are no buffers, as own models have them, stay behind
        own = vars(module)
        own.update({name: value.to("meta") for name, value in own.items() if isinstance(value, Tensor)})
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        run(twin)
    return counter


def count_params(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
