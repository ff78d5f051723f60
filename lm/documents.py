"""Turn text files into clean documents, without the questions models are tested on, and with few dictionary entries."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import json
import lzma
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.errors import BadInput

PIECE = 20_000  # bytes of a book that are held out together
SHORTEST = 5  # the fewest words of a question that is searched for within other text


@dataclass(frozen=True)
class Document:
    """A text that is in one split as a whole.

    question: the question that it answers, if it is an answer. follows: whether it goes on where the document before it
    stopped. capped: whether it is a dictionary's entry; dictionaries together get a limited share.
    """

    text: str
    question: str = ""
    follows: bool = False
    capped: bool = False


@dataclass
class Source:
    """A named text and its documents. dropped: how many documents were dropped, for each reason."""

    name: str
    sha256: str
    documents: list[Document]
    dropped: Counter[str] = field(default_factory=Counter)


def question_and_answer(question: str, answer: str = "") -> str:
    """A question and its answer in the form that the model sees; without an answer, a prompt."""
    return f"Question: {' '.join(question.split())} Answer: {answer.strip()}".rstrip()


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def letters_of(text: str) -> str:
    """The letters and digits of a text, in lower case. Two questions are the same if these are."""
    return "".join(words_of(text))


class Excluded:
    """Questions that no training text may hold."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._letters: set[str] = set()
        self._starts: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for question in questions:
            words = tuple(words_of(question))
            self._letters.add("".join(words))
            if len(words) >= SHORTEST:
                self._starts.setdefault(words[:SHORTEST], set()).add(words)

    def has(self, question: str) -> bool:
        """Whether this question is excluded."""
        return letters_of(question) in self._letters

    def within(self, text: str) -> bool:
        """Whether the text holds, word for word, an excluded question of at least `SHORTEST` words."""
        words = words_of(text)
        windows = list(zip(*(words[start:] for start in range(SHORTEST)), strict=False))
        if self._starts.keys().isdisjoint(windows):
            return False
        return any(
            tuple(words[at : at + len(whole)]) == whole
            for at, window in enumerate(windows)
            for whole in self._starts.get(window, ())
        )


def questions_in(path: Path) -> list[str]:
    """The questions of an evaluation file: TruthfulQA's CSV, CoQA's JSON, or JSON lines with `question`.

    Raises `BadInput` for any other file.
    """
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as stream:
                return [row["Question"] for row in csv.DictReader(stream)]
        if path.suffix == ".json":
            stories = json.loads(path.read_text())["data"]
            turns = [turn for story in stories for turn in story["questions"]]
            # A turn is a string on the hub, and a record in the official file.
            return [turn if isinstance(turn, str) else turn["input_text"] for turn in turns]
        return [json.loads(line)["question"] for line in path.read_text().split("\n") if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not a file of questions ({type(error).__name__}: {error}).") from error


def read_source(path: Path) -> Source:
    """The cleaned documents of a file, whose name tells its kind. Raises `BadInput` if it cannot be read as text."""
    try:
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        if path.suffix == ".xz":
            raw = lzma.decompress(raw)
        elif path.suffix == ".dz":
            raw = gzip.decompress(raw)
        text = raw.decode()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise BadInput(f"{path} cannot be read as text ({type(error).__name__}: {error}).") from error
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
        documents = [document for record in records for document in record_documents(record)]
    elif {".dict", ".dz"} & set(path.suffixes):
        documents = list(entries(text))
    else:
        documents = [piece for book in text.split("\f") for piece in pieces(clean(book))]
    return Source(path.name, digest, documents)


def read_hub(name: str) -> Source:
    """The train split of a hub data set with `text`, or `question` and `answer`."""
    if importlib.util.find_spec("datasets") is None:
        raise BadInput(f"--hub {name} needs a package that is not installed.", "Install it: pip install datasets")
    import datasets

    rows = datasets.load_dataset(name, split="train")
    documents = [document for row in rows for document in record_documents(row)]
    everything = "\f".join(document.text for document in documents)
    return Source(name, hashlib.sha256(everything.encode()).hexdigest(), documents)


def record_documents(record: dict[str, Any]) -> list[Document]:
    """The documents of a record: question and answer, an instruction's prompt and response, or text."""
    question, answer = record.get("question"), record.get("answer")
    if question is None and "response" in record:
        prompt = str(record["prompt"])
        instruction = re.search(r"### Instruction:\n(.*?)\n*### Response:", prompt, re.DOTALL)
        question, answer = instruction[1] if instruction else prompt, record["response"]
    if isinstance(question, str) and isinstance(answer, str):
        return [Document(question_and_answer(question, clean(answer)), question)]
    if isinstance(record.get("text"), str):
        return list(pieces(clean(record["text"])))
    raise BadInput(f"A record has neither question and answer nor text, but {', '.join(map(str, record))}.")


def clean(text: str) -> str:
    """Paragraphs separated by an empty line, each on one line unless it is verse; no front matter."""
    text = re.sub(r"\r\n?", "\n", text)
    if start := re.search(r"\*\*\* ?START OF TH.*\n", text):
        text = text[start.end() :]
    text = re.split(r"\*\*\* ?END OF TH", text)[0]
    text = re.sub(r"\A(\s*(#+ *(Title|Author|Year):.*|-{3,}) *\n)+", "", text)
    if "<unk>" in text or " @-@ " in text:
        text = undo_word_tokens(text)
    text = re.sub(r"[^\S\n]+", " ", text)
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(line for line in map(unwrap, paragraphs) if line)


def unwrap(paragraph: str) -> str:
    """Join the lines of a paragraph that was wrapped at a fixed width; verse, whose lines are shorter, stays."""
    lines = [line.strip() for line in paragraph.strip().split("\n")]
    full = lines[:-1]
    return (" " if full and sum(map(len, full)) / len(full) >= 55 else "\n").join(lines)


def undo_word_tokens(text: str) -> str:
    """WikiText's tokens as ordinary text, without the sentences that have unknown words."""
    text = re.sub(r" @([-.,])@ ", r"\1", text)
    lines = []
    for line in text.split("\n"):
        sentences = re.split(r"(?<= [.!?]) ", line.strip())
        line = " ".join(sentence for sentence in sentences if "<unk>" not in sentence)
        line = re.sub(r" ([.,;:!?)\]%]|'s\b|n't\b|'\w+\b)", r"\1", line)
        line = re.sub(r"([(\[$£]) ", r"\1", line)
        line = re.sub(r'" (.*?) "', r'"\1"', line)
        lines.append(re.sub(r"^= (?:= )*(.*?)(?: =)+$", r"\1", line))
    return "\n\n".join(lines)


def pieces(text: str) -> Iterator[Document]:
    """Contiguous pieces of about `PIECE` bytes, cut between paragraphs."""
    gathered: list[str] = []
    size, follows = 0, False
    for paragraph in text.split("\n\n"):
        gathered.append(paragraph)
        size += len(paragraph.encode()) + 2
        if size >= PIECE:
            yield Document("\n\n".join(gathered), follows=follows)
            gathered, size, follows = [], 0, True
    if size > 2:
        yield Document("\n\n".join(gathered), follows=follows)


def entries(text: str) -> Iterator[Document]:
    """The entries of a dictd dictionary: each headword starts a line, and its meaning is indented below."""
    # Markup of references, synonyms and sources goes. Some lines break within a reference; they are joined first.
    text = re.sub(r"\{([^{}]*)\}", lambda match: " ".join(match[1].split()), text)
    text = re.sub(r"\s*\[(?:syn|ant|also|WordNet|1913|Jargon)[^\]]*\]", "", text)
    for entry in re.findall(r"^(\S.*\n(?:\S.*\n)*(?:(?:[ \t].*)?\n)+)", text, re.MULTILINE):
        head, *body = entry.split("\n")
        meaning = " ".join(" ".join(body).split())
        if meaning and not head.startswith("00-database"):
            yield Document(f"{head.strip()}: {meaning}", capped=True)


def exclude(source: Source, excluded: Excluded) -> None:
    """Drop documents and paragraphs that hold an excluded question, and repeated documents."""
    kept: list[Document] = []
    seen: set[str] = set()
    for document in source.documents:
        # Dictionaries repeat a meaning for every synonym.
        body = document.text.partition(": ")[2] if document.capped else document.text
        if body in seen:
            source.dropped["repeated"] += 1
        elif document.question and (excluded.has(document.question) or excluded.within(document.text)):
            source.dropped["documents with an excluded question"] += 1
        else:
            seen.add(body)
            if not document.question and excluded.within(document.text):
                paragraphs = document.text.split("\n\n")
                rest = [paragraph for paragraph in paragraphs if not excluded.within(paragraph)]
                source.dropped["paragraphs with an excluded question"] += len(paragraphs) - len(rest)
                document = Document("\n\n".join(rest), "", document.follows, document.capped)
            if document.text:
                kept.append(document)
    source.documents = kept


def cap(sources: list[Source], share: float) -> None:
    """Drop the dictionaries' entries of highest hash, until entries are at most this share of all bytes."""
    sizes = {True: 0, False: 0}  # bytes of capped documents, and of all others
    for source in sources:
        for document in source.documents:
            sizes[document.capped] += len(document.text.encode())
    keep = share / (1 - share) * sizes[False] / sizes[True] if sizes[True] else 1.0
    if keep < 1:
        for source in sources:
            # This hash must differ from the split's, whose lowest values are the held-out documents.
            kept = [
                document
                for document in source.documents
                if not document.capped or hash_share("cap/" + document.text) < keep
            ]
            if dropped := len(source.documents) - len(kept):
                source.dropped["over the dictionaries' share"] = dropped
            source.documents = kept


def hash_share(text: str) -> float:
    """The text's hash as a number from 0 (included) to 1 (excluded)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
