"""What exits learn from: the backbone's hidden states and final distributions over text, kept in shards on disk.

Most of the text is the model's own answers to prompts, which is what it will decode later. Plain texts can be added.
`answers` decodes them, many side by side. The hidden states are kept as decoding computes them, so nothing is computed
twice.

Training reads the texts from the shards one by one. Millions of tokens need little memory, because the system drops its
cache of the files when memory is short.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, overload

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from offramp.decode.embedding import embed_all
from offramp.decode.sequence import begin_alike
from offramp.errors import CorruptFile
from offramp.files import read_lines, write_atomically
from offramp.model.backbone import Backbone
from offramp.model.costs import Costs
from offramp.model.runtime import AnyState, Part, joined
from offramp.training.loop import step_generator

ROWS = 64  # answers side by side; more would hardly be faster, and need more memory
BUCKET = 64  # entries
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
    asked = [index for index, group in enumerate(groups) if group.answer_tokens]
    plain = [index for index, group in enumerate(groups) if not group.answer_tokens]
    answering = _answer(backbone, [groups[index] for index in asked], layers, shared)
    reading = _read(backbone, [groups[index] for index in plain], layers)
    for chosen, made in ((asked, answering), (plain, reading)):
        for place, texts in made:
            tensors = {name: torch.cat([getattr(text, name) for text in texts]) for name in FIELDS}
            tensors["lengths"] = torch.tensor([len(text.ids) for text in texts])
            yield chosen[place], save(tensors)


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
    # Of all prompts, so that work that is resumed computes what it would have computed at once.
    shared = begin_alike([ids for group in groups if group.answer_tokens for ids in group.ids])
    for index, content in make(backbone, [group for group, _ in missing], layers, shared):
        group, shard = missing[index]
        write_atomically(shard, content)
        after_group(group)
    return shards


def _through(backbone: Backbone, parts: list[Part], layers: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Run the parts through all blocks → each one's states at the exits (B, T, J, D) float16 and at the top (B, T, D)."""
    hidden, at_exits, start = [h for h, _, _ in parts], [], 0
    for stop in (*layers, backbone.n_blocks):
        running = [(h, state, step) for h, (_, state, step) in zip(hidden, parts, strict=True)]
        hidden = backbone.run_all(running, start, stop)
        at_exits.append(joined([h.flatten(0, 1) for h in hidden]).half())
        start = stop
    stacked = torch.stack(at_exits[:-1], dim=1).split([h.shape[0] * h.shape[1] for h in hidden])
    return [rows.unflatten(0, h.shape[:2]) for rows, h in zip(stacked, hidden, strict=True)], hidden


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


@dataclass(eq=False)
class _Text:
    """A prompt and its answer so far: the text at `place` in the group at `group`.

    Each entry of `hidden` is (T, J, D); each of `top_ids` and `top_logp` is (TEACHER,), one for each token of the answer.
    `draws`: for each token of the answer, the number in [0, 1) that chooses it; 0 chooses the most probable.
    """

    group: int
    place: int
    prompt: tuple[int, ...]
    answer_tokens: int
    temperature: float
    draws: list[float]
    hidden: list[Tensor]
    answer: list[int] = field(default_factory=list)
    top_ids: list[Tensor] = field(default_factory=list)
    top_logp: list[Tensor] = field(default_factory=list)

    def finished(self) -> TeacherText:
        """The text as it is stored."""
        top_ids, top_logp = torch.stack(self.top_ids), torch.stack(self.top_logp)
        unanswered = len(self.prompt) - 1  # positions of the prompt whose next token is the prompt's own
        return TeacherText(
            torch.tensor([*self.prompt, *self.answer[:-1]], dtype=torch.int32),
            torch.cat(self.hidden).cpu(),
            torch.cat([top_ids.new_zeros(unanswered, top_ids.shape[1]), top_ids]).cpu(),
            torch.cat([top_logp.new_zeros(unanswered, top_ids.shape[1]), top_logp]).cpu(),
            torch.arange(unanswered + len(top_ids)) >= unanswered,
        )


@dataclass(eq=False)
class _Abreast:
    """Texts of one length, with one state. `ids` (B, T) are run next; the first of them stand at position `first`."""

    texts: list[_Text]
    state: AnyState
    ids: list[list[int]]
    first: int


class _Answers:
    """Answers the groups' prompts, at most `ROWS` at a time, and fewer where their memory would be too large.

    In compiled blocks all states share each pass over the weights: every text has a state of its own, and the next prompt
    takes the place of an answer that ends. Elsewhere states take turns: the prompts of a group share one, and the next
    group waits until all of its answers have ended.
    """

    def __init__(self, backbone: Backbone, groups: list[TextGroup], layers: tuple[int, ...], shared: int) -> None:
        """The prompts have their first `shared` ids in common: that part is run once."""
        self.backbone, self.layers = backbone, layers
        self._costs, self._share = Costs(backbone), backbone.engine != "library blocks"
        self._stop_ids = backbone.stop_ids
        self._shared, self._beginning, hidden = shared, backbone.state(shared), []
        if shared:
            h, step = backbone.embed(torch.tensor([groups[0].ids[0][:shared]], device=backbone.device))
            (at_exits,), _ = _through(backbone, [(h, self._beginning, step)], layers)
            hidden = [at_exits[0]]
        self._waiting = deque(
            _Text(index, place, ids, group.answer_tokens, *_draws(group, place), [*hidden])
            for index, group in enumerate(groups)
            for place, ids in enumerate(group.ids)
        )
        self._running: list[_Abreast] = []

    def run(self) -> Iterator[_Text]:
        """The texts as they end."""
        while self._waiting or self._running:
            self._fill()
            yield from self._step()

    def _fill(self) -> None:
        """Let waiting texts take the free places."""
        while self._waiting and (self._share or not self._running):
            text = self._waiting[0]
            rows = self._costs.at_once(len(text.prompt) + text.answer_tokens, ROWS)
            free = rows - sum(len(abreast.texts) for abreast in self._running)
            if free < 1:
                return
            most = 1 if self._share else free
            texts = [self._waiting.popleft()]
            while len(texts) < most and self._waiting and self._waiting[0].group == texts[0].group:
                texts.append(self._waiting.popleft())
            state = copy.deepcopy(self._beginning)
            state.reserve(len(text.prompt) + text.answer_tokens)
            if len(texts) > 1:
                state.select(torch.zeros(len(texts), dtype=torch.long, device=self.backbone.device))
            self._running.append(_Abreast(texts, state, [[*text.prompt[self._shared :]] for text in texts], self._shared))

    def _step(self) -> Iterator[_Text]:
        """Run the next tokens of all texts. Yields those that end."""
        running = self._running
        embedded = embed_all(self.backbone, [abreast.ids for abreast in running], [abreast.first for abreast in running])
        parts = [(h, abreast.state, step) for abreast, (h, step) in zip(running, embedded, strict=True)]
        at_exits, tops = _through(self.backbone, parts, self.layers)
        top_ids, top_logp = _most_probable(self.backbone, joined([top[:, -1] for top in tops]))
        chosen = _chosen(top_logp, [text for abreast in running for text in abreast.texts])
        rows = iter(zip(top_ids, top_logp, top_ids.gather(1, chosen[:, None])[:, 0].tolist(), strict=True))
        for abreast, hidden in zip(running, at_exits, strict=True):
            abreast.first += hidden.shape[1]
            going_on, abreast.ids = [], []
            for place, text in enumerate(abreast.texts):
                ids, logp, newest = next(rows)
                text.hidden.append(hidden[place])
                text.top_ids.append(ids)
                text.top_logp.append(logp)
                text.answer.append(newest)
                if self._ends(text, newest, abreast.first):
                    yield text
                else:
                    going_on.append(place)
                    abreast.ids.append([newest])
            if 0 < len(going_on) < len(abreast.texts):
                abreast.state.select(torch.tensor(going_on, device=self.backbone.device))
            abreast.texts = [abreast.texts[place] for place in going_on]
        self._running = [abreast for abreast in running if abreast.texts]

    def _ends(self, text: _Text, newest: int, position: int) -> bool:
        full = len(text.top_ids) == text.answer_tokens or position >= self.backbone.context
        return full or newest in self._stop_ids


def _draws(group: TextGroup, place: int) -> tuple[float, list[float]]:
    """The temperature of a text, and the numbers that choose its tokens. They follow from the text's place alone."""
    temperature = group.temperatures[place] if group.temperatures else 0.0
    if not temperature:
        return 1.0, [0.0] * group.answer_tokens
    generator = step_generator(group.seed, place, "answers")
    return temperature, torch.rand(group.answer_tokens, generator=generator).tolist()


def _chosen(top_logp: Tensor, texts: list[_Text]) -> Tensor:
    """Which of its most probable tokens (n, TEACHER) each text goes on with, (n,)."""
    temperatures = top_logp.new_tensor([text.temperature for text in texts], dtype=torch.float32)
    draws = temperatures.new_tensor([text.draws[len(text.answer)] for text in texts])
    chances = (top_logp.float() / temperatures[:, None]).softmax(-1).cumsum(-1)
    return (chances <= draws[:, None]).sum(-1).clamp(max=top_logp.shape[1] - 1)


@torch.inference_mode()
def _answer(
    backbone: Backbone, groups: list[TextGroup], layers: tuple[int, ...], shared: int
) -> Iterator[tuple[int, list[TeacherText]]]:
    """Answer the groups' prompts, whose first `shared` ids are the same.

    Yields the index of each group whose answers have all ended, and its texts.
    """
    if not groups:
        return
    ended: list[dict[int, TeacherText]] = [{} for _ in groups]
    for text in _Answers(backbone, groups, layers, shared).run():
        texts = ended[text.group]
        texts[text.place] = text.finished()
        if len(texts) == len(groups[text.group].ids):
            yield text.group, [texts[place] for place in sorted(texts)]
            texts.clear()


@torch.inference_mode()
def _read(backbone: Backbone, groups: list[TextGroup], layers: tuple[int, ...]) -> Iterator[tuple[int, list[TeacherText]]]:
    """Read each group's plain texts, one by one: every position counts. Yields the group's index and its texts."""
    for index, group in enumerate(groups):
        texts = []
        for ids in group.ids:
            row = torch.tensor([ids], device=backbone.device)
            h, step = backbone.embed(row)
            (at_exits,), (top,) = _through(backbone, [(h, backbone.state(len(ids)), step)], layers)
            top_ids, top_logp = _most_probable(backbone, top[0])
            counted = torch.ones(len(ids), dtype=torch.bool)
            texts.append(TeacherText(row[0].int().cpu(), at_exits[0].cpu(), top_ids.cpu(), top_logp.cpu(), counted))
        yield index, texts


def read_texts(path: str | Path, backbone: Backbone, length: int = 256) -> list[list[int]]:
    """A plain text file, or JSON lines with `text` → token ids in pieces of at most `length` tokens."""
    lines = read_lines(path, ("text",))
    documents = lines if Path(path).suffix == ".jsonl" else ["\n".join(lines)]
    pieces = []
    for document in documents:
        ids = backbone.tokenizer(document)["input_ids"]
        pieces += [ids[at : at + length] for at in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]
