"""Gates and read-outs with a memory see each token that stands once, in order, and forget tokens that were taken back."""

from __future__ import annotations

import pytest
import torch

from helpers import LAYERS, modest_exits, some_prompts
from models import BLOCKS, tiny
from offramp import Engine, Exits, Policy


@torch.inference_mode()
def over_the_whole_text(family: str, exits: Exits, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates' confidences (T, exits) and the read-outs' best tokens (T, exits), from one pass over T tokens."""
    backbone, start = tiny(family), 0
    h, step = backbone.embed(torch.tensor([ids]))
    state, confidences, tokens = backbone.state(), [], []
    for exit in exits:
        h = backbone.run(h, start, exit.block, state, step)
        start = exit.block
        confidences.append(exit.gate(h)[0][0].sigmoid())
        tokens.append(backbone.logits(exit.adapter(h)[0])[0].argmax(-1))
    return torch.stack(confidences, 1), torch.stack(tokens, 1)


@pytest.mark.parametrize("family", ["llama", "llama/compiled", "mamba2", "mamba2/compiled", "bamba", "gemma2"])
def test_a_token_leaves_as_sure_and_says_the_same_as_in_one_pass_over_the_text(family: str) -> None:
    exits = modest_exits(family, readout="mamba")
    engine, left = Engine(tiny(family), exits, Policy((0.3, 0.3, 0.3)), "defer", max_pending=4), 0
    for prompt in some_prompts(6, seed=2):
        answer = engine.generate(prompt, max_tokens=20)
        confidences, tokens = over_the_whole_text(family, exits, prompt + answer.ids)
        for place, token in enumerate(answer.tokens, len(prompt) - 1):
            if 0 < token.exit_block < BLOCKS:
                index = LAYERS.index(token.exit_block)
                assert token.confidence == pytest.approx(float(confidences[place, index]), abs=1e-4)
                assert token.id == tokens[place, index]
                left += 1
    assert left > 0
