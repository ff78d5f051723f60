"""How fast decoding is: at full depth beside `transformers` on the same weights, and fills beside one another.

Runs take turns (A B A B …), and the ratio is the median over pairs: a minute in which the machine is slow meets both. A
rate counts the tokens after the first, so that reading the prompt is no part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from offramp.decode.engine import Engine, Generation
from offramp.decode.sequence import Follower
from offramp.errors import BadInput
from offramp.exits.exits import Exits
from offramp.exits.policy import Policy
from offramp.machine import machine
from offramp.model.backbone import Backbone

PROMPT = "Explain how rainbows form, in detail."
# A fill is only as fast as its drafts are good, which differs from text to text.
PROMPTS = (
    PROMPT,
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "List five ways to save water at home.",
    "Who wrote Romeo and Juliet, and when?",
    "Write a Python function that reverses a string.",
)


def compare(backbone: Backbone, tokens: int = 48, pairs: int = 5) -> dict[str, Any]:
    """Decode `tokens` tokens with offramp and with `transformers`' generate, in turn, `pairs` times after a warm-up.

    The backbone must have been loaded with `keep=True`. Returns `ratio` (ours over theirs in decoded tokens a second, the
    median of the pairs), `spread` (lowest and highest), both rates, where our time goes (ms a token), and the machine.
    """
    prompt = backbone.encode(PROMPT) if backbone.tokenizer else _random_ids(backbone, 16)
    _fits(backbone, len(prompt) + tokens)
    engine = Engine(backbone)
    _ours(engine, prompt, 8)
    _theirs(backbone, prompt, 8)
    ours, theirs = _in_turn(lambda: _ours(engine, prompt, tokens), lambda: _theirs(backbone, prompt, tokens), pairs)
    parts = _parts(engine, prompt, tokens)
    return {**_result(backbone, "decoding", "generate", tokens, ours, theirs, parts), "prompt_tokens": len(prompt)}


def compare_fills(
    backbone: Backbone,
    fills: dict[str, Exits | None],
    policies: dict[str, Policy | None],
    tokens: int = 48,
    pairs: int = 5,
) -> dict[str, Any]:
    """Decode answers to `PROMPTS` with each fill in turn, `pairs` times after a warm-up; one without exits is full depth.

    `policies` take the place of the exits' own. Returns for each of the `fills` its rate, its `ratio` over the first
    (median of the pairs) and `spread`, the share of its tokens that equal the first's (`equal`), where its time goes (ms a
    token), and the acceptance rate and tokens per deep pass over all prompts; `ratio` at the top is the last fill's.
    """
    prompts = [backbone.encode(prompt) for prompt in PROMPTS] if backbone.tokenizer else [_random_ids(backbone, 16)]
    _fits(backbone, max(map(len, prompts)) + tokens)

    engines = [
        Engine(backbone, exits, policies.get(fill), fill) if exits else Engine(backbone) for fill, exits in fills.items()
    ]

    def once(engine: Engine) -> tuple[float, list[Generation]]:
        answers = [engine.generate_ids(prompt, tokens) for prompt in prompts]
        count = sum(len(answer.tokens) for answer in answers)
        return count / sum(len(answer.tokens) / answer.decode_tokens_per_second for answer in answers), answers

    answers = [once(engine)[1] for engine in engines]
    rounds = [[once(engine)[0] for engine in engines] for _ in range(pairs)]
    found = {}
    for index, fill in enumerate(fills):
        ratios = [rates[index] / rates[0] for rates in rounds]
        ends = [answer.tokens[-1] for answer in answers[index]]
        count = sum(len(answer.tokens) for answer in answers[index])
        same = sum(
            mine == other
            for answer, first in zip(answers[index], answers[0], strict=True)
            for mine, other in zip(answer.ids, first.ids, strict=False)
        )
        early = sum(token.exit_block < backbone.n_blocks for answer in answers[index] for token in answer.tokens)
        rejected = sum(end.rejected for end in ends)
        found[fill] = {
            "tokens_per_second": median(rates[index] for rates in rounds),
            "ratio": median(ratios),
            "spread": [min(ratios), max(ratios)],
            "thresholds": engines[index].thresholds,
            "equal": same / count,
            "mean_blocks": sum(token.exit_block for answer in answers[index] for token in answer.tokens) / count,
            "tokens_per_deep_pass": count / max(1, sum(end.deep_passes for end in ends)),
            "acceptance_rate": early / (early + rejected) if fill == "verify" and early + rejected else None,
            "parts_ms": _parts(engines[index], prompts[0], tokens),
        }
    return {
        "model": backbone.name,
        "what": "decoding",
        "weights": backbone.weight_format,
        "ratio": found[fill]["ratio"],
        "fills": found,
        "tokens": tokens,
        "prompts": len(prompts),
        "pairs": pairs,
        "machine": machine(),
    }


def compare_prefill(backbone: Backbone, tokens: int, pairs: int = 5) -> dict[str, Any]:
    """As `compare`, for reading a prompt of `tokens` random tokens up to the logits that follow it."""
    _fits(backbone, tokens)
    ids = torch.tensor([_random_ids(backbone, tokens)], device=backbone.device)

    @torch.inference_mode()
    def ours() -> None:
        h, step = backbone.embed(ids)
        h = backbone.run(h, 0, backbone.n_blocks, backbone.state(tokens), step)
        backbone.logits(h[:, -1:]).sum().item()

    @torch.inference_mode()
    def theirs() -> None:
        backbone.model(ids, use_cache=True, logits_to_keep=1).logits.sum().item()

    def rate(read: Callable[[], None]) -> float:
        started = time.perf_counter()
        read()
        return tokens / (time.perf_counter() - started)

    rate(ours)
    rate(theirs)
    rates = _in_turn(lambda: rate(ours), lambda: rate(theirs), pairs)
    return _result(backbone, "prefill", "forward", tokens, *rates, {})


def _fits(backbone: Backbone, tokens: int) -> None:
    if tokens > backbone.context:
        raise BadInput(f"{tokens} tokens do not fit {backbone.name}, which holds {backbone.context}.", "Take fewer.")


def _random_ids(backbone: Backbone, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, backbone.vocab_size, (length,), generator=generator).tolist()


def _in_turn(ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> tuple[list[float], list[float]]:
    rates = [(ours(), theirs()) for _ in range(pairs)]
    return [mine for mine, _ in rates], [other for _, other in rates]


def _result(
    backbone: Backbone,
    what: str,
    call: str,
    tokens: int,
    ours: list[float],
    theirs: list[float],
    parts: dict[str, float],
) -> dict[str, Any]:
    """What was measured, rates in tokens a second, and where."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "model": backbone.name,
        "what": what,
        "ratio": median(ratios),
        "spread": [min(ratios), max(ratios)],
        "ours": {
            "name": f"offramp ({backbone.engine})",
            "weights": backbone.weight_format,
            "tokens_per_second": median(ours),
            "runs": ours,
        },
        "theirs": {
            "name": f"transformers {call}",
            "weights": str(next(backbone.blocks[0].parameters()).dtype).removeprefix("torch."),
            "tokens_per_second": median(theirs),
            "runs": theirs,
        },
        "parts_ms": parts,
        "tokens": tokens,
        "pairs": len(ours),
        "machine": machine(),
    }


class _Times:
    """When each token came. It stands in for a `transformers` streamer, whose `put` gets the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any = None) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def rate(self, skipped: int) -> float:
        """Tokens a second after the first token, which came after `skipped` other calls."""
        times = self.times[skipped:]
        if len(times) < 2:
            raise BadInput("The model ended its answer at once, so there is nothing to time.", "Try another model.")
        return (len(times) - 1) / (times[-1] - times[0])


def _ours(engine: Engine, prompt: list[int], tokens: int) -> float:
    clock = _Times()
    for _ in engine.stream_ids(prompt, tokens):
        clock.put()
    return clock.rate(1)


@torch.inference_mode()
def _theirs(backbone: Backbone, prompt: list[int], tokens: int) -> float:
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
    return clock.rate(1)


def _parts(engine: Engine, prompt: list[int], tokens: int) -> dict[str, float]:
    """Milliseconds a decoded token spends in blocks, heads, gates and read-outs, the choice of a token, and the rest.

    With open exits, blocks before the first of them are `shallow`, those after it `deep`.
    """
    backbone: Any = engine.backbone
    first = min((block for block, threshold in engine.thresholds.items() if threshold < 1), default=backbone.n_blocks)
    opened = first < backbone.n_blocks
    spent = dict.fromkeys([*(("shallow", "deep") if opened else ("blocks",)), "heads", "exits", "sampling"], 0.0)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args)
            finally:
                deep = part == "shallow" and args[1] >= first
                spent["deep" if deep else part] += time.perf_counter() - started

        return run

    stream = engine.stream_ids(prompt, tokens)
    next(stream)  # the prompt is read
    calls: list[tuple[Any, str, str]] = [
        (backbone, "run_all", "shallow" if opened else "blocks"),
        (backbone, "logits", "heads"),
        (Follower, "read", "exits"),
        (engine, "_choose", "sampling"),
    ]
    with ExitStack() as stack:
        for holder, name, part in calls:
            stack.enter_context(patch.object(holder, name, timed(part, getattr(holder, name))))
        started = time.perf_counter()
        count = sum(1 for _ in stream)
        whole = time.perf_counter() - started
    milliseconds = {part: 1000 * seconds / count for part, seconds in spent.items()}
    return {**milliseconds, "everything else": 1000 * whole / count - sum(milliseconds.values())}
