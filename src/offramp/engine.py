"""The decode loop: one token at a time, block range by block range, leaving at the first exit that is sure enough.

A step embeds the newest token and runs it up to the first exit. There the gate reads the hidden state. If its
confidence is above the threshold, the read-out turns the hidden state into logits and the fill gives the skipped
blocks something to remember; otherwise the token goes on to the next exit, and at last to the top.

    embed ─ blocks ─┬─ blocks ─┬─ blocks ─ norm ─ head
                  exit 1     exit 2

Exits whose threshold is 1 never fire, so they are left out altogether: full depth costs nothing extra.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.backbone import Backbone
from offramp.errors import BadInput, BadNumbers
from offramp.exits import Exit, Exits, Memory
from offramp.fill import make_fill
from offramp.flops import Costs, exit_part
from offramp.policy import TRAINING_FREE, Policy
from offramp.state import State


@dataclass(frozen=True)
class Token:
    """One generated token. `exit_block` is the number of blocks run for its logits, `confidence` the exiting gate's."""

    id: int
    text: str
    exit_block: int
    confidence: float | None  # None at full depth
    flops: int
    cumulative_flops: int


@dataclass(frozen=True)
class Generation:
    """A finished answer and what it cost.

    `blocks` is the model's depth N; `flops_saved` is 1 − FLOPs of decoding (blocks, fills, gates, read-outs, heads) over
    full-depth decoding of the same tokens, the prefill left out of both.
    """

    text: str
    tokens: list[Token]
    blocks: int
    mean_blocks: float
    flops_saved: float
    prefill_seconds: float
    decode_tokens_per_second: float
    fill: str
    thresholds: dict[int, float]
    finish_reason: str  # "stop" or "length"

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@dataclass
class _Sequence:
    """What decoding one sequence carries from step to step."""

    ids: list[int]
    state: State
    gates: list[Memory]
    adapters: list[Memory]


class Engine:
    """Decodes with a backbone and, if given, its exits.

    `policy` defaults to the exits' own thresholds; `fill` is `project`, `copy` or `freeze` (see `offramp.fill`);
    `repetition_penalty` is the library's (1 is none). Raises `BadInput` for a policy that does not fit the exits.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits | None = None,
        policy: Policy | None = None,
        fill: str = "project",
        repetition_penalty: float = 1.0,
    ) -> None:
        from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

        self.backbone, self.fill_name = backbone, fill
        self._fill = make_fill(fill, backbone)
        policy = policy or Policy(exits.thresholds if exits else ())
        if len(policy.thresholds) != (len(exits) if exits else 0):
            raise BadInput(
                f"{len(policy.thresholds)} thresholds do not fit {len(exits) if exits else 0} exits.",
                "Give one threshold for each exit.",
            )
        if repetition_penalty <= 0:
            raise BadInput(f"A repetition penalty of {repetition_penalty} is not positive.", "1 is no penalty.")
        pairs = list(zip(exits or (), policy.thresholds, strict=True))
        self.thresholds = {exit.block: threshold for exit, threshold in pairs}
        self._open = [(exit, threshold) for exit, threshold in pairs if threshold < 1]
        self._training_free = TRAINING_FREE.get(policy.confidence)
        self._processors = LogitsProcessorList()
        if repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
        self.costs = Costs(backbone)
        self._gate_flops = [exit_part(exit.gate) for exit, _ in self._open]
        self._adapter_flops = [exit_part(exit.adapter) for exit, _ in self._open]

    def generate(self, prompt: str, max_tokens: int = 128, stop: tuple[str, ...] = (), raw: bool = False) -> Generation:
        """Answer a prompt: `stream` run to its end, with times and totals."""
        return self.generate_ids(self.backbone.encode(prompt, raw), max_tokens, stop)

    def generate_ids(self, ids: list[int], max_tokens: int = 128, stop: tuple[str, ...] = ()) -> Generation:
        """`generate` from token ids."""
        started = time.perf_counter()
        stream = self.stream_ids(ids, max_tokens, stop)
        next(stream)
        prefilled = time.perf_counter()
        tokens = [token for token in stream if token is not None]
        seconds = time.perf_counter() - prefilled
        return self.summarise(tokens, len(ids), max_tokens, prefilled - started, seconds)

    def stream(self, prompt: str, max_tokens: int = 128, stop: tuple[str, ...] = (), raw: bool = False) -> Iterator[Token]:
        """Yield tokens as they are decided, greedily, until an end-of-text token, a stop string or `max_tokens`.

        A token's text may be empty and come with a later one: a character can span tokens, and text that may turn out
        to begin a stop string is held back. Raises `BadInput` (empty prompt, prompt beyond the context) and
        `BadNumbers` (NaN logits).
        """
        ids = self.backbone.encode(prompt, raw)
        return (token for token in self.stream_ids(ids, max_tokens, stop) if token is not None)

    @torch.inference_mode()
    def stream_ids(self, ids: list[int], max_tokens: int = 128, stop: tuple[str, ...] = ()) -> Iterator[Token | None]:
        """`stream` from token ids; yields None once, when the prompt has been prefilled."""
        self.backbone.check_prompt(ids)
        if max_tokens < 1:
            raise BadInput(f"{max_tokens} tokens cannot be generated.", "Give --max-tokens 1 or more.")
        max_tokens = min(max_tokens, self.backbone.context - len(ids))
        sequence = self._prefill(ids, len(ids) + max_tokens)
        yield None
        text = _Text(self.backbone.tokenizer, stop)
        total, ends = 0, self.backbone.stop_ids
        for left in range(max_tokens - 1, -1, -1):
            logits, exit_block, confidence, flops = self._step(sequence)
            chosen = self._choose(logits, sequence.ids)
            sequence.ids.append(chosen)
            total += flops
            ended = chosen in ends
            piece = text.push(chosen, last=ended or left == 0)
            yield Token(chosen, piece, exit_block, confidence, flops, total)
            if ended or text.stopped:
                return

    def summarise(
        self, tokens: list[Token], prompt_length: int, max_tokens: int, prefill_seconds: float, decode_seconds: float
    ) -> Generation:
        """Totals for tokens that `stream_ids` gave after a prompt of `prompt_length` tokens."""
        full = sum(self.costs.full(prompt_length + index) for index in range(len(tokens)))
        stopped = len(tokens) < max_tokens or tokens[-1].id in self.backbone.stop_ids
        return Generation(
            text="".join(token.text for token in tokens),
            tokens=tokens,
            blocks=self.backbone.n_blocks,
            mean_blocks=sum(token.exit_block for token in tokens) / len(tokens),
            flops_saved=1 - tokens[-1].cumulative_flops / full,
            prefill_seconds=prefill_seconds,
            decode_tokens_per_second=len(tokens) / decode_seconds,
            fill=self.fill_name,
            thresholds=self.thresholds,
            finish_reason="stop" if stopped else "length",
        )

    def _prefill(self, ids: list[int], capacity: int) -> _Sequence:
        """All of the prompt but its last token, at full depth; gates and read-outs that remember see it too."""
        backbone = self.backbone
        sequence = _Sequence(list(ids), backbone.state(capacity), [None] * len(self._open), [None] * len(self._open))
        if len(ids) == 1:
            return sequence
        h, step = backbone.embed(torch.tensor([ids[:-1]], device=backbone.device))
        done = 0
        for index, (exit, _) in enumerate(self._open):
            h = backbone.run(h, done, exit.block, sequence.state, step)
            done = exit.block
            if exit.recurrent_gate and self._training_free is None:
                _, sequence.gates[index] = exit.gate(h.float())
            if exit.recurrent_adapter:
                _, sequence.adapters[index] = exit.adapter(h.float())
        backbone.run(h, done, backbone.n_blocks, sequence.state, step)
        return sequence

    def _step(self, sequence: _Sequence) -> tuple[Tensor, int, float | None, int]:
        """Run the newest token until it leaves: its logits (V,), blocks run, the exiting confidence, FLOPs."""
        backbone, position = self.backbone, len(sequence.ids) - 1
        h, step = backbone.embed(torch.tensor([[sequence.ids[-1]]], device=backbone.device), position)
        done = flops = 0
        for index, (exit, threshold) in enumerate(self._open):
            h = backbone.run(h, done, exit.block, sequence.state, step)
            flops += sum(self.costs.block(block, position + 1) for block in range(done, exit.block))
            done = exit.block
            confidence, logits, spent = self._consider(index, exit, threshold, h, sequence)
            flops += spent
            if logits is not None:
                self._fill(h, done, sequence.state, step)
                return self._finite(logits), done, confidence, flops + self._fill.flops(done, self.costs)
        h = backbone.run(h, done, backbone.n_blocks, sequence.state, step)
        flops += sum(self.costs.block(block, position + 1) for block in range(done, backbone.n_blocks))
        return self._finite(backbone.logits(h)[0, 0]), backbone.n_blocks, None, flops + self.costs.head

    def _consider(
        self, index: int, exit: Exit, threshold: float, h: Tensor, sequence: _Sequence
    ) -> tuple[float, Tensor | None, int]:
        """Confidence of an exit for h (1, 1, D); its logits (V,) if the token leaves here; the FLOPs spent on both.

        A part with a memory sees every token that gets here; one without is run only when it is needed.
        """
        x, flops, adapted = h.float(), 0, None
        if exit.recurrent_adapter or self._training_free is not None:
            adapted, sequence.adapters[index] = exit.adapter(x, sequence.adapters[index])
            flops += self._adapter_flops[index]
        if self._training_free is not None and adapted is not None:
            logits = self._read_out(adapted, h)
            confidence = float(self._training_free(logits))
            return confidence, logits if confidence > threshold else None, flops + self.costs.head
        score, sequence.gates[index] = exit.gate(x, sequence.gates[index])
        flops += self._gate_flops[index]
        confidence = float(score.sigmoid())
        if not confidence > threshold:
            return confidence, None, flops
        if adapted is None:
            adapted, _ = exit.adapter(x)
            flops += self._adapter_flops[index]
        return confidence, self._read_out(adapted, h), flops + self.costs.head

    def _read_out(self, adapted: Tensor, h: Tensor) -> Tensor:
        return self.backbone.logits(adapted.to(h.dtype))[0, 0]

    def _finite(self, logits: Tensor) -> Tensor:
        if not torch.isfinite(logits.amax()):
            raise BadNumbers(
                f"{self.backbone.name} gave NaN or infinite logits in {self.backbone.weight_format}.",
                "Try --dtype float32; if that fails too, the weights are damaged: fetch them again.",
            )
        return logits

    def _choose(self, logits: Tensor, ids: list[int]) -> int:
        if self._processors:
            logits = self._processors(torch.tensor([ids], device=logits.device), logits[None])[0]
        return int(logits.argmax())


class _Text:
    """Token ids → text, piece by piece: whole characters only, and nothing that may begin a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(string for string in stop if string)
        self._ids: list[int] = []
        self._sent = ""
        self.stopped = False

    def push(self, token: int, last: bool) -> str:
        self._ids.append(token)
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        ends = [at for string in self._stop if (at := text.find(string)) >= 0]
        if ends:
            text, self.stopped = text[: min(ends)], True
        elif not last:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - self._held(text)]
        piece = text[len(self._sent) :]
        self._sent += piece
        return piece

    def _held(self, text: str) -> int:
        longest = 0
        for string in self._stop:
            for size in range(min(len(string) - 1, len(text)), 0, -1):
                if text.endswith(string[:size]):
                    longest = max(longest, size)
                    break
        return longest
