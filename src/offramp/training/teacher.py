"""The teacher's output that exits learn from: hidden states and final distributions over text, in shards on disk.

Most of the text is the model's own answers to prompts, which is what it will decode later. Plain texts can be added.
In compiled blocks the engine decodes the answers, many side by side; elsewhere the library does. Then the model reads all
texts in the same way, in chunks, which gives their hidden states.

Training reads the texts from the shards one by one. Millions of tokens need little memory, because the system drops its
cache of the files when memory is short.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from offramp.decode.embedding import embed_all
from offramp.decode.engine import Engine
from offramp.decode.sampling import LEAST_TEMPERATURE, Choose, Sampler, Sampling, noise
from offramp.decode.sequence import begin_alike
from offramp.errors import CorruptFile
from offramp.files import read_lines, write_atomically
from offramp.model.backbone import Backbone
from offramp.model.costs import Costs
from offramp.model.runtime import AnyState, BlockInput
from offramp.training.loop import step_generator

SIDE_BY_SIDE = 64  # answers side by side; more would be hardly faster, and would need more memory
CHUNK = 512  # about so many tokens are read at once
HEAD_ROWS = 256  # positions whose logits are in memory at once
BUCKET = 64  # entries
TEACHER = 16  # most probable tokens of the final distribution that are kept for each position


@dataclass(frozen=True)
class TeacherText:
    """One text of T tokens. Position t holds the model's output after token t, which predicts token t + 1.

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
    """The place of a text: rows `start` to `stop` - 1 of a shard."""

    shard: Path
    start: int
    stop: int


class TeacherTexts(Sequence[TeacherText]):
    """Texts in shards on disk. Only their places are in memory; indexing maps the rows of a text from its shard.

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

    @property
    def lengths(self) -> list[int]:
        """The length of each text, in tokens."""
        return [place.stop - place.start for place in self._places]

    def __add__(self, other: TeacherTexts) -> TeacherTexts:
        return TeacherTexts(self._places + other._places)

    def subset(self, indices: Iterable[int]) -> TeacherTexts:
        """The texts with these indices, in this order."""
        return TeacherTexts(self._places[index] for index in indices)


def lengths_of(texts: Sequence[TeacherText]) -> list[int]:
    """The length of each text, in tokens."""
    return texts.lengths if isinstance(texts, TeacherTexts) else [len(text.ids) for text in texts]


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
    """Texts that are written as one shard: prompts of one length to answer, or plain texts to read.

    `temperatures`: for each prompt, 0 for a greedy answer; above 0, each token is drawn from the `TEACHER` most probable
    ones. Empty: all answers are greedy. `seed` is that of the draws.
    """

    ids: tuple[tuple[int, ...], ...]
    answer_tokens: int  # 0: plain text
    temperatures: tuple[float, ...] = ()
    seed: int = 0

    @property
    def most_tokens(self) -> int:
        """The number of tokens of the texts if every answer has its full length."""
        return sum(len(ids) + self.answer_tokens for ids in self.ids)

    def choose(self, place: int) -> Sampler:
        """The sampling of an answer. The draws depend only on the text's place."""
        temperature = self.temperatures[place] if self.temperatures else 0.0
        seed = step_generator(self.seed, place, "answers").initial_seed()
        return Sampling(temperature, top_k=TEACHER, seed=seed).chooser()


def group_texts(
    prompts: list[list[int]],
    texts: list[list[int]],
    answer_tokens: int,
    batch: int,
    temperatures: Sequence[float] = (),
) -> list[TextGroup]:
    """Divide prompts and texts (token ids) into groups of at most `batch`. The prompts of a group are equally long.

    `temperatures`: those of the answers, one for each prompt; by default all are greedy.
    """
    groups: list[TextGroup] = []
    asked = zip(prompts, temperatures or [0.0] * len(prompts), strict=True)
    for _, equally_long in groupby(sorted(asked, key=lambda pair: len(pair[0])), key=lambda pair: len(pair[0])):
        rows = [(tuple(ids), temperature) for ids, temperature in equally_long]
        for at in range(0, len(rows), batch):
            ids, warmth = zip(*rows[at : at + batch], strict=True)
            drawn = (warmth, len(groups)) if any(warmth) else ()
            groups.append(TextGroup(ids, answer_tokens, *drawn))
    groups += [TextGroup(tuple(tuple(ids) for ids in texts[at : at + batch]), 0) for at in range(0, len(texts), batch)]
    return groups


def made_shards(
    backbone: Backbone, groups: list[TextGroup], layers: tuple[int, ...], shared: int
) -> Iterator[tuple[int, bytes]]:
    """Run the model over the groups, whose prompts have their first `shared` ids in common.

    Yields the index and the shard of each group when it is done.
    """
    plain = ((index, [[*ids] for ids in group.ids]) for index, group in enumerate(groups) if not group.answer_tokens)
    prompts = [ids for group in groups if group.answer_tokens for ids in group.ids]
    alike, nothing = (_begun(backbone, [*ids], layers) for ids in (prompts[0][:shared] if prompts else (), ()))
    for index, texts in chain(_answered(backbone, groups), plain):
        group = groups[index]
        answers = bool(group.answer_tokens)
        firsts = [len(ids) - 1 if answers else 0 for ids in group.ids]
        read = _read(backbone, texts, firsts, layers, alike if answers else nothing)
        tensors = {name: torch.cat([getattr(text, name) for text in read]) for name in FIELDS}
        tensors["lengths"] = torch.tensor([len(text.ids) for text in read])
        yield index, save(tensors)


MakeShards = Callable[[Backbone, list[TextGroup], tuple[int, ...], int], Iterator[tuple[int, bytes]]]


def write_shards(
    backbone: Backbone,
    groups: list[TextGroup],
    layers: tuple[int, ...],
    folder: Path,
    after_group: Callable[[TextGroup], None] = lambda group: None,
    share: slice = slice(None),
    make: MakeShards = made_shards,
) -> list[Path]:
    """Run the model over the groups, and write a shard for each that has none yet. Returns the paths of all shards.

    `share`: the groups that this process runs; other processes run the others. `after_group` is called after
    each group of the share. `make` makes the shards, as `made_shards` does.
    """
    shards = [folder / f"shard-{index:05d}.safetensors" for index in range(len(groups))]
    missing = []
    for group, shard in zip(groups[share], shards[share], strict=True):
        if shard.exists():
            after_group(group)
        else:
            missing.append((group, shard))
    # Over all prompts, so that resumed work computes the same as work without interruption.
    shared = begin_alike([ids for group in groups if group.answer_tokens for ids in group.ids])
    for index, content in make(backbone, [group for group, _ in missing], layers, shared):
        group, shard = missing[index]
        write_atomically(shard, content)
        after_group(group)
    return shards


def _answered(backbone: Backbone, groups: list[TextGroup]) -> Iterator[tuple[int, list[list[int]]]]:
    """Answer the groups' prompts, at most `SIDE_BY_SIDE` side by side, and fewer where their memory would be too large.

    Yields the index of each group whose answers have all ended, and its texts: prompts with their answers, but for the last
    token of each, which is not run.
    """
    engine, asked = Engine(backbone), [(index, group) for index, group in enumerate(groups) if group.answer_tokens]
    if backbone.engine == "library blocks":  # the library's blocks, in which the engine's sequences would take turns
        yield from ((index, _answered_by_library(engine, group)) for index, group in asked)
        return
    for limit, alike in groupby(asked, key=lambda pair: pair[1].answer_tokens):
        places = [(index, group, place) for index, group in alike for place in range(len(group.ids))]
        prompts = [[*group.ids[place]] for _, group, place in places]
        choose: list[Choose] = [group.choose(place) for _, group, place in places]
        ended: dict[int, dict[int, list[int]]] = defaultdict(dict)
        for number, answer in engine.answers(prompts, SIDE_BY_SIDE, choose, max_tokens=limit):
            index, group, place = places[number]
            ended[index][place] = [*group.ids[place], *answer.ids[:-1]]
            if len(ended[index]) == len(group.ids):
                texts = ended.pop(index)
                yield index, [texts[place] for place in sorted(texts)]


@torch.inference_mode()
def _answered_by_library(engine: Engine, group: TextGroup) -> list[list[int]]:
    """The texts of a group as `_answered` gives them, by the library's `generate`: its prompts are equally long."""
    from transformers import GenerationConfig, LogitsProcessorList

    backbone, model, length = engine.backbone, engine.backbone.model, len(group.ids[0])
    stop_ids, texts, own = backbone.stop_ids, list[list[int]](), model.generation_config
    for ids in group.ids:
        backbone.prompts.check([*ids])
    config = GenerationConfig(
        max_new_tokens=min(group.answer_tokens, backbone.context - length),
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=min(stop_ids, default=0),
    )
    size = engine.costs.at_once(length + group.answer_tokens, SIDE_BY_SIDE)
    model.generation_config = GenerationConfig()  # the model's own would fill fields that `config` leaves open
    try:
        for at in range(0, len(group.ids), size):
            prompts = torch.tensor(group.ids[at : at + size], device=backbone.device)
            samplers = [group.choose(place) for place in range(at, at + len(prompts))]
            chosen = LogitsProcessorList([_choosing(engine, samplers)])
            for row in model.generate(prompts, config, chosen, attention_mask=torch.ones_like(prompts)).tolist():
                ends = (place for place in range(length, len(row)) if row[place] in stop_ids)
                texts.append(row[: next(ends, len(row) - 1)])
    finally:
        model.generation_config = own
    return texts


def _choosing(engine: Engine, samplers: list[Sampler]) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor: the token that a row's sampler chooses, among the `TEACHER` likeliest, becomes the row's best."""
    drawn = [row for row, sampler in enumerate(samplers) if sampler.temperature]
    temperatures = torch.tensor([[max(samplers[row].temperature, LEAST_TEMPERATURE)] for row in drawn])

    def choose(ids: Tensor, logits: Tensor) -> Tensor:
        engine.check_numbers(logits.amax(-1).sum())  # not finite if one row's is not
        if drawn:
            likeliest, tokens = (part[drawn].cpu() for part in logits.topk(min(TEACHER, logits.shape[1])))
            seeds = [samplers[row].seed for row in drawn]
            added = [noise(seed, ids.shape[1], row) for seed, row in zip(seeds, tokens.numpy(), strict=True)]
            best = (likeliest / temperatures + torch.tensor(np.stack(added))).argmax(-1, keepdim=True)
            logits[drawn, tokens.gather(1, best)[:, 0].to(logits.device)] = math.inf
        return logits

    return choose


class _Begun(NamedTuple):
    """The common beginning of texts: its length, the blocks' memory of it, and its states at the exits (n, J, D)."""

    tokens: int
    state: AnyState
    hidden: Tensor


@torch.inference_mode()
def _begun(backbone: Backbone, ids: list[int], layers: tuple[int, ...]) -> _Begun:
    """Read the common beginning of texts, which may be empty."""
    state = backbone.state(len(ids))
    if not ids:
        return _Begun(0, state, torch.zeros(0, len(layers), backbone.hidden_size, dtype=torch.half, device=backbone.device))
    h, step = backbone.embed(torch.tensor([ids], device=backbone.device))
    (hidden,), _ = _through(backbone, [(h, state, step)], layers)
    return _Begun(len(ids), state, hidden)


@torch.inference_mode()
def _read(
    backbone: Backbone, texts: list[list[int]], firsts: list[int], layers: tuple[int, ...], begun: _Begun
) -> list[TeacherText]:
    """Read texts that begin alike. The positions of each count from that of `firsts` on."""
    read: list[TeacherText] = []
    known, longest = begun.tokens, max(map(len, texts))
    size = Costs(backbone).at_once(longest, CHUNK // (longest - known))
    for at in range(0, len(texts), size):
        some = texts[at : at + size]
        embedded = embed_all(backbone, [[ids[known:]] for ids in some], [known] * len(some))
        states = [copy.deepcopy(begun.state) for _ in some]
        for state, ids in zip(states, some, strict=True):
            state.reserve(len(ids))
        parts = [(h, state, step) for (h, step), state in zip(embedded, states, strict=True)]
        through = _through(backbone, parts, layers)
        for ids, first, hidden, top in zip(some, firsts[at : at + size], *through, strict=True):
            best = [_most_probable(backbone, rows) for rows in top[first - known :].split(HEAD_ROWS)]
            top_ids, top_logp = (F.pad(torch.cat(each), (0, 0, first, 0)).cpu() for each in zip(*best, strict=True))
            hidden, counted = torch.cat([begun.hidden, hidden]).cpu(), torch.arange(len(ids)) >= first
            read.append(TeacherText(torch.tensor(ids, dtype=torch.int32), hidden, top_ids, top_logp, counted))
    return read


def _through(backbone: Backbone, parts: list[BlockInput], layers: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Run texts (1, T, D) through all blocks → each one's states at the exits (T, J, D) float16 and at the top (T, D)."""
    hidden, at_exits, start = [h for h, _, _ in parts], [], 0
    for stop in (*layers, backbone.n_blocks):
        running = [(h, state, step) for h, (_, state, step) in zip(hidden, parts, strict=True)]
        hidden = backbone.run_all(running, start, stop)
        at_exits.append([h[0].half() for h in hidden])
        start = stop
    return [torch.stack(states, dim=1) for states in zip(*at_exits[:-1], strict=True)], [h[0] for h in hidden]


def _most_probable(backbone: Backbone, top: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states at the top (n, D) → the most probable tokens and their log probabilities, both (n, TEACHER)."""
    logits = backbone.logits(top)
    ids = _largest(logits, min(TEACHER, backbone.vocab_size))
    return ids.int(), logits.log_softmax(-1).gather(1, ids).half()


def _largest(rows: Tensor, count: int) -> Tensor:
    """The places (n, count) of the largest entries of each row (n, V), the largest first."""
    width = rows.shape[1]
    if rows.device.type != "cpu" or width % BUCKET or width < BUCKET * count:
        return rows.topk(count, dim=-1).indices
    # The largest entries are in the buckets with the largest maxima. This is several times as fast as topk over all.
    buckets: Tensor = rows.unflatten(1, (-1, BUCKET))
    chosen = buckets.amax(-1).topk(count, dim=-1).indices
    places: Tensor = buckets.gather(1, chosen[:, :, None].expand(-1, -1, BUCKET)).flatten(1).topk(count, dim=-1).indices
    return chosen.gather(1, places // BUCKET) * BUCKET + places % BUCKET


def read_texts(path: str | Path, backbone: Backbone, length: int = 256) -> list[list[int]]:
    """A plain text file, or JSON lines with `text` → token ids in pieces of at most `length` tokens."""
    lines = read_lines(path, ("text",))
    documents = lines if Path(path).suffix == ".jsonl" else ["\n".join(lines)]
    pieces = []
    for document in documents:
        ids = backbone.tokenizer(document)["input_ids"]
        pieces += [ids[at : at + length] for at in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]
