"""Log-likelihoods of given texts. Tokens leave at exits as they do in decoding."""

from __future__ import annotations

from torch import Tensor

from offramp.decode.engine import Engine
from offramp.decode.request import Talk


class Forced:
    """An engine's `sampling` that chooses given tokens whatever the logits are, and notes their log-probabilities."""

    def __init__(self) -> None:
        self.start = 0
        self.tokens: list[int] = []
        self.logp: dict[int, float] = {}
        self._best: dict[int, bool] = {}

    def begin(self, start: int, tokens: list[int]) -> None:
        """Choose these tokens next, after the first `start` tokens of a text."""
        self.start, self.tokens, self.logp, self._best = start, tokens, {}, {}

    @property
    def best(self) -> bool:
        """Whether every token was the most probable one."""
        return all(self._best.values())

    def __call__(self, logits: Tensor, ids: list[int]) -> int:
        position = len(ids) - self.start
        token = self.tokens[position]
        # With `verify`, full depth decides a position after the exit did: the last call counts.
        self.logp[position] = float(logits.log_softmax(-1)[token])
        self._best[position] = int(logits.argmax()) == token
        return token


def log_likelihoods(engine: Engine, forced: Forced, prompt: str, continuations: list[str]) -> list[float]:
    """log P(continuation | prompt) of each continuation, in nats, by an engine whose `sampling` is `forced`.

    Tokens leave at exits as in decoding. The prompt is read once; if it is too long, it loses its beginning.
    """
    tokenizer = engine.backbone.tokenizer
    before = list(tokenizer(prompt)["input_ids"])
    whole_texts = [list(tokenizer(prompt + continuation)["input_ids"]) for continuation in continuations]
    tokens = [ids[len(before) :] for ids in whole_texts]
    before = before[-max(1, engine.backbone.context - max(map(len, tokens))) :]
    talks = engine.forked(before, len(tokens))
    return [log_likelihood_of(engine, forced, before, ids, talk) for ids, talk in zip(tokens, talks, strict=True)]


def log_likelihood_of(
    engine: Engine, forced: Forced, before: list[int], tokens: list[int], talk: Talk | None = None
) -> float:
    """log P(tokens | before) in nats, from token ids. A prompt that is too long loses its beginning."""
    before = before[-max(1, engine.backbone.context - len(tokens)) :]
    forced.begin(len(before), tokens)
    if not tokens:
        return 0.0
    for _ in engine.stream(before, talk, max_tokens=len(tokens), end_ids=frozenset()):
        pass
    return sum(forced.logp.values())
