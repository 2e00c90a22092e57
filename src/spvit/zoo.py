"""The published architectures as models. Importing this file registers them with timm.

import spvit.zoo
model = timm.create_model("spvit_deit_tiny_patch16_224", num_classes=10)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import register_model
from torch import nn

from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.errors import ZooError
from spvit.hosts.rebuild import make_by_timm
from spvit.surgery import prune

# Read off the published checkpoints (method.md 6), a stage in one row or two: width of the FFNs, attention a letter a
# block, FFN units kept a block. The publication gives how many units stay, not which; the first ones stand for them.
_LETTERS = {"m": "msa", "3": "conv3", "1": "conv1", "s": "skip"}
_STAGES: dict[str, list[tuple[int, str, list[int]]]] = {
    "deit_tiny_patch16_224": [(768, "11mmmmmmmmmm", [744, 758, 764, 767, 766, 764, 756, 659, 633, 473, 179, 145])],
    "deit_small_patch16_224": [
        (1536, "1mmmmmmmmmmm", [1304, 1399, 1344, 1214, 1251, 1183, 1140, 925, 742, 391, 104, 103])
    ],
    "deit_base_patch16_224": [
        (3072, "11133mmmmmmm", [1118, 489, 1050, 1345, 1336, 1326, 1431, 1564, 1606, 1702, 1290, 190])
    ],
    "deit_base_11g_patch16_224": [
        (3072, "1113mmmmmmmm", [1253, 610, 1343, 1912, 2354, 2306, 2483, 2753, 2869, 2860, 2443, 934])
    ],
    "swin_tiny_patch4_window7_224": [
        (384, "1s", [186, 152]),
        (768, "1s", [646, 504]),
        (1536, "mmmmmm", [1350, 1319, 1289, 1249, 1234, 1082]),
        (3072, "mm", [3041, 2994]),
    ],
    "swin_small_patch4_window7_224": [
        (384, "1s", [188, 209]),
        (768, "mm", [748, 680]),
        (1536, "mmmmmmmmm", [1159, 1260, 1127, 1036, 919, 916, 868, 918, 903]),
        (1536, "mmms1mmss", [937, 961, 1037, 1063, 996, 888, 866, 741, 509]),
        (3072, "mm", [3064, 3051]),
    ],
    "swin_base_patch4_window7_224": [
        (512, "ms", [311, 303]),
        (1024, "mm", [1011, 980]),
        (2048, "mmmmmmmsm", [1763, 1673, 1636, 1523, 1410, 1377, 1332, 1345, 1440]),
        (2048, "mmmmms1ms", [1426, 1400, 1315, 1371, 1321, 1324, 1265, 1127, 734]),
        (4096, "mm", [3572, 2931]),
    ],
}


def architectures() -> dict[str, Architecture]:
    """Return the published architectures by name (paper, tables of section 4).

    The publication counts the FFN units kept but does not say which they are, so each FFN lists its first units. A
    skipped layer adds its normalised input, as in the published fine-tuned networks; this matters to Swin's alone, and
    `dataclasses.replace(architecture, skip_rule="zero")` gives the rule of a search.
    """
    found = {}
    for name, stages in _STAGES.items():
        blocks = tuple(
            Block(Attention(_LETTERS[letter]), FFN(width, tuple(range(kept))))
            for width, letters, units in stages
            for letter, kept in zip(letters, units, strict=True)
        )
        skips = any("s" in letters for _, letters, _ in stages)
        found[f"spvit_{name}"] = Architecture(blocks, skip_rule="normalised_input" if skips else "zero")
    return found


def host_name(name: str) -> str:
    """Return the timm model that a published model was pruned from. Raises ZooError when there is no such model."""
    if name not in architectures():
        raise ZooError(f"published model {name!r} is unknown, expected one of {', '.join(architectures())}")
    return name.removeprefix("spvit_").replace("_11g", "")  # two architectures are of DeiT-B


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a published architecture as a pruned network with random weights, its batch norms not yet folded.

    Args:
        name: one of `spvit.architectures()`.
        pretrained: refused, since there are no weights to download.
        kwargs: what timm's model of the host takes, such as num_classes, img_size, drop_path_rate.

    Raises:
        ZooError: the name is unknown, or pretrained weights are asked for.
        ArchitectureError: arguments such as depth or mlp_ratio give another host than the architecture is for.
    """
    dense = host_name(name)
    if pretrained:
        raise ZooError(
            f"{name} has no pretrained weights: the publication does not offer them in a form that can be downloaded "
            f"here; pass pretrained=False, and load your own weights or prune {dense} with its pretrained ones"
        )
    return prune(make_by_timm(dense, **kwargs), architectures()[name], inplace=True)


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_model(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"The published architecture {name}, pruned from {host_name(name)}."
    return create


for _name in architectures():
    globals()[_name] = register_model(_entry_point(_name))
