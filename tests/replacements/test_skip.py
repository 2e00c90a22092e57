"""Nothing in place of attention, or a constant."""

from __future__ import annotations

import torch

from layers import DIM, DOUBLE, tokens
from spvit.replacements.skip import Constant, Skip
from tiny import assert_close


def test_rules_say_what_a_skipped_layer_adds() -> None:
    x = tokens()
    assert torch.equal(Skip("zero")(x, None, is_causal=False), torch.zeros_like(x))
    assert torch.equal(Skip("normalised_input")(x), x)
    assert repr(Skip("zero")) == "Skip(rule='zero')"


def test_constants_are_one_a_prefix_token_and_one_for_the_rest() -> None:
    constant = Constant(3, DIM, {"dtype": DOUBLE})
    assert not constant.bias.any()
    with torch.no_grad():
        constant.bias.copy_(torch.arange(3)[:, None].expand(-1, DIM))
    for count in (2, 3, 7):  # any grid
        assert constant(torch.randn(2, count, DIM))[1, :, 0].tolist() == [0, 1, 2, 2, 2, 2, 2][:count]
    assert_close(Skip("mean", constant)(tokens(), None), constant(tokens()))
