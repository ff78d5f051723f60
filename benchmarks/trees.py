"""Would trees of drafts be faster than chains? A simulation on the model's own greedy answers, with the shipped costs.

    .venv/bin/python benchmarks/trees.py MODEL [--exits DIR] --prompts FILE [--count 100] [--tokens 128] [--dtype bfloat16]

A chain holds the exit's likeliest token at each place. A tree also holds other candidates for the first draft: its second
and third likeliest tokens, each as one more row of the chunk. If full depth chose one of them, the round gains a token.

The exit drafts at every token of the answers, as the first, second and third draft of a round. Then rounds are played, one
after another: a row is added where its chance (the exit's own probability, times those before it) exceeds its cost at the
rate so far, as decoding decides it. The look-up and the table of n-grams take no part. Costs are those that decoding uses
(`offramp.decode.drafts`). Prints how often candidates are right, and a row for each kind of round.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import offramp
from offramp import Engine
from offramp.decode.drafts import DraftRule
from offramp.exits.exit_set import ExitSet
from offramp.exits.exits import Exits
from offramp.model.backbone import Backbone
from offramp.training import drafting
from offramp.training.config import TrainConfig
from offramp.training.data import gather
from offramp.training.teacher import TeacherText
from offramp.training.trainer import needed_layers

CANDIDATES = 3  # of the first draft


@dataclass(frozen=True)
class Drafts:
    """What the exit drafts after each of the T tokens of a text, as draft 1, 2 and 3 of a round.

    chance (3, T, CANDIDATES): the probabilities of its likeliest tokens; right (3, T, CANDIDATES): whether full depth chose
    them. `asked` (T,): the tokens whose next token is part of the answer.
    """

    chance: Tensor
    right: Tensor
    asked: Tensor


@torch.inference_mode()
def drafts_of(backbone: Backbone, exits: Exits, text: TeacherText) -> Drafts:
    """The drafts for one text."""
    (exit,), rows = exits, exits.shortlist
    states = {block: text.hidden[None, :, place].float() for place, block in enumerate(needed_layers(exits))}
    tops = drafting.runs(backbone, backbone.trainable_from(exit.block), exit, exits.config.middle, states)
    head = backbone.logits if rows is None else backbone.head_of(rows)
    chances, rights = [], []
    for top in tops:
        chance, best = head(top[0].to(backbone.dtype)).softmax(-1).topk(CANDIDATES)
        chances.append(chance)
        rights.append((best if rows is None else rows[best]) == text.top_ids[:, :1])
    return Drafts(torch.stack(chances), torch.stack(rights), text.counted)


class Play:
    """Rounds of drafts, played one after another; `tokens`, `cost` (in steps of full depth) and `rows` are sums over them.

    wide: the most candidates for the first draft of a round.
    """

    def __init__(self, costs: DraftRule, wide: int) -> None:
        self.costs, self.wide = costs, wide
        self.rounds, self.tokens, self.cost, self.rows = 1, 1.0, 1.0, 1.0  # as if one round without drafts had been played

    def through(self, text: Drafts) -> None:
        """Play all rounds of one answer."""
        at = int(text.asked.nonzero()[0])
        while at < len(text.asked):
            at += self._round(text, at)

    def _worth(self, rows: int) -> float:
        """The chance that the last of so many more rows needs."""
        return (self.costs.rows[rows] - self.costs.rows[rows - 1]) * max(1.0, self.tokens / self.cost)

    def _round(self, text: Drafts, at: int) -> int:
        """Play one round, which begins after token `at`. Returns the number of its tokens."""
        chain, asks, chance = 0, 0, 1.0
        while chain < drafting.LENGTH and at + chain < len(text.asked):
            asks += 1
            chance *= float(text.chance[chain, at + chain, 0])
            if chance <= max(self._worth(chain + 1), self.costs.floor):
                break
            chain += 1
        others: list[int] = []
        for place in range(1, self.wide if chain else 1):
            if float(text.chance[0, at, place]) > self._worth(chain + len(others) + 1):
                others.append(place)
        stood = 0
        while stood < chain and bool(text.right[stood, at + stood, 0]):
            stood += 1
        if not stood:
            stood = int(any(bool(text.right[0, at, place]) for place in others))
        more = chain + len(others)
        self.rounds, self.rows = self.rounds + 1, self.rows + 1 + more
        self.tokens, self.cost = (
            self.tokens + stood + 1,
            self.cost + 1 + self.costs.rows[more] + asks * self.costs.asking[0],
        )
        return stood + 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--exits", help="the folder of exits; default: those that ship")
    parser.add_argument("--prompts", required=True, help="prompts that the drafts have not learned from")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype")
    args = parser.parse_args(argv)
    backbone = offramp.load(args.model, args.dtype, keep=True).backbone
    exits = ExitSet.find(args.exits, backbone).drafting
    assert exits is not None
    costs = Engine(backbone, exits, fill="verify").drafts
    if costs is None or not costs.asking:
        parser.error("These exits are closed, and draft nothing.")
    config = TrainConfig(prompts=args.prompts, max_prompts=args.count, answer_tokens=args.tokens, temperatures=(0.0,))
    with tempfile.TemporaryDirectory() as work:
        data = gather(backbone, config, needed_layers(exits), Path(work))
        texts = [drafts_of(backbone, exits, text) for text in data.adapters + data.gates + data.held]
    asked = torch.cat([text.right[0][text.asked] for text in texts]).float()
    shares = [f"{100 * float(asked[:, : place + 1].any(-1).float().mean()):.1f}%" for place in range(CANDIDATES)]
    print(f"{backbone.name}, {backbone.weight_format}: {len(texts)} answers, {len(asked)} tokens.")
    print(f"Full depth's token is the first candidate in {shares[0]}, among the first two in {shares[1]}, ", end="")
    print(f"among the first three in {shares[2]}.\n")
    print("| candidates for the first draft | tokens a round | cost | rows | tokens a step |\n|---|---|---|---|---|")
    for wide in range(1, CANDIDATES + 1):
        played = Play(costs, wide)
        for text in texts:
            played.through(text)
        tokens, cost, width = (total / played.rounds for total in (played.tokens, played.cost, played.rows))
        print(f"| {wide} | {tokens:.3f} | {cost:.3f} | {width:.2f} | {tokens / cost:.3f} |")


if __name__ == "__main__":
    main()
