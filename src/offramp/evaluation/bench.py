"""How fast decoding is: at full depth beside `transformers` on the same weights, and engines beside one another.

Runs take turns (A B A B …), and a ratio is the median over pairs, so that a slow minute of the machine affects both sides.
A rate counts the tokens after the first, and so leaves out the prefill.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from offramp.decode.engine import Engine
from offramp.decode.request import Generation
from offramp.decode.row_costs import WIDTHS
from offramp.decode.timing import Timer, untimed
from offramp.errors import BadInput
from offramp.machine import machine
from offramp.model.backbone import Backbone
from offramp.model.compiled.formats import Change
from offramp.model.compiled.library import kernels

PROMPT = "Explain how rainbows form, in detail."
# With `verify`, speed depends on how many drafts stand, which differs from text to text.
PROMPTS = (
    PROMPT,
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "List five ways to save water at home.",
    "Who wrote Romeo and Juliet, and when?",
    "Write a Python function that reverses a string.",
)
PASSES = 4  # of each width in a round, when rows are timed
REST = "everything else"  # a token's time outside all named parts


def _machine() -> dict[str, Any]:
    """The machine, and the instructions that compiled blocks multiply with on it."""
    return machine() | {"kernels": kernels()}


@dataclass(frozen=True)
class Side:
    """One of the two libraries, with the rate of each run and their median, in tokens a second; `bits` of a weight."""

    name: str
    weights: str
    bits: float
    tokens_per_second: float
    runs: list[float]


@dataclass(frozen=True)
class Comparison:
    """offramp (`ours`) beside another library (`theirs`), with rates in tokens a second.

    `ratio`: our rate over theirs, the median of the pairs; `spread`: the lowest and highest pair. `parts_ms`: the parts of
    our time for a token, in ms. `change`: what our weight format changes in a short text, where that was measured.
    """

    model: str
    what: str
    ratio: float
    spread: tuple[float, float]
    ours: Side
    theirs: Side
    parts_ms: dict[str, float]
    tokens: int
    pairs: int
    prompt_tokens: int
    change: Change | None = None
    machine: dict[str, Any] = field(default_factory=_machine)


@dataclass(frozen=True)
class EngineSpeed:
    """How fast an engine decodes, compared with the first one.

    `ratio`: its rate over the first one's, the median of the pairs; `spread`: the lowest and highest pair; `equal`: share
    of the places of the longer of two answers at which both have the same token; `parts_ms`: the parts of a token's time,
    in ms; `acceptance_rate`: share of drafts that stood, None without drafts.
    """

    tokens_per_second: float
    ratio: float
    spread: tuple[float, float]
    thresholds: dict[int, float]
    equal: float
    mean_blocks: float
    tokens_per_deep_pass: float
    acceptance_rate: float | None
    parts_ms: dict[str, float]


@dataclass(frozen=True)
class EngineComparison:
    """Engines beside one another, by name. `ratio`: the last's rate over the first's; `bits`, `change`: as above."""

    model: str
    what: str
    weights: str
    bits: float
    ratio: float
    speeds: dict[str, EngineSpeed]
    tokens: int
    prompts: int
    pairs: int
    change: Change | None = None
    machine: dict[str, Any] = field(default_factory=_machine)


def compare(backbone: Backbone, tokens: int = 48, pairs: int = 5) -> Comparison:
    """Decode `tokens` tokens with offramp and with `transformers`' generate, in turn, `pairs` times after a warm-up.

    The backbone must have been loaded with `keep=True`. Raises `BadInput` for more tokens than the context holds.
    """
    prompt = _encoded(backbone, [PROMPT], tokens)[0]
    engine = Engine(backbone)
    _our_rate(engine, prompt, 8)
    _their_rate(backbone, prompt, 8)
    rates = [(_our_rate(engine, prompt, tokens), _their_rate(backbone, prompt, tokens)) for _ in range(pairs)]
    ratios = [our_rate / their_rate for our_rate, their_rate in rates]
    our_rates, their_rates = ([pair[side] for pair in rates] for side in (0, 1))
    held = next(backbone.blocks[0].parameters()).dtype
    dtype, bits = str(held).removeprefix("torch."), 8.0 * held.itemsize
    return Comparison(
        model=backbone.name,
        what="decoding",
        ratio=median(ratios),
        spread=(min(ratios), max(ratios)),
        ours=Side(
            f"offramp ({backbone.engine})", backbone.weight_format, backbone.runtime.bits, median(our_rates), our_rates
        ),
        theirs=Side("transformers generate", dtype, bits, median(their_rates), their_rates),
        parts_ms=parts_of_a_token(engine, [prompt], tokens),
        tokens=tokens,
        pairs=pairs,
        prompt_tokens=len(prompt),
        change=backbone.change,
    )


def compare_engines(
    engines: dict[str, Engine], tokens: int = 48, pairs: int = 5, texts: Sequence[str] = PROMPTS
) -> EngineComparison:
    """Decode answers to prompts with each engine, `pairs` times after a warm-up. They take turns, prompt by prompt.

    All engines have the same model. Raises `BadInput` for more tokens than the context holds.
    """
    first = next(iter(engines))
    backbone = engines[first].backbone
    prompts = _encoded(backbone, texts, tokens)

    def answers_of_all() -> dict[str, list[Generation]]:
        made: dict[str, list[Generation]] = {name: [] for name in engines}
        for prompt in prompts:
            for name, engine in engines.items():
                made[name].append(engine.generate(prompt, max_tokens=tokens))
        return made

    answers = answers_of_all()
    rounds = [{name: _rate_of(made) for name, made in answers_of_all().items()} for _ in range(pairs)]
    speeds = {}
    for name, engine in engines.items():
        ratios = [rates[name] / rates[first] for rates in rounds]
        speeds[name] = _speed(
            answers[name],
            answers[first],
            tokens_per_second=median(rates[name] for rates in rounds),
            ratio=median(ratios),
            spread=(min(ratios), max(ratios)),
            parts_ms=parts_of_a_token(engine, prompts, tokens),
        )
    last = speeds[name].ratio
    counts = tokens, len(prompts), pairs
    return EngineComparison(backbone.name, "decoding", *_weights(backbone), last, speeds, *counts, backbone.change)


def _weights(backbone: Backbone) -> tuple[str, float]:
    return backbone.weight_format, backbone.runtime.bits


@torch.inference_mode()
def measured_costs(backbone: Backbone, rounds: int = 15) -> tuple[float, ...]:
    """What 0, 1, … more rows of a pass cost, at `WIDTHS`, in steps of full depth.

    Passes of each width take turns with passes of one row, after a context of 64 tokens; medians over the rounds. A step is
    a decoded token's time. So what a single call costs beside its work does not count. Raises `BadInput` for a model whose
    context is too short.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, backbone.vocab_size, (1, 64 + PASSES * WIDTHS[-1]), generator=generator).to(backbone.device)

    def seconds(width: int) -> float:
        state = backbone.state()
        h, step = backbone.embed(ids[:, :64])
        backbone.run(h, 0, backbone.n_blocks, state, step)
        started = time.perf_counter()
        for at in range(64, 64 + PASSES * width, width):
            h, step = backbone.embed(ids[:, at : at + width], at)
            float(backbone.logits(backbone.run(h, 0, backbone.n_blocks, state, step))[0, 0, 0])  # a GPU waits here
        return (time.perf_counter() - started) / PASSES

    prompt = _encoded(backbone, [PROMPT], ids.shape[1])[0]
    engine = Engine(backbone)
    steps, more = [], [[0.0] for _ in WIDTHS]
    for number in range(1 + rounds):
        steps.append(1 / engine.generate(prompt, max_tokens=48, end_ids=frozenset()).decode_tokens_per_second)
        for place, width in enumerate(WIDTHS[1:] if number else ()):  # the first round warms up
            more[place + 1].append(seconds(width) - seconds(1))
    costs = [max(0.0, median(each[1:] or each) / median(steps[1:])) for each in more]
    return tuple(round(max(costs[: place + 1]), 3) for place in range(len(costs)))


def parts_of_a_token(engine: Engine, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Milliseconds that a decoded token spends in each named part, and in everything else, over answers to all prompts.

    `blocks` at full depth; with open exits `shallow` (before the first of them) and `deep`; `heads`; `exits` (gates and
    read-outs); `fill`; `sampling`; `rollback` (of drafts); `embedding`; `text` (ids to text).
    """
    timer, whole, count = Timer(), 0.0, 0
    for prompt in prompts:
        batch = engine.batch()
        request = batch.add(prompt, max_tokens=tokens)
        while not request.prefilled:
            batch.step()
        engine.plan.timed = timer
        started = time.perf_counter()
        try:
            for _ in batch.run():
                pass
        finally:
            engine.plan.timed = untimed
        whole += time.perf_counter() - started
        count += len(request.tokens)
    parts = {part: 1000 * seconds / count for part, seconds in timer.seconds.items()}
    return {**parts, REST: 1000 * whole / count - sum(parts.values())}


def _rate_of(answers: list[Generation]) -> float:
    """Tokens a second over all answers."""
    tokens = sum(len(answer.tokens) for answer in answers)
    return tokens / sum(len(answer.tokens) / answer.decode_tokens_per_second for answer in answers)


def _speed(answers: list[Generation], first: list[Generation], **measured: Any) -> EngineSpeed:
    ends = [answer.tokens[-1] for answer in answers]
    count = sum(len(answer.tokens) for answer in answers)
    pairs = [zip(answer.ids, reference.ids, strict=False) for answer, reference in zip(answers, first, strict=True)]
    places = sum(max(len(answer.ids), len(reference.ids)) for answer, reference in zip(answers, first, strict=True))
    early = sum(token.exit_block < answer.blocks for answer in answers for token in answer.tokens)
    rejected = sum(end.rejected for end in ends)
    drafts = any(answer.acceptance_rate is not None for answer in answers)
    return EngineSpeed(
        thresholds=answers[0].thresholds,
        equal=sum(id == first_id for pair in pairs for id, first_id in pair) / places,
        mean_blocks=sum(token.blocks for answer in answers for token in answer.tokens) / count,
        tokens_per_deep_pass=count / max(1, sum(end.deep_passes for end in ends)),
        acceptance_rate=early / (early + rejected) if drafts else None,
        **measured,
    )


def _encoded(backbone: Backbone, texts: Sequence[str], tokens: int) -> list[list[int]]:
    """The prompts as ids; random ones for a model without a tokenizer.

    Raises `BadInput` where `tokens` more would not fit the model's context.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, backbone.vocab_size, (16,), generator=generator).tolist()
    prompts = [backbone.prompts.encode(text) for text in texts] if backbone.tokenizer else [random]
    needed = max(map(len, prompts)) + tokens
    if needed > backbone.context:
        raise BadInput(f"{needed} tokens do not fit {backbone.name}, which holds {backbone.context}.", "Take fewer.")
    return prompts


class _Times:
    """Notes the time of each token. It stands in for a `transformers` streamer, whose `put` gets the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any = None) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def rate(self) -> float:
        """Tokens a second after the first one. Raises `BadInput` for a single token."""
        if len(self.times) < 3:
            raise BadInput("A single token gives no time between tokens.", "Time at least two.")
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])


def _our_rate(engine: Engine, prompt: list[int], tokens: int) -> float:
    """Tokens a second, however many come out of a call. An end of text does not end the answer, nor does it theirs."""
    return engine.generate(prompt, max_tokens=tokens, end_ids=frozenset()).decode_tokens_per_second


@torch.inference_mode()
def _their_rate(backbone: Backbone, prompt: list[int], tokens: int) -> float:
    clock = _Times()
    ids = torch.tensor([prompt], device=backbone.device)
    backbone.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
    )
    return clock.rate
