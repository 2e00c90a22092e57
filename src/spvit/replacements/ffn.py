"""An FFN with fewer hidden units: its second linear layer is corrected.

Sources: CORP (arXiv 2602.05243) for the correction, Variance-Based Pruning (arXiv 2507.12988) for the shift of
the mean.

Shapes: D width, X inputs and Y outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spvit.hosts.walk import BlockPair
from spvit.moments import Moments, regression, ridge_for
from spvit.replacements.targets import Gathered, ffn_targets


def fit_ffn(pair: BlockPair, kept: Sequence[int]) -> None:
    """Correct the second linear layer of the pruned block's FFN so that it comes closest to its target, in place.

    W <- W + S_yx (S_xx + lI)^-1, y being the target less this layer's output. For an FFN with the inputs of the dense
    one, y = W2[:, P] h_P is the part of the removed units P, and the correction W2[:, P] S_PK (S_KK + lI)^-1.
    kept: its units, ascending.
    """
    path = pair.sites.ffn.second
    linear = pair.model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    gathered = Gathered(pair)
    for x, lacking, missing in ffn_targets(pair, kept):
        gathered.add(x, lacking, missing, pair.prefix)
    correct(linear, gathered.moments(linear.bias is not None))


def correction(moments: Moments, biased: bool) -> tuple[Tensor, Tensor | None]:
    """Return what to add to a linear layer, weight [Y, X] and bias [Y], given moments of its inputs x and errors y.

    Without a bias to correct, the moments about zero count, as nothing else can take up a mean.
    """
    weight = regression(*moments.products(biased), ridge_for(moments)).T
    return weight, moments.mean_y - weight @ moments.mean_x if biased else None


def correct(linear: nn.Linear, moments: Moments) -> None:
    """Correct a linear layer in place, given moments of its inputs x and errors y."""
    weight, bias = correction(moments, linear.bias is not None)
    linear.weight.add_(weight.to(linear.weight))
    if bias is not None:
        linear.bias.add_(bias.to(linear.bias))
