"""Text → a tokenizer, and tokens for training, validation and test, without the questions that models are tested on.

    python -m lm.text -o CORPUS --text books.txt.xz trivia.jsonl wn.dict.dz --exclude TruthfulQA.csv coqa.json

The unit that is held out is a document: a question with its answer, a dictionary's entry, or a contiguous piece of about
20 kB of a book, so that the books are in all splits. Which split a document is in depends on its own hash only (that of
its question, where it has one), so it stays there when other text is added. CORPUS then holds

    {train,valid,test}.npy   uint16 tokens, every document ended by <|endoftext|>
    {train,valid,test}.txt   the same documents in UTF-8, a form feed after each
    tokenizer files          byte-level BPE
    corpus.json              every source's hash, and what became of it
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import importlib.util
import json
import lzma
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from offramp.errors import BadInput, OfframpError
from offramp.files import write_atomically

END = "<|endoftext|>"
Tokens = npt.NDArray[np.uint16]
Lengths = npt.NDArray[np.int64]  # of pieces, in bytes
# Questions as the model sees them in its training text (see `question_and_answer`).
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }} Answer:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPLITS = ("train", "valid", "test")
PIECE = 20_000  # bytes of a book that are held out together
HELD = 0.01  # of the documents, for validation and again for test
SHORTEST = 5  # words from which a question is looked for within other text
# Words with the space before them, single digits, and punctuation with the line breaks after it.
_PRE_TOKEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+\n*|\s*\n+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Document:
    """What is held out together. `follows`: it goes on where the document before it stopped."""

    text: str
    question: str = ""
    follows: bool = False
    capped: bool = False  # of a dictionary: dictionaries together get a limited share


@dataclass
class Source:
    """A named text, its documents, and how many were dropped why."""

    name: str
    sha256: str
    documents: list[Document]
    dropped: Counter[str] = field(default_factory=Counter)


def question_and_answer(question: str, answer: str = "") -> str:
    """The form in which the model sees questions; without an answer, a prompt."""
    return f"Question: {' '.join(question.split())} Answer: {answer.strip()}".rstrip()


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def letters_of(text: str) -> str:
    """Only letters and digits, in lower case: two questions are the same if these are."""
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

    def is_one(self, question: str) -> bool:
        return letters_of(question) in self._letters

    def within(self, text: str) -> bool:
        """Whether the text holds one of at least `SHORTEST` words, word for word."""
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
    """The questions of an evaluation file: TruthfulQA's CSV, CoQA's JSON, or JSON lines with `question`."""
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as stream:
                return [row["Question"] for row in csv.DictReader(stream)]
        if path.suffix == ".json":
            turns = [turn for one in json.loads(path.read_text())["data"] for turn in one["questions"]]
            return [turn if isinstance(turn, str) else turn["input_text"] for turn in turns]  # as on the hub, or officially
        return [json.loads(line)["question"] for line in path.read_text().split("\n") if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not a file of questions ({type(error).__name__}: {error}).") from error


def read_source(path: Path) -> Source:
    """The cleaned documents of one file; its kind is told by its name."""
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
        documents = [one for line in text.split("\n") if line.strip() for one in record_documents(json.loads(line))]
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
    documents = [one for row in rows for one in record_documents(row)]
    return Source(name, hashlib.sha256("\f".join(one.text for one in documents).encode()).hexdigest(), documents)


def record_documents(record: dict[str, Any]) -> list[Document]:
    """One record as documents: question and answer, an instruction's prompt and response, or text."""
    question, answer = record.get("question"), record.get("answer")
    if question is None and "response" in record:
        prompt = str(record["prompt"])
        asked = re.search(r"### Instruction:\n(.*?)\n*### Response:", prompt, re.DOTALL)
        question, answer = asked[1] if asked else prompt, record["response"]
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
        line = " ".join(one for one in sentences if "<unk>" not in one)
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
    """The entries of a dictd dictionary: headwords at the start of a line, what they mean indented below."""
    # Markup of references, synonyms and sources; some lines are broken within a reference, and lose their indent.
    text = re.sub(r"\{([^{}]*)\}", lambda match: " ".join(match[1].split()), text)
    text = re.sub(r"\s*\[(?:syn|ant|also|WordNet|1913|Jargon)[^\]]*\]", "", text)
    for entry in re.findall(r"^(\S.*\n(?:\S.*\n)*(?:(?:[ \t].*)?\n)+)", text, re.MULTILINE):
        head, *body = entry.split("\n")
        meaning = " ".join(" ".join(body).split())
        if meaning and not head.startswith("00-database"):
            yield Document(f"{head.strip()}: {meaning}", capped=True)


def exclude(source: Source, excluded: Excluded) -> None:
    """Drop questions that are excluded, and documents and paragraphs that hold one; and what is there twice."""
    kept: list[Document] = []
    seen: set[str] = set()
    for document in source.documents:
        # Dictionaries repeat a meaning for every synonym.
        body = document.text.partition(": ")[2] if document.capped else document.text
        if body in seen:
            source.dropped["repeated"] += 1
        elif document.question and (excluded.is_one(document.question) or excluded.within(document.text)):
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
    """Keep of the dictionaries' entries those of lowest hash, so that they are at most this share of all bytes."""
    size = sum(len(one.text.encode()) for source in sources for one in source.documents if not one.capped)
    capped = sum(len(one.text.encode()) for source in sources for one in source.documents if one.capped)
    keep = share / (1 - share) * size / capped if capped else 1.0
    if keep < 1:
        for source in sources:
            # Not the hash that decides on the split: its lowest values are the held-out documents.
            kept = [one for one in source.documents if not one.capped or _share("cap/" + one.text) < keep]
            if dropped := len(source.documents) - len(kept):
                source.dropped["over the dictionaries' share"] = dropped
            source.documents = kept


def splits(documents: list[Document]) -> list[str]:
    """For each document the name of its split."""
    places = [_share(letters_of(one.question) if one.question else one.text) for one in documents]
    names = ["test" if place < HELD else "valid" if place < 2 * HELD else "train" for place in places]
    if len(documents) >= len(SPLITS) and not any(one.question for one in documents):
        for index, name in zip(np.argsort(places), ("test", "valid"), strict=False):
            if name not in names:  # a source of few pieces is tested too
                names[index] = name
    return names


def split_documents(source: Source) -> dict[str, list[str]]:
    """The source's texts in each split; contiguous pieces that stay in one split are joined again."""
    texts: dict[str, list[str]] = {name: [] for name in SPLITS}
    before = ""
    for document, name in zip(source.documents, splits(source.documents), strict=True):
        if document.follows and name == before:
            texts[name][-1] += "\n\n" + document.text
        else:
            texts[name].append(document.text)
        before = name
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocabulary` pieces, `END` (id 0) among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
    made.chat_template = CHAT
    return made


def piece_bytes(tokenizer: Any) -> Lengths:
    """How many bytes of text each piece stands for, (V,); none for `END`."""
    # Byte-level pieces are written with one character a byte.
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return np.array([0 if name == END else len(name) for name in names], dtype=np.int64)


def encode(tokenizer: Any, texts: list[str]) -> Tokens:
    """All texts as one row of tokens, `END` after each, uint16."""
    end, fast = tokenizer.convert_tokens_to_ids(END), tokenizer.backend_tokenizer
    rows = [np.zeros(0, dtype=np.uint16)]
    for start in range(0, len(texts), 256):
        for encoding in fast.encode_batch_fast(texts[start : start + 256], add_special_tokens=False):
            rows.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(rows)


def build(
    folder: Path,
    texts: list[Path],
    hub: list[str],
    excluding: list[Path],
    vocabulary: int = 4096,
    tokenizer_of: Path | None = None,
    dictionary_share: float = 0.15,
    command: str = "",
) -> dict[str, Any]:
    """Make the corpus in `folder` and return its record. With `tokenizer_of`, that folder's tokenizer is used."""
    tests = {path.name: questions_in(path) for path in excluding}
    excluded = Excluded(question for questions in tests.values() for question in questions)
    sources = [read_source(path) for path in texts] + [read_hub(name) for name in hub]
    for source in sources:
        exclude(source, excluded)
    cap(sources, dictionary_share)
    split = [split_documents(source) for source in sources]
    if not any(one["train"] for one in split):
        raise BadInput("No text is left to train on.", "Give more text with --text.")

    if tokenizer_of:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    else:
        # A third of every source is enough.
        joined = ["\n\n".join(one["train"]) for one in split]
        sample = [text[at : at + PIECE] for text in joined for at in range(0, len(text), 3 * PIECE)]
        tokenizer = train_tokenizer(sample, vocabulary)
    lengths = piece_bytes(tokenizer)

    records: list[dict[str, Any]] = [
        {"name": source.name, "sha256": source.sha256, "splits": {}, "dropped": dict(source.dropped)} for source in sources
    ]
    totals: dict[str, Any] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        rows = []
        for record, one in zip(records, split, strict=True):
            row = encode(tokenizer, one[name])
            # The pieces must be the text again, byte for byte: bits per byte would be wrong otherwise.
            size = sum(len(text.encode()) for text in one[name])
            if int(lengths[row].sum()) != size:
                raise BadInput(f"The tokenizer does not keep the text of {record['name']}.", "Use a byte-level one.")
            record["splits"][name] = {"documents": len(one[name]), "bytes": size, "tokens": len(row)}
            rows.append(row)
        tokens = np.concatenate(rows)
        _save(folder / f"{name}.npy", tokens)
        text = "".join(text + "\f" for one in split for text in one[name])
        write_atomically(folder / f"{name}.txt", text.encode())
        totals[name] = {
            key: sum(record["splits"][name][key] for record in records) for key in ("documents", "bytes", "tokens")
        } | {"sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    tokenizer.save_pretrained(folder)
    record = {
        "command": command,
        "splits": totals,
        "vocabulary": len(tokenizer),
        "sources": records,
        "excluded": [{"name": name, "questions": len(questions)} for name, questions in tests.items()],
    }
    write_atomically(folder / "corpus.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    return record


def load_tokens(folder: Path, split: str) -> Tokens:
    path = folder / f"{split}.npy"
    if not path.is_file():
        raise BadInput(f"{folder} holds no {path.name}, so it is not a corpus.", "Make one with: python -m lm.text")
    tokens: Tokens = np.load(path, mmap_mode="r")
    return tokens


def command_line() -> str:
    """The command as it was given, without the folders that only this machine has."""
    module = f"lm.{Path(sys.argv[0]).stem}"
    return " ".join(["python -m", module, *(part.rstrip("/").rsplit("/", 1)[-1] for part in sys.argv[1:])])


def report(parser: argparse.ArgumentParser, error: OfframpError) -> None:
    parser.error(" ".join(filter(None, [str(error), error.hint])))


def _share(text: str) -> float:
    """The text's hash as a number from 0 to 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _save(path: Path, tokens: Tokens) -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, tokens)
    write_atomically(path, buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="the corpus's folder")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help=".txt, .txt.xz, .jsonl, .dict or .dict.dz files")
    parser.add_argument("--hub", nargs="+", default=[], help="hub data sets with text, or question and answer")
    parser.add_argument("--exclude", type=Path, nargs="+", default=[], help="evaluation questions: .csv, .json, .jsonl")
    parser.add_argument("--vocabulary", type=int, default=4096, help="pieces of the tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="use this folder's tokenizer, to go on with a model trained before")
    parser.add_argument("--dictionary-share", type=float, default=0.15, help="dictionaries' largest share of the bytes")
    args = parser.parse_args()
    try:
        record = build(
            args.out,
            args.text,
            args.hub,
            args.exclude,
            args.vocabulary,
            args.tokenizer,
            args.dictionary_share,
            command_line(),
        )
    except OfframpError as error:
        report(parser, error)
    print(json.dumps(record, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
