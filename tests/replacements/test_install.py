"""Candidates are put in a host and taken out again without a trace."""

from __future__ import annotations

import pytest
from torch import nn

import spvit
from spvit.architecture import FFN, Architecture, Attention, Block
from spvit.replacements.install import installed
from tiny import (
    ONE_A_FAMILY,
    WIDTH,
    assert_differ,
    assert_untouched,
    everything_of,
    ffn_widths,
    images,
    logits,
    make_host,
    paths_of,
    randomise,
)


class Breaks(RuntimeError):
    """Raised while a candidate stands there."""


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_candidates_that_take_turns_leave_no_hooks(name: str) -> None:
    host = make_host(name)
    x, expected, before = images(host), logits(make_host(name), images(host)), everything_of(host)
    dense_host = spvit.Host.of(host)
    width = ffn_widths(host)[1]
    for kind in ("conv3", "conv1", "skip", "msa") * 3:
        with installed(dense_host, 1, Block(Attention(kind), FFN(width, tuple(range(9))))):
            assert_differ(logits(host, x), expected)
        assert_untouched(host, before)
    with pytest.raises(Breaks), installed(dense_host, 1, Block(Attention("conv3"), FFN.whole(width))):
        raise Breaks
    assert_untouched(host, before)


KINDS = (Attention("conv3"), Attention("conv1"), Attention("skip"), Attention("msa", (0, 2), None, 5))
# By what is frozen: whether weights, and biases, of what stands in place of attention learn.
LEARN = {
    "nothing": (True, True),
    "everything": (False, False),
    "weights": (False, True),
    "biases": (True, False),
    "one projection": (False, True),
    "norms": (True, True),
}


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("frozen", LEARN)
@pytest.mark.parametrize("name", ["class_token", "huggingface", "no_biases", "normalised"])
def test_what_replaces_frozen_parameters_is_frozen(name: str, frozen: str, repaired: bool) -> None:
    host = randomise(normalised()).eval() if name == "normalised" else make_host(name)
    sites = [paths.attention for paths in paths_of(host)]
    for path, parameter in host.named_parameters():
        norm, bias = "norm" in path, path.endswith("bias")
        is_frozen = {
            "nothing": False,
            "everything": True,
            "weights": not norm and not bias,
            "biases": not norm and bias,
            "one projection": path.endswith(("qkv.weight", "q_proj.weight", "fc1.weight")),
            "norms": norm,
        }
        parameter.requires_grad_(not is_frozen[frozen])
    flags = {path: parameter.requires_grad for path, parameter in host.named_parameters()}
    biased = any(path.startswith(sites[0]) and path.endswith("bias") and "norm" not in path for path in flags)
    blocks = tuple(Block(kept, FFN(WIDTH, tuple(range(9)))) for kept in KINDS)
    x = images(host, 48) if repaired else None
    small = spvit.prune(host, Architecture(blocks, "linear", "mean"), repair=x)
    weights, biases = LEARN[frozen]
    made = []
    for path, parameter in small.named_parameters():
        if path.startswith(tuple(sites)) and "norm" not in path:
            made.append(path)
            assert parameter.requires_grad == (biases if path.endswith("bias") and biased else weights), path
        elif path in flags:  # the FFNs, which are narrower, and all that stayed
            assert parameter.requires_grad == flags[path], path
        else:
            assert parameter.requires_grad == (frozen not in ("everything", "norms")), path
    assert all(any(path.startswith(site) for path in made) for site in sites)
    assert {path: parameter.requires_grad for path, parameter in host.named_parameters()} == flags


def normalised() -> nn.Module:
    """Return a host with norms over the queries and keys of each head, which narrow attention takes over."""
    timm = pytest.importorskip("timm")
    small = {"img_size": 64, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 3, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **small, qk_norm=True)
