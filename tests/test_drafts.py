"""How far drafts run ahead of full depth."""

from __future__ import annotations

import math
from itertools import groupby

import pytest

from helpers import modest_exits, some_prompts
from models import BLOCKS, tiny
from offramp import Engine, Policy


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])  # random models whose early blocks are often right
def test_a_draft_is_only_worth_what_all_drafts_before_it_are_worth_together(family: str) -> None:
    """A draft is useless if a draft before it is wrong, so the product of their confidences must pass the threshold."""
    engine = Engine(tiny(family), modest_exits(family), Policy((0.3,) * 3), "verify", lookup=0)
    longest = 0
    for prompt in some_prompts(6, seed=1):
        tokens = engine.generate(prompt, max_tokens=24).tokens
        for early, drafts in groupby(tokens, lambda token: token.exit_block < BLOCKS):
            if early:
                sure = [token.confidence for token in drafts]
                longest = max(longest, len(sure))
                assert math.prod(sure) > 0.3
    assert longest > 1
