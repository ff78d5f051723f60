"""What exits learn from: the backbone's hidden states and final distributions over text, kept in shards on disk.

Most of the text is the model's own answers to prompts, which is what it will decode later. Plain texts can be added.
Answers are decoded greedily in batches of prompts that are equally long, so that no padding exists. The hidden states
are kept as decoding computes them, so nothing is computed twice.

Training reads the texts from the shards one by one. Millions of tokens need little memory, because the system drops its
cache of the files when memory is short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, overload

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from offramp.errors import CorruptFile
from offramp.files import read_lines, write_atomically
from offramp.model.backbone import Backbone
from offramp.model.state import State

TEACHER = 16  # most probable tokens of the final distribution that are kept for each position


@dataclass(frozen=True)
class TeacherText:
    """One text of T tokens. Position t holds what the model computed after token t, which predicts token t + 1.

    ids (T,); hidden (T, J, D) float16 at the J exits; top_ids and top_logp (T, TEACHER): the final distribution's most
    probable tokens, best first; counted (T,): positions whose guess is trained on and measured (answers, not prompts).
    """

    ids: Tensor
    hidden: Tensor
    top_ids: Tensor
    top_logp: Tensor
    counted: Tensor


FIELDS = tuple(field.name for field in fields(TeacherText))


class _Place(NamedTuple):
    """Where a text is: rows `start` to `stop` - 1 of a shard."""

    shard: Path
    start: int
    stop: int


class TeacherTexts(Sequence[TeacherText]):
    """Texts in shards on disk. Only their places are in memory; indexing maps a text's rows of its shard.

    Raises `CorruptFile` for a shard that cannot be read.
    """

    def __init__(self, places: Iterable[_Place]) -> None:
        self._places = list(places)

    @classmethod
    def open(cls, shards: Iterable[Path]) -> TeacherTexts:
        """All texts of all shards, in order."""
        places = []
        for shard in shards:
            stop = 0
            for length in _tensors(shard, ("lengths",))[0].tolist():
                start, stop = stop, stop + length
                places.append(_Place(shard, start, stop))
        return cls(places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> TeacherText: ...

    @overload
    def __getitem__(self, index: slice) -> TeacherTexts: ...

    def __getitem__(self, index: int | slice) -> TeacherText | TeacherTexts:
        if isinstance(index, slice):
            return TeacherTexts(self._places[index])
        place = self._places[index]
        return TeacherText(*_tensors(place.shard, FIELDS, slice(place.start, place.stop)))

    def __add__(self, other: TeacherTexts) -> TeacherTexts:
        return TeacherTexts(self._places + other._places)

    def subset(self, indices: Iterable[int]) -> TeacherTexts:
        """The texts with these indices, in this order."""
        return TeacherTexts(self._places[index] for index in indices)


def _tensors(shard: Path, names: tuple[str, ...], rows: slice = slice(None)) -> list[Tensor]:
    """Rows of a shard's tensors, as views of the file: only these rows are read."""
    try:
        with safe_open(shard, "pt") as file:
            return [file.get_slice(name)[rows] for name in names]
    except FileNotFoundError as error:
        raise CorruptFile(
            f"The shard {shard} is gone.", "Does another training run in the same folder? Run the command again."
        ) from error
    except Exception as error:  # whatever safetensors raises for bytes that it cannot read
        raise CorruptFile(f"The shard {shard} is damaged: {error}", "Delete it and run the command again.") from error


@dataclass(frozen=True)
class TextGroup:
    """Texts that are run together and written as one shard: prompts of one length to answer, or plain texts to read."""

    ids: tuple[tuple[int, ...], ...]
    answer_tokens: int  # 0: plain text

    @property
    def most_tokens(self) -> int:
        """The number of tokens of the texts if every answer has its full length."""
        return sum(len(ids) + self.answer_tokens for ids in self.ids)


def group_texts(prompts: list[list[int]], texts: list[list[int]], answer_tokens: int, batch: int) -> list[TextGroup]:
    """Divide prompts and texts (token ids) into groups of at most `batch`. The prompts of a group are equally long."""
    groups = []
    for _, equally_long in groupby(sorted(prompts, key=len), key=len):
        rows = [tuple(ids) for ids in equally_long]
        groups += [TextGroup(tuple(rows[at : at + batch]), answer_tokens) for at in range(0, len(rows), batch)]
    groups += [TextGroup(tuple(tuple(ids) for ids in texts[at : at + batch]), 0) for at in range(0, len(texts), batch)]
    return groups


def write_shards(
    backbone: Backbone,
    groups: list[TextGroup],
    layers: tuple[int, ...],
    folder: Path,
    after_group: Callable[[TextGroup], None] = lambda group: None,
    share: slice = slice(None),
) -> list[Path]:
    """Run the model over the groups, and write a shard for each that has none yet. Returns the paths of all shards.

    `share`: the groups that this process runs; other processes run the others. `after_group` is called after
    each group of the share.
    """
    shards = [folder / f"shard-{index:05d}.safetensors" for index in range(len(groups))]
    for group, shard in zip(groups[share], shards[share], strict=True):
        if not shard.exists():
            texts = list(_answer(backbone, group, layers) if group.answer_tokens else _read(backbone, group, layers))
            tensors = {name: torch.cat([getattr(text, name) for text in texts]) for name in FIELDS}
            tensors["lengths"] = torch.tensor([len(text.ids) for text in texts])
            write_atomically(shard, save(tensors))
        after_group(group)
    return shards


def _through(backbone: Backbone, ids: Tensor, first: int, state: State, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Run ids (B, T) through all blocks → hidden states at the exits (B, T, J, D) float16, and at the top (B, T, D)."""
    h, step = backbone.embed(ids, first)
    at_exits, start = [], 0
    for layer in layers:
        h = backbone.run(h, start, layer, state, step)
        at_exits.append(h.half())
        start = layer
    return torch.stack(at_exits, dim=2), backbone.run(h, start, backbone.n_blocks, state, step)


def _most_probable(backbone: Backbone, top: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states at the top (…, D) → the most probable tokens and their log probabilities, both (…, TEACHER)."""
    logp, ids = backbone.logits(top).log_softmax(-1).topk(min(TEACHER, backbone.vocab_size), dim=-1)
    return ids.int(), logp.half()


@torch.inference_mode()
def _answer(backbone: Backbone, group: TextGroup, layers: tuple[int, ...]) -> Iterator[TeacherText]:
    """Answer the group's prompts greedily, all at once."""
    prompts = torch.tensor(group.ids, device=backbone.device)
    rows, length = prompts.shape
    shared = 0  # a chat template begins every prompt alike: that part is run once for all rows
    while shared < length - 1 and bool((prompts[:, shared] == prompts[0, shared]).all()):
        shared += 1
    state = backbone.state(length + group.answer_tokens)
    hidden: list[list[Tensor]] = [[] for _ in range(rows)]
    if shared:
        before, _ = _through(backbone, prompts[:1, :shared], 0, state, layers)
        state.select(torch.zeros(rows, dtype=torch.long, device=backbone.device))
        for row in range(rows):
            hidden[row].append(before[0])
    teachers: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(rows)]
    running = list(range(rows))  # rows whose answers have not ended
    ids, first = prompts[:, shared:], shared
    for _ in range(group.answer_tokens):
        at_exits, top = _through(backbone, ids, first, state, layers)
        top_ids, top_logp = _most_probable(backbone, top[:, -1])
        for at, row in enumerate(running):
            hidden[row].append(at_exits[at])
            teachers[row].append((top_ids[at], top_logp[at]))
        first += ids.shape[1]
        ids = top_ids[:, :1].long()
        going_on = [at for at in range(len(running)) if int(ids[at, 0]) not in backbone.stop_ids]
        if not going_on or first >= backbone.context:
            break
        if len(going_on) < len(running):
            running = [running[at] for at in going_on]
            keep = torch.tensor(going_on, device=backbone.device)
            ids = ids.index_select(0, keep)
            state.select(keep)
    for row in range(rows):
        top_ids, top_logp = (torch.stack(parts) for parts in zip(*teachers[row], strict=True))
        unanswered = length - 1  # positions of the prompt whose next token is the prompt's own
        yield TeacherText(
            torch.cat([prompts[row].int(), top_ids[:-1, 0]]).cpu(),
            torch.cat(hidden[row]).cpu(),
            torch.cat([top_ids.new_zeros(unanswered, top_ids.shape[1]), top_ids]).cpu(),
            torch.cat([top_logp.new_zeros(unanswered, top_ids.shape[1]), top_logp]).cpu(),
            torch.arange(unanswered + len(top_ids)) >= unanswered,
        )


@torch.inference_mode()
def _read(backbone: Backbone, group: TextGroup, layers: tuple[int, ...]) -> Iterator[TeacherText]:
    """Read the group's plain texts, one by one: every position counts."""
    for ids in group.ids:
        row = torch.tensor([ids], device=backbone.device)
        at_exits, top = _through(backbone, row, 0, backbone.state(len(ids)), layers)
        top_ids, top_logp = _most_probable(backbone, top[0])
        counted = torch.ones(len(ids), dtype=torch.bool)
        yield TeacherText(row[0].int().cpu(), at_exits[0].cpu(), top_ids.cpu(), top_logp.cpu(), counted)


def read_texts(path: str | Path, backbone: Backbone, length: int = 256) -> list[list[int]]:
    """A plain text file, or JSON lines with `text` → token ids in pieces of at most `length` tokens."""
    lines = read_lines(path, ("text",))
    documents = lines if Path(path).suffix == ".jsonl" else ["\n".join(lines)]
    pieces = []
    for document in documents:
        ids = backbone.tokenizer(document)["input_ids"]
        pieces += [ids[at : at + length] for at in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]
