"""What exits do to answers: a task's scores, consistency with the full model, and costs.

Every condition (a fill and a policy) answers the same questions as full depth does. Each answer is written at once, so that
an interrupted run resumes where it stopped. The outcome of a condition is a `Result`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from offramp.decode.engine import Engine
from offramp.decode.fills import fill_named
from offramp.decode.request import Generation
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput, CorruptFile
from offramp.evaluation.likelihood import Forced, log_likelihoods
from offramp.evaluation.results import (
    ConditionInfo,
    ModelInfo,
    Result,
    Scored,
    ScoredAnswer,
    ScoredChoice,
    TaskInfo,
    summary,
)
from offramp.evaluation.task import Item, Task
from offramp.evaluation.tasks import choices, rouge_l, score_choices
from offramp.exits.exits import Exits
from offramp.exits.policy import Policy
from offramp.files import sha256_of_text, write_atomically
from offramp.machine import machine, peak_memory
from offramp.metrics import token_f1
from offramp.model.backbone import Backbone
from offramp.progress import Progress, silent


@dataclass(frozen=True)
class Condition:
    """How to decode: with these exits, this fill and this policy.

    A policy of None is the exits' own. Without exits, it is full depth, or drafts come from the text alone. `label` says
    which exits these are, where several kinds are compared. Raises `BadInput` for an unknown fill.
    """

    fill: str = "project"
    policy: Policy | None = None
    exits: Exits | None = None
    label: str = ""

    def __post_init__(self) -> None:
        fill_named(self.fill)

    @property
    def used_policy(self) -> Policy | None:
        """The policy in use; None without exits."""
        return (self.policy or self.exits.policy) if self.exits else None

    @property
    def name(self) -> str:
        """The condition in words: the exits' label, fill, policy, and who chose the policy."""
        if self.exits is None or self.used_policy is None:
            return f"{self.fill}, drafts from the text" if fill_named(self.fill).verifies else "full depth"
        chosen_by = "" if self.policy else ", calibrated" if self.exits.calibration else ", by default"
        words = f"{self.fill}, {self.used_policy.describe(self.exits.config.gate)}{chosen_by}"
        return f"{self.label}: {words}" if self.label else words

    @property
    def info(self) -> ConditionInfo:
        """The condition as a Result keeps it."""
        if self.exits is None:
            fill = self.fill if fill_named(self.fill).verifies else None
            return ConditionInfo(self.name, fill, None, None, None, "")
        long = {"tested", "untested", "pilot_hashes"}
        calibration = {name: value for name, value in self.exits.calibration.items() if name not in long}
        own = calibration if self.policy is None else None
        return ConditionInfo(self.name, self.fill, self.exits.config.gate, self.used_policy, own, self.label)

    def engine(self, backbone: Backbone, sampling: Sampling | None = None) -> Engine:
        """An engine that decodes under this condition."""
        return Engine(backbone, self.exits, self.policy, self.fill, sampling)

    def scorer(self, backbone: Backbone, forced: Forced) -> Engine:
        """An engine for likelihoods. It reads out all tokens, because a token that is not a candidate has no likelihood."""
        policy = replace(self.used_policy, candidates=0, exit_candidates=0) if self.used_policy else None
        return Engine(backbone, self.exits, policy, self.fill, forced)


@dataclass(frozen=True)
class Answer:
    """An answer as it is kept until its run is over.

    `exits`: the block that each token left at; `blocks`: all blocks that were run; `flops`: those of decoding;
    `prefill_flops`: those of the prompt.
    """

    ids: list[int]
    text: str
    pieces: list[str]
    exits: list[int]
    blocks: int
    flops: int
    flops_saved: float
    prefill_flops: int
    prefill_seconds: float
    decode_seconds: float

    @classmethod
    def of(cls, engine: Engine, prompt_length: int, answer: Generation) -> Answer:
        """From the engine's answer to a prompt of `prompt_length` tokens."""
        costs = engine.plan.costs
        blocks = sum(costs.full(context) - costs.head for context in range(1, prompt_length))
        return cls(
            ids=answer.ids,
            text=answer.text,
            pieces=[token.text for token in answer.tokens],
            exits=[token.exit_block for token in answer.tokens],
            blocks=sum(token.blocks for token in answer.tokens),
            flops=answer.tokens[-1].cumulative_flops,
            flops_saved=answer.flops_saved,
            prefill_flops=blocks + (prompt_length - 1) * engine.plan.prefill_flops,
            prefill_seconds=answer.prefill_seconds,
            decode_seconds=len(answer.tokens) / answer.decode_tokens_per_second,
        )

    def compared(self, full: Answer) -> dict[str, float]:
        """The measures of a Result: how this answer compares with full depth's, and what it cost."""
        tokens = len(self.ids)
        return {
            "token_f1": token_f1(self.ids, full.ids),
            "same_answer": float(self.ids == full.ids),
            "rouge_l": 1.0 if self.text == full.text else rouge_l(full.text, self.text),
            "mean_blocks": self.blocks / tokens,
            "flops_saved": self.flops_saved,
            "flops_per_token": self.flops / tokens,
            "flops_per_request": self.flops + self.prefill_flops,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens": float(tokens),
        }


@dataclass(frozen=True)
class Likelihoods:
    """The log-likelihoods (nats) of a question's right and wrong answers, as they are kept until their run is over."""

    right: list[float]
    wrong: list[float]

    @property
    def choice(self) -> int:
        """The place of the likeliest answer, the right ones first."""
        return int(np.argmax([*self.right, *self.wrong]))


Kept = Answer | Likelihoods


class AnswerFile:
    """The answers to a task's questions under a condition, kept in `file`.

    Raises `CorruptFile` for a damaged file.
    """

    def __init__(self, condition: Condition, task: Task, file: Path) -> None:
        self.condition, self.task, self.file = condition, task, file
        self._kept = _read(file, Likelihoods if task.multiple_choice else Answer)

    @property
    def missing(self) -> list[Item]:
        """The questions without an answer."""
        return [item for item in self.task.items if item.id not in self._kept]

    @property
    def in_order(self) -> list[Kept]:
        """The answers in the order of the questions. Raises `KeyError` where one is missing."""
        return [self._kept[item.id] for item in self.task.items]

    def add(self, made: Iterable[tuple[str, Kept]], progress: Progress = silent) -> None:
        """Keep answers by their questions' ids. Each is written at once; one that is there already stays as it is."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        progress(self.condition.name, len(self._kept), len(self.task.items))
        for id, answer in made:
            if id in self._kept:
                continue
            self._kept[id] = answer
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"id": id, **asdict(answer)}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            progress(self.condition.name, len(self._kept), len(self.task.items))


@dataclass
class Evaluation:
    """One task on one model.

    `work` is the folder where answers are kept. `batch`: the most answers side by side, fewer where their memory would be
    too large; their times are then shares of the batch's.
    """

    backbone: Backbone
    task: Task
    work: Path
    batch: int = 1
    seed: int = 0
    command: str = ""
    progress: Progress = silent
    _answers: dict[Path, AnswerFile] = field(default_factory=dict, init=False)

    def run(self, condition: Condition) -> Result:
        """Answer the questions under a condition. The first call also answers them at full depth.

        Raises `BadInput` for a task without questions, `CorruptFile` for damaged work. A prompt that does not fit loses its
        beginning.
        """
        if not self.task.items:
            raise BadInput(f"There are no questions for {self.task.name}.", "Give --limit 1 or more, or other --data.")
        task, exits = self.task, condition.exits
        full, answers = parts = self.answers([condition])
        for part in (part for part in parts if part.missing):
            part.add(answered(part.condition, task, self.batch, self.backbone, part.missing), self.progress)
        items = [self._scored(*triple) for triple in zip(task.items, answers.in_order, full.in_order, strict=True)]
        blocks = Counter(block for item in items if isinstance(item, ScoredAnswer) for block in item.exits)
        return Result(
            command=self.command,
            seed=self.seed,
            machine=machine(),
            model=_info(self.backbone),
            exits=_exits_record(exits) if exits else None,
            condition=condition.info,
            task=_task_info(task, self.batch),
            blocks=self.backbone.n_blocks,
            summary=summary(items, self.seed),
            exit_histogram=dict(sorted(blocks.items())),
            peak_memory_bytes=peak_memory(),
            items=items,
        )

    def _scored(self, item: Item, answer: Kept, full: Kept) -> Scored:
        """An answer with its scores, and how it compares with the full model's."""
        if isinstance(answer, Likelihoods):
            assert isinstance(full, Likelihoods)
            same = {"same_choice": float(answer.choice == full.choice)}
            return ScoredChoice(item.id, answer.right, answer.wrong, score_choices(answer.right, answer.wrong), same)
        assert isinstance(full, Answer)
        return ScoredAnswer(
            id=item.id,
            question=item.question,
            text=answer.text,
            pieces=answer.pieces,
            exits=answer.exits,
            full_text=full.text,
            scores=to_six_digits(self.task.score(answer.text.strip(), item)),
            measures=to_six_digits(answer.compared(full)),
        )

    def answers(self, conditions: Sequence[Condition]) -> list[AnswerFile]:
        """The answers so far: those of full depth, then those under each of the conditions."""
        found = []
        for condition in (Condition(), *conditions):
            file = self.work / f"{self._fingerprint(condition)}.jsonl"
            if file not in self._answers:
                self._answers[file] = AnswerFile(condition, self.task, file)
            found.append(self._answers[file])
        return found

    @property
    def files(self) -> list[Path]:
        """Where this run's answers are kept."""
        return list(self._answers)

    def _fingerprint(self, condition: Condition) -> str:
        """A hash of all that an answer and its times depend on."""
        exits, policy = condition.exits, condition.used_policy
        parts = [
            self.backbone.source.fingerprint,
            self.backbone.weight_format,
            [exits and fingerprint(exits), asdict(policy) if policy else None, condition.fill],
            [asdict(_task_info(self.task, self.batch)), self.task.stop],
            [item.prompt for item in self.task.items],
            {name: value for name, value in machine().items() if name != "date"},
        ]
        return sha256_of_text(json.dumps(parts))[:16]


def answered(
    condition: Condition, task: Task, batch: int, backbone: Backbone, items: Sequence[Item]
) -> Iterator[tuple[str, Kept]]:
    """Answer questions of a task under a condition, at most `batch` side by side → each one's id and answer."""
    if task.multiple_choice:
        return _likelihoods(condition, backbone, items)
    return _generations(condition, task, batch, backbone, items)


def _generations(
    condition: Condition, task: Task, batch: int, backbone: Backbone, items: Sequence[Item]
) -> Iterator[tuple[str, Kept]]:
    engine = condition.engine(backbone, Sampling(repetition_penalty=task.repetition_penalty))
    prompts = [_encode(backbone, item, task) for item in items]
    for index, answer in engine.answers(prompts, batch, max_tokens=task.max_tokens, stop=task.stop):
        yield items[index].id, Answer.of(engine, len(prompts[index]), answer)


def _encode(backbone: Backbone, item: Item, task: Task) -> list[int]:
    """The prompt's token ids. A beginning that would leave no room for the answer is cut off (CoQA's stories)."""
    ids = backbone.prompts.encode(item.prompt) if task.chat else list(backbone.tokenizer(item.prompt)["input_ids"])
    return ids[-max(1, backbone.context - task.max_tokens) :]


def _likelihoods(condition: Condition, backbone: Backbone, items: Sequence[Item]) -> Iterator[tuple[str, Kept]]:
    forced = Forced()
    engine = condition.scorer(backbone, forced)
    for item in items:
        right, wrong = choices(item)
        values = log_likelihoods(engine, forced, item.prompt, [f" {answer}" for answer in (*right, *wrong)])
        yield item.id, Likelihoods(values[: len(right)], values[len(right) :])


def _task_info(task: Task, batch: int) -> TaskInfo:
    questions, penalty = len(task.items), task.repetition_penalty
    return TaskInfo(task.name, questions, task.source, task.sha256, task.note, task.max_tokens, batch, penalty)


def _info(backbone: Backbone) -> ModelInfo:
    return ModelInfo(backbone.name, backbone.source.fingerprint, backbone.weight_format)


def _exits_record(exits: Exits) -> dict[str, Any]:
    places = {"layers": list(exits.config.layers), "tails": list(exits.config.tails)}
    return {**asdict(exits.config), **places, "training": exits.training.get("command", "")}


def to_six_digits(values: dict[str, float]) -> dict[str, float]:
    """Values without the digits that nothing was measured to, which take a fifth of a file of Results."""
    return {name: float(f"{value:.6g}") for name, value in values.items()}


def fingerprint(exits: Exits) -> str:
    """SHA-256 of the exits' config and weights, whatever their record says."""
    digest = sha256(json.dumps(asdict(exits.config)).encode())
    for part in (*exits.modules.state_dict().values(), *(exits.sketch or ())):
        digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, kind: type[Kept]) -> dict[str, Kept]:
    """Answers by their question's id. Half a line at the end, from an interrupted run, is dropped."""
    if not file.exists():
        return {}
    whole, _, rest = file.read_text("utf-8").rpartition("\n")
    if rest:
        write_atomically(file, (whole + "\n" if whole else "").encode())
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        return {record.pop("id"): kind(**record) for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(
            f"The answers kept in {file} are damaged: {error!r}.", "Delete the file and run again."
        ) from error
