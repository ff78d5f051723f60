"""The teacher's output that exits learn from: hidden states and final distributions over text, in shards on disk.

Most of the text is the model's own answers to prompts, which is what it will decode later. Plain texts can be added.
`answering` makes the shards.

Training reads the texts from the shards one by one. Millions of tokens need little memory, because the system drops its
cache of the files when memory is short.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, overload

from safetensors import safe_open
from torch import Tensor

from offramp.decode.sampling import Sampler, Sampling
from offramp.errors import CorruptFile
from offramp.exits.ngrams import by_prompt, prompt_of
from offramp.files import read_lines
from offramp.model.backbone import Backbone
from offramp.training.loop import step_generator

TEACHER = 16  # most probable tokens of the final distribution that are kept for each position


@dataclass(frozen=True)
class TeacherText:
    """One text of T tokens. Position t holds the model's output after token t, which predicts token t + 1.

    ids (T,); hidden (T, J, D) bfloat16 at the J exits (those of Gemma are too large for float16); top_ids and top_logp
    (T, TEACHER): the final distribution's most probable tokens, best first; counted (T,): positions whose guess is trained
    on and measured (answers, not prompts).
    """

    ids: Tensor
    hidden: Tensor
    top_ids: Tensor
    top_logp: Tensor
    counted: Tensor


FIELDS = tuple(field.name for field in fields(TeacherText))


class _Place(NamedTuple):
    """The place of a text: rows `start` to `stop` - 1 of a shard; and what it answers, as `ngrams.prompt_of` says."""

    shard: Path
    start: int
    stop: int
    prompt: bytes


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
            lengths, ids, counted = (part.numpy() for part in _tensors(shard, ("lengths", "ids", "counted")))
            stop = 0
            for length in lengths.tolist():
                start, stop = stop, stop + length
                places.append(_Place(shard, start, stop, prompt_of(ids[start:stop], counted[start:stop])))
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

    def by_prompt(self) -> list[list[int]]:
        """The indices of the texts that answer the same prompt, together; that of each text that answers none, alone."""
        return by_prompt(place.prompt for place in self._places)

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


def read_texts(path: str | Path, backbone: Backbone, length: int = 256) -> list[list[int]]:
    """A plain text file, or JSON lines with `text` → token ids in pieces of at most `length` tokens."""
    lines = read_lines(path, ("text",))
    documents = lines if Path(path).suffix == ".jsonl" else ["\n".join(lines)]
    pieces = []
    for document in documents:
        ids = backbone.tokenizer(document)["input_ids"]
        pieces += [ids[at : at + length] for at in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]
