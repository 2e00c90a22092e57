"""Candidates are put in a host and taken out again without a trace."""

from __future__ import annotations

import pytest

import spvit
from spvit.architecture import FFN, Attention, Block
from spvit.replacements.install import installed
from tiny import ONE_A_FAMILY, assert_differ, assert_untouched, everything_of, ffn_widths, images, logits, make_host


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
