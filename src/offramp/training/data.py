"""The text that exits are trained on: prompts for the model to answer and plain texts, split into three parts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.errors import BadInput
from offramp.files import ASSETS, read_lines, sha256_of
from offramp.model.backbone import Backbone
from offramp.progress import Progress, silent
from offramp.training.answering import MakeShards, made_shards, write_shards
from offramp.training.config import TrainConfig
from offramp.training.loop import accelerator_for, claim, step_generator
from offramp.training.teacher import TeacherTexts, TextGroup, group_texts, read_texts

PROMPTS, CODING = ASSETS / "prompts.txt", ASSETS / "coding.jsonl"  # general ones, and those for code
MOST_FOR_GATES, MOST_HELD = 2000, 1000  # texts for gates and validation at most: more are better spent on adapters


@dataclass(frozen=True)
class Data:
    """Texts with the teacher's outputs, on disk, in three parts that share no prompt; and a record of the source files."""

    adapters: TeacherTexts
    gates: TeacherTexts
    held: TeacherTexts
    files: list[dict[str, Any]]


def gather(
    backbone: Backbone,
    config: TrainConfig,
    layers: tuple[int, ...],
    work: Path,
    progress: Progress = silent,
    plan: dict[str, Any] | None = None,
    only: str = "",
    make: MakeShards = made_shards,
) -> Data:
    """Run the model over the config's prompts and texts, and split them. Unfinished work in the folder `work` is resumed.

    Adapters, gates and validation get 7 : 2 : 1 of the texts. If there are many texts, gates and validation get a smaller
    share; `only`, "adapters" or "gates", says that the other gets a single text. There are `config.answers` answers, or
    one for each prompt. `plan` (default: the config) must be the same as when that work began. With several processes,
    each runs the model over a share of the texts. `make` makes the shards, as `made_shards` does. Raises `BadInput` for
    too few texts, and for another plan.
    """
    prompts, texts, files = _corpus(backbone, config)
    asked, temperatures = turns(prompts, config.temperatures, config.answers or len(prompts))
    groups = group_texts(asked, texts, config.answer_tokens, 48, temperatures)
    if len(asked) + len(texts) < 3:
        raise BadInput(
            f"{len(asked) + len(texts)} texts are too few to train on.", "Give at least three; a thousand is better."
        )
    weights = {"weights": backbone.source.fingerprint, "dtype": backbone.weight_format}
    claim(work, {**weights, "config": plan or asdict(config), "text": files})
    accelerator = accelerator_for(backbone.device)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    total, seen = sum(group.most_tokens for group in groups[share]), 0

    def after_group(group: TextGroup) -> None:
        nonlocal seen
        seen += group.most_tokens
        progress("reading", seen, total)

    shards = write_shards(backbone, groups, layers, work, after_group, share, make)
    accelerator.wait_for_everyone()
    return Data(*parts_of(TeacherTexts.open(shards), config.seed, only), files)


def parts_of(teacher: TeacherTexts, seed: int, only: str = "") -> tuple[TeacherTexts, TeacherTexts, TeacherTexts]:
    """The texts for adapters, for gates, and those held out, as `gather` divides them. A prompt's answers stay together."""
    groups = teacher.by_prompt()
    if len(groups) < 3:  # a few prompts, each answered often
        groups = [[index] for index in range(len(teacher))]
    order = [groups[place] for place in torch.randperm(len(groups), generator=step_generator(seed, 0)).tolist()]
    fifth, tenth = (max(1, min(most, len(teacher) // part)) for part, most in ((5, MOST_FOR_GATES), (10, MOST_HELD)))
    if only:
        fifth = 1 if only == "adapters" else len(teacher)
    held = _several(order, tenth, left=2)
    gates = _several(order, fifth, left=1)
    adapters = [index for group in order for index in group]
    return teacher.subset(adapters), teacher.subset(gates), teacher.subset(held)


def _several(groups: list[list[int]], least: int, left: int) -> list[int]:
    """Takes so many indices from the front, in whole groups; the last `left` groups stay."""
    taken: list[int] = []
    while len(taken) < least and len(groups) > left:
        taken += groups.pop(0)
    return taken


def turns(prompts: list[list[int]], temperatures: tuple[float, ...], answers: int) -> tuple[list[list[int]], list[float]]:
    """The prompts to answer and their temperatures: each prompt in turn, at each of the temperatures in turn."""
    pairs = [divmod(number, len(prompts)) for number in range(answers)] if prompts else []
    asked = [prompts[place] for _, place in pairs]
    return asked, [temperatures[(place + turn) % len(temperatures)] for turn, place in pairs]


def _corpus(backbone: Backbone, config: TrainConfig) -> tuple[list[list[int]], list[list[int]], list[dict[str, Any]]]:
    """Prompts and texts as token ids, and a record of the files they came from."""
    prompts = prompts_of(backbone, config)
    sources = [Path(config.prompts)] if config.prompts else [PROMPTS, CODING]
    record = [{"prompts": source.name, "lines": len(prompts), "sha256": sha256_of(source)} for source in sources]
    texts: list[list[int]] = []
    for path in map(Path, config.texts):
        pieces = read_texts(path, backbone)
        record.append({"text": path.name, "pieces": len(pieces), "sha256": sha256_of(path)})
        texts += pieces
    return prompts, texts, record


def lines_of(config: TrainConfig) -> list[str]:
    """The config's prompts. By default, offramp's own: those for code stand evenly among the general ones."""
    if config.prompts:
        return read_lines(Path(config.prompts), ("prompt", "question"))[: config.max_prompts]
    lists = [read_lines(path, ("prompt",)) for path in (PROMPTS, CODING)]
    placed = [((place + 0.5) / len(lines), line) for lines in lists for place, line in enumerate(lines)]
    return [line for _, line in sorted(placed)][: config.max_prompts]


def prompts_of(backbone: Backbone, config: TrainConfig) -> list[list[int]]:
    """The config's prompts as token ids."""
    return [backbone.prompts.encode(line) for line in lines_of(config)]
