"""What exits learn from: the backbone's hidden states and final distributions over text, kept in shards on disk.

The text is above all the model's own answers to prompts (what it will decode later), and any plain text given beside
them. Answers are decoded greedily in batches of prompts that are equally long, so that no padding exists, and the hidden
states are kept as they pass by: nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from offramp.errors import CorruptFile
from offramp.files import read_lines, write_atomically
from offramp.model.backbone import Backbone
from offramp.model.state import State

TEACHER = 16  # most probable tokens of the final distribution that are kept for each position


@dataclass(frozen=True)
class Sequence:
    """One text of T tokens. Position t holds what the model knew after token t, and so its guess at token t + 1.

    ids (T,); hidden (T, J, D) float16 at the J exits; top_ids and top_logp (T, TEACHER): the final distribution's most
    probable tokens, best first; counted (T,): positions whose guess is trained on and measured (answers, not prompts).
    """

    ids: Tensor
    hidden: Tensor
    top_ids: Tensor
    top_logp: Tensor
    counted: Tensor


@dataclass(frozen=True)
class Unit:
    """Texts harvested together and written as one shard: prompts of one length to answer, or plain texts to read."""

    ids: tuple[tuple[int, ...], ...]
    answer_tokens: int  # 0: plain text


def units(prompts: list[list[int]], texts: list[list[int]], answer_tokens: int, batch: int) -> list[Unit]:
    """Cut the work into units of at most `batch` texts."""
    plan = []
    for _, equally_long in groupby(sorted(prompts, key=len), key=len):
        group = [tuple(ids) for ids in equally_long]
        plan += [Unit(tuple(group[at : at + batch]), answer_tokens) for at in range(0, len(group), batch)]
    plan += [Unit(tuple(tuple(ids) for ids in texts[at : at + batch]), 0) for at in range(0, len(texts), batch)]
    return plan


def harvest(
    backbone: Backbone, plan: list[Unit], layers: tuple[int, ...], folder: Path, done: Callable[[int], None]
) -> list[Path]:
    """Write a shard for each unit that has none yet; `done(tokens)` is called after each. Returns all shards' paths."""
    from safetensors.torch import save

    shards = [folder / f"shard-{index:05d}.safetensors" for index in range(len(plan))]
    for unit, shard in zip(plan, shards, strict=True):
        if not shard.exists():
            sequences = list(_answer(backbone, unit, layers) if unit.answer_tokens else _read(backbone, unit, layers))
            tensors = {
                "lengths": torch.tensor([len(sequence.counted) for sequence in sequences]),
                "ids": torch.cat([sequence.ids for sequence in sequences]),
                "hidden": torch.cat([sequence.hidden for sequence in sequences]),
                "top_ids": torch.cat([sequence.top_ids for sequence in sequences]),
                "top_logp": torch.cat([sequence.top_logp for sequence in sequences]),
                "counted": torch.cat([sequence.counted for sequence in sequences]),
            }
            write_atomically(shard, save(tensors))
        done(sum(len(ids) + unit.answer_tokens for ids in unit.ids))
    return shards


def load_shards(shards: list[Path]) -> list[Sequence]:
    """All sequences of all shards, in order. Raises `CorruptFile` for a shard that cannot be read."""
    from safetensors.torch import load_file

    sequences: list[Sequence] = []
    for shard in shards:
        try:
            tensors = load_file(shard)
        except Exception as error:
            raise CorruptFile(f"The shard {shard} is damaged: {error}", "Delete it and run the command again.") from error
        lengths = tensors.pop("lengths").tolist()
        parts = {key: value.split(lengths) for key, value in tensors.items()}
        sequences += [Sequence(**{key: parts[key][index] for key in parts}) for index in range(len(lengths))]
    return sequences


def _through(backbone: Backbone, ids: Tensor, first: int, state: State, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Run ids (B, T) through all blocks: hidden states at the exits (B, T, J, D) float16, and at the top (B, T, D)."""
    h, step = backbone.embed(ids, first)
    kept, start = [], 0
    for layer in layers:
        h = backbone.run(h, start, layer, state, step)
        kept.append(h.half())
        start = layer
    return torch.stack(kept, dim=2), backbone.run(h, start, backbone.n_blocks, state, step)


def _teacher(backbone: Backbone, top: Tensor) -> tuple[Tensor, Tensor]:
    logp, ids = backbone.logits(top).log_softmax(-1).topk(min(TEACHER, backbone.vocab_size), dim=-1)
    return ids.int(), logp.half()


@torch.inference_mode()
def _answer(backbone: Backbone, unit: Unit, layers: tuple[int, ...]) -> Iterator[Sequence]:
    prompts = torch.tensor(unit.ids, device=backbone.device)
    rows, length = prompts.shape
    shared = 0  # a chat template begins every prompt alike: that part is run once for all rows
    while shared < length - 1 and bool((prompts[:, shared] == prompts[0, shared]).all()):
        shared += 1
    state = backbone.state(length + unit.answer_tokens)
    hidden: list[list[Tensor]] = [[] for _ in range(rows)]
    if shared:
        before, _ = _through(backbone, prompts[:1, :shared], 0, state, layers)
        state.select(torch.zeros(rows, dtype=torch.long, device=backbone.device))
        for row in range(rows):
            hidden[row].append(before[0])
    teachers: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(rows)]
    alive = list(range(rows))
    ids, first = prompts[:, shared:], shared
    for _ in range(unit.answer_tokens):
        kept, top = _through(backbone, ids, first, state, layers)
        top_ids, top_logp = _teacher(backbone, top[:, -1])
        for at, row in enumerate(alive):
            hidden[row].append(kept[at])
            teachers[row].append((top_ids[at], top_logp[at]))
        first += ids.shape[1]
        ids = top_ids[:, :1].long()
        going = [at for at in range(len(alive)) if int(ids[at, 0]) not in backbone.stop_ids]
        if not going or first >= backbone.context:
            break
        if len(going) < len(alive):
            alive = [alive[at] for at in going]
            keep = torch.tensor(going, device=backbone.device)
            ids = ids.index_select(0, keep)
            state.select(keep)
    for row in range(rows):
        top_ids, top_logp = (torch.stack(parts) for parts in zip(*teachers[row], strict=True))
        silent = length - 1  # positions of the prompt that guess nothing of the answer
        yield Sequence(
            torch.cat([prompts[row].int(), top_ids[:-1, 0]]).cpu(),
            torch.cat(hidden[row]).cpu(),
            torch.cat([top_ids.new_zeros(silent, top_ids.shape[1]), top_ids]).cpu(),
            torch.cat([top_logp.new_zeros(silent, top_ids.shape[1]), top_logp]).cpu(),
            torch.arange(silent + len(top_ids)) >= silent,
        )


@torch.inference_mode()
def _read(backbone: Backbone, unit: Unit, layers: tuple[int, ...]) -> Iterator[Sequence]:
    for ids in unit.ids:
        kept, top = _through(backbone, torch.tensor([ids], device=backbone.device), 0, backbone.state(len(ids)), layers)
        top_ids, top_logp = _teacher(backbone, top[0])
        yield Sequence(
            torch.tensor(ids, dtype=torch.int),
            kept[0].cpu(),
            top_ids.cpu(),
            top_logp.cpu(),
            torch.ones(len(ids), dtype=torch.bool),
        )


def read_texts(path: str | Path, backbone: Backbone, length: int = 256) -> list[list[int]]:
    """A plain text file, or JSON lines with `text` → token ids in pieces of at most `length` tokens."""
    lines = read_lines(path, ("text",))
    documents = lines if Path(path).suffix == ".jsonl" else ["\n".join(lines)]
    pieces = []
    for document in documents:
        ids = backbone.tokenizer(document)["input_ids"]
        pieces += [ids[at : at + length] for at in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]
