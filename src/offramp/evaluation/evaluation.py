"""What exits do to answers: a task's scores, beside consistency with the full model and what it cost.

Every condition (a fill and a policy) answers the same questions as full depth does, one by one or some side by side, and
each answer is kept at once, so that an interrupted run goes on. A Result holds the answers, their means with 95% intervals
(bootstrap over questions), and everything that is needed to run it again; Results are kept as JSON.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import resource
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from offramp.decode.engine import Engine
from offramp.decode.request import Generation, Talk
from offramp.errors import BadInput, CorruptFile
from offramp.evaluation.tasks import Item, Task, choices, rouge_l, score_choices
from offramp.exits.exits import Exits
from offramp.exits.policy import Policy
from offramp.files import write_atomically
from offramp.machine import machine
from offramp.metrics import token_f1
from offramp.model.backbone import Backbone
from offramp.progress import Progress, silent

RESAMPLES = 1000


@dataclass(frozen=True)
class Condition:
    """How to decode: with which fill and policy; a policy of None is the exits' own, and without exits full depth."""

    fill: str = "project"
    policy: Policy | None = None
    exits: Exits | None = None

    @property
    def name(self) -> str:
        if self.exits is None:
            return "full depth"
        policy = self.policy or self.exits.policy
        thresholds = " ".join("closed" if one >= 1 else f"{one:g}" for one in policy.thresholds)
        gate = self.exits.config.gate if policy.confidence == "gate" else policy.confidence
        decay = f", decay {policy.decay:g}" if policy.decay else ""
        candidates = f", {policy.candidates:,} candidates" if policy.candidates else ""
        own = "" if self.policy else ", calibrated" if self.exits.calibration else ", by default"
        return f"{self.fill}, {gate}, {thresholds}{decay}{candidates}{own}"

    def engine(self, backbone: Backbone) -> Engine:
        return Engine(backbone, self.exits, self.policy, self.fill if self.exits else "project")

    def scorer(self, backbone: Backbone, forced: Forced) -> Engine:
        """For likelihoods: with the whole head, since a token that is no candidate has none."""
        policy = replace(self.policy or self.exits.policy, candidates=0) if self.exits else None
        return Engine(backbone, self.exits, policy, self.fill if self.exits else "project", forced)


@dataclass
class Evaluation:
    """One task on one model. `work` is where answers are kept; `reference`: compare with this model's full depth instead.

    `batch`: answers side by side; their times are then shares of the batch's.
    """

    backbone: Backbone
    task: Task
    work: Path
    reference: Backbone | None = None
    batch: int = 1
    seed: int = 0
    command: str = ""
    progress: Progress = silent
    files: list[Path] = field(default_factory=list)  # where this one's answers are kept
    _full: list[dict[str, Any]] = field(default_factory=list)

    def run(self, condition: Condition) -> dict[str, Any]:
        """A condition's Result, as it is written to a file. The first one also has full depth answer.

        Raises `BadInput` for a task without questions, `CorruptFile` for damaged work. A prompt that does not fit loses its
        beginning.
        """
        if not self.task.items:
            raise BadInput(f"There are no questions for {self.task.name}.", "Give --limit 1 or more, or other --data.")
        if not self._full:
            self._full = self._answers(Condition(), self.reference or self.backbone)
        given = self._answers(condition, self.backbone)
        items = [self._compared(*three) for three in zip(self.task.items, given, self._full, strict=True)]
        exits = condition.exits
        return {
            "offramp": "result",
            "command": self.command,
            "seed": self.seed,
            "machine": machine(),
            "model": self._named(self.backbone),
            "reference": self._named(self.reference or self.backbone),
            "exits": None if exits is None else {**asdict(exits.config), "training": exits.training.get("command", "")},
            "condition": {
                "name": condition.name,
                "fill": condition.fill if exits else None,
                "gate": exits.config.gate if exits else None,
                "policy": asdict(condition.policy or exits.policy) if exits else None,
                "calibration": _short(exits.calibration) if exits and condition.policy is None else None,
            },
            "task": {
                "name": self.task.name,
                "questions": len(items),
                "source": self.task.source,
                "sha256": self.task.sha256,
                "note": self.task.note,
                "max_tokens": self.task.max_tokens,
                "batch": self.batch,
            },
            "blocks": self.backbone.n_blocks,
            "summary": summary(items, self.seed),
            "exit_histogram": dict(sorted(Counter(block for one in items for block in one.get("exits", ())).items())),
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "items": items,
        }

    def _named(self, backbone: Backbone) -> dict[str, str]:
        return {"name": backbone.name, "sha256": backbone.source.sha256, "weights": backbone.weight_format}

    def _compared(self, item: Item, given: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
        """One answer with its scores, and how it compares with the full model's."""
        if self.task.multiple_choice:
            scores = score_choices(given["right"], given["wrong"])
            same = [float(np.argmax([*one["right"], *one["wrong"]])) for one in (given, full)]
            return {"id": item.id, **given, "scores": scores, "measures": {"same_choice": float(same[0] == same[1])}}
        tokens = len(given["ids"])
        return {
            "id": item.id,
            "question": item.question,
            "text": given["text"],
            "pieces": given["pieces"],
            "exits": given["exits"],
            "full_text": full["text"],
            "scores": self.task.score(given["text"].strip(), item),
            "measures": {
                "token_f1": token_f1(given["ids"], full["ids"]),
                "same_answer": float(given["ids"] == full["ids"]),
                "rouge_l": 1.0 if given["text"] == full["text"] else rouge_l(full["text"], given["text"]),
                "mean_blocks": sum(given["exits"]) / tokens,
                "flops_saved": given["flops_saved"],
                "flops_per_token": given["flops"] / tokens,
                "flops_per_request": given["flops"] + given["prefill_flops"],
                "prefill_seconds": given["prefill_seconds"],
                "decode_seconds": given["decode_seconds"],
                "tokens": float(tokens),
            },
        }

    def _answers(self, condition: Condition, backbone: Backbone) -> list[dict[str, Any]]:
        """An answer to each question: those that are kept already, and the others now."""
        file = self.work / f"{self._mark(condition, backbone)}.jsonl"
        self.files.append(file)
        kept = _read(file)
        missing = [item for item in self.task.items if item.id not in kept]
        answer = self._choices if self.task.multiple_choice else self._generations
        self.work.mkdir(parents=True, exist_ok=True)
        self.progress(condition.name, len(kept), len(self.task.items))
        for id, record in answer(condition, backbone, missing):
            kept[id] = record
            with file.open("a") as stream:
                stream.write(json.dumps({"id": id, **record}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            self.progress(condition.name, len(kept), len(self.task.items))
        return [kept[item.id] for item in self.task.items]

    def _mark(self, condition: Condition, backbone: Backbone) -> str:
        """Names what an answer and its times depend on."""
        exits = condition.exits
        policy = (condition.policy or exits.policy) if exits else None
        what = [
            backbone.source.sha256,
            backbone.weight_format,
            exits and [fingerprint(exits), asdict(policy) if policy else None, condition.fill],
            [self.task.name, self.task.sha256, self.task.max_tokens, self.task.stop, self.batch],
            [item.prompt for item in self.task.items],
            {name: value for name, value in machine().items() if name != "date"},
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def _generations(
        self, condition: Condition, backbone: Backbone, items: list[Item]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        engine = condition.engine(backbone)
        for start in range(0, len(items), self.batch):
            some = items[start : start + self.batch]
            ids = [self._encode(backbone, item) for item in some]
            answers = engine.generate_batch(ids, max_tokens=self.task.max_tokens, stop=self.task.stop)
            for item, prompt, answer in zip(some, ids, answers, strict=True):
                yield item.id, _record(engine, len(prompt), answer, len(some))

    def _encode(self, backbone: Backbone, item: Item) -> list[int]:
        """The prompt, its beginning cut off where it would not leave room for the answer (CoQA's stories)."""
        ids = list(backbone.tokenizer(item.prompt)["input_ids"])
        return ids[-max(1, backbone.context - self.task.max_tokens) :]

    def _choices(self, condition: Condition, backbone: Backbone, items: list[Item]) -> Iterator[tuple[str, dict[str, Any]]]:
        forced = Forced()
        engine = condition.scorer(backbone, forced)
        for item in items:
            right, wrong = choices(item)
            found = log_likelihoods(engine, forced, item.prompt, [f" {answer}" for answer in (*right, *wrong)])
            yield item.id, {"right": found[: len(right)], "wrong": found[len(right) :]}


class Forced:
    """Chooses the tokens it was given, whatever the logits, and notes their log-probabilities: an engine's `sampling`."""

    def __init__(self) -> None:
        self.start, self.tokens, self.logp, self._best = 0, list[int](), dict[int, float](), dict[int, bool]()

    def begin(self, start: int, tokens: list[int]) -> None:
        self.start, self.tokens, self.logp, self._best = start, tokens, {}, {}

    @property
    def best(self) -> bool:
        """Whether every token was the likeliest one."""
        return all(self._best.values())

    def __call__(self, logits: Tensor, ids: list[int]) -> int:
        place = len(ids) - self.start
        token = self.tokens[place]
        # With `verify`, full depth judges a draft's place after the exit did: the last word counts.
        self.logp[place] = float(logits.log_softmax(-1)[token])
        self._best[place] = int(logits.argmax()) == token
        return token


def log_likelihoods(engine: Engine, forced: Forced, prompt: str, continuations: list[str]) -> list[float]:
    """log P(continuation | prompt) of each, in nats, by an engine that decodes with `forced`.

    Exits leave as they would decoding. The prompt is read once.
    """
    tokenizer = engine.backbone.tokenizer
    before = list(tokenizer(prompt)["input_ids"])
    wholes = [list(tokenizer(prompt + continuation)["input_ids"]) for continuation in continuations]
    tokens = [whole[len(before) :] for whole in wholes]
    before = before[-max(1, engine.backbone.context - max(map(len, tokens))) :]
    talks = engine.forked(before, len(tokens))
    return [log_likelihood_of(engine, forced, before, some, talk) for some, talk in zip(tokens, talks, strict=True)]


def log_likelihood_of(
    engine: Engine, forced: Forced, before: list[int], tokens: list[int], talk: Talk | None = None
) -> float:
    """One of `log_likelihoods`, from token ids; a prompt that is too long loses its beginning."""
    before = before[-max(1, engine.backbone.context - len(tokens)) :]
    forced.begin(len(before), tokens)
    if not tokens:
        return 0.0
    for _ in engine.stream(before, talk, max_tokens=len(tokens), end_ids=frozenset()):
        pass
    return sum(forced.logp.values())


def summary(items: list[dict[str, Any]], seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean and 95% interval of every score and measure, by bootstrap (percentiles of 1,000 resamples).

    Resampled are the items, or where they belong together (turns of a conversation: what is before the "/" of their ids)
    all of a group at once; of one group alone, its items. `tokens_per_second`: all tokens after all decoding time.
    """
    weights = _resampled([one["id"] for one in items], seed)
    columns = {
        name: np.array([one[kind][name] for one in items]) for kind in ("scores", "measures") for name in items[0][kind]
    }
    found = {name: _interval(values.mean(), weights @ values / weights.sum(1)) for name, values in columns.items()}
    if "decode_seconds" in columns:
        tokens, seconds = columns["tokens"], columns["decode_seconds"]
        found["tokens_per_second"] = _interval(tokens.sum() / seconds.sum(), weights @ tokens / (weights @ seconds))
    return found


def _resampled(ids: list[str], seed: int) -> np.ndarray[Any, Any]:
    """How often each item is in each resample, (RESAMPLES, n)."""
    _, groups = np.unique([id.partition("/")[0] for id in ids], return_inverse=True)
    if len(ids) > 1 and not groups.any():  # one group says nothing about others
        groups = np.arange(len(ids))
    count = int(groups.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.asarray(drawn[:, groups], dtype=float)


def difference(items: list[dict[str, Any]], others: list[dict[str, Any]], name: str, seed: int = 0) -> dict[str, float]:
    """How much larger a score or measure is in `items` than in `others`, on the same questions: paired bootstrap."""
    kind = "scores" if name in items[0]["scores"] else "measures"
    theirs = {one["id"]: one[kind][name] for one in others}
    gaps = np.array([one[kind][name] - theirs[one["id"]] for one in items])
    weights = _resampled([one["id"] for one in items], seed)
    return _interval(gaps.mean(), weights @ gaps / weights.sum(1))


def _interval(mean: float, resampled: np.ndarray[Any, Any]) -> dict[str, float]:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def save_results(results: list[dict[str, Any]], file: Path) -> None:
    write_atomically(file, json.dumps({"results": results}, indent=1, ensure_ascii=False).encode())


_KEYS = {
    "command",
    "seed",
    "machine",
    "model",
    "reference",
    "exits",
    "condition",
    "task",
    "blocks",
    "summary",
    "items",
    "peak_memory_bytes",
}


def load_results(files: list[Path]) -> list[dict[str, Any]]:
    """The Results in some files that `offramp eval` wrote, perhaps packed with xz. Raises `BadInput` for others."""
    found: list[dict[str, Any]] = []
    for file in files:
        try:
            content = file.read_bytes()
            results = json.loads(lzma.decompress(content) if file.suffix == ".xz" else content)["results"]
            if not all(one["offramp"] == "result" and _KEYS.issubset(one) for one in results):
                raise KeyError("offramp")
        except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{file} holds no results: {error!r}.", "Name a file that offramp eval wrote.") from error
        found += results
    return found


def _record(engine: Engine, prompt_length: int, answer: Generation, batch: int) -> dict[str, Any]:
    costs = engine.costs
    return {
        "ids": answer.ids,
        "text": answer.text,
        "pieces": [token.text for token in answer.tokens],
        "exits": [token.exit_block for token in answer.tokens],
        "flops": answer.tokens[-1].cumulative_flops,
        "flops_saved": answer.flops_saved,
        "prefill_flops": sum(costs.full(context) - costs.head for context in range(1, prompt_length))
        + (prompt_length - 1) * engine.prefill_flops,
        "prefill_seconds": answer.prefill_seconds / batch,
        "decode_seconds": len(answer.tokens) / answer.decode_tokens_per_second / batch,
    }


def fingerprint(exits: Exits) -> str:
    """Of the exits' weights, whatever their record says."""
    digest = hashlib.sha256(json.dumps(asdict(exits.config)).encode())
    for part in (*exits.modules.state_dict().values(), *(exits.sketch or ())):
        digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Answers by their question's id; half a line at the end, of a run that was cut off, is not one."""
    if not file.exists():
        return {}
    whole, _, rest = file.read_text().rpartition("\n")
    if rest:
        write_atomically(file, (whole + "\n" if whole else "").encode())
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        return {record.pop("id"): record for record in records}
    except (ValueError, KeyError) as error:
        raise CorruptFile(
            f"The answers kept in {file} are damaged: {error!r}.", "Delete the file and run again."
        ) from error


def _short(calibration: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in calibration.items() if name != "tested"}
