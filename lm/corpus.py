"""Turn text into a tokenizer and tokens for training, validation and test, without the questions models are tested on.

    python -m lm.corpus -o CORPUS --text books.txt.xz trivia.jsonl wn.dict.dz --exclude TruthfulQA.csv coqa.json

The unit that is held out is a document: a question with its answer, a dictionary's entry, or a contiguous piece of about
20 kB of a book, so that the books are in all splits. A document's own hash (that of its question, where it has one) decides
which split it is in, so it stays there when other text is added. Afterwards, CORPUS holds

    {train,valid,test}.npy   uint16 tokens, every document ended by <|endoftext|>
    {train,valid,test}.txt   the same documents in UTF-8, a form feed after each
    tokenizer files          byte-level BPE
    corpus.json              every source's hash, and what became of it
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lm.documents import (
    PIECE,
    Document,
    Excluded,
    Source,
    cap,
    exclude,
    hash_share,
    letters_of,
    questions_in,
    read_hub,
    read_source,
)
from offramp.errors import BadInput, OfframpError
from offramp.files import write_atomically
from offramp.model.vocabulary import TINY

END = "<|endoftext|>"
Tokens = npt.NDArray[np.uint16]
Lengths = npt.NDArray[np.int64]  # bytes of each piece
# Questions as the model sees them in its training text (see `question_and_answer`).
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }} Answer:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPLITS = ("train", "valid", "test")
HELD = 0.01  # share of the documents for validation; test gets the same share


def splits(documents: list[Document]) -> list[str]:
    """The name of each document's split."""
    keys = [letters_of(document.question) if document.question else document.text for document in documents]
    places = list(map(hash_share, keys))
    names = ["test" if place < HELD else "valid" if place < 2 * HELD else "train" for place in places]
    if len(documents) >= len(SPLITS) and not any(document.question for document in documents):
        for index, name in zip(np.argsort(places), ("test", "valid"), strict=False):
            if name not in names:  # so that a source of few pieces is tested too
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
            pre_tokenizers.Split(Regex(TINY), "isolated"),
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
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
    wrapped.chat_template = CHAT
    return wrapped


def piece_bytes(tokenizer: Any) -> Lengths:
    """How many bytes of text each piece stands for, (V,); 0 for `END`."""
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
    """Make the corpus in `folder` and return its record. With `tokenizer_of`, that folder's tokenizer is used.

    Raises `BadInput` for files that cannot be read, and where no text is left to train on.
    """
    tests = {path.name: questions_in(path) for path in excluding}
    excluded = Excluded(question for questions in tests.values() for question in questions)
    sources = [read_source(path) for path in texts] + [read_hub(name) for name in hub]
    for source in sources:
        exclude(source, excluded)
    cap(sources, dictionary_share)
    split = [split_documents(source) for source in sources]
    if not any(parts["train"] for parts in split):
        raise BadInput("No text is left to train on.", "Give more text with --text.")

    if tokenizer_of:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_of, trust_remote_code=False)
    else:
        # A third of each source is enough to train a tokenizer.
        joined = ["\n\n".join(parts["train"]) for parts in split]
        sample = [text[at : at + PIECE] for text in joined for at in range(0, len(text), 3 * PIECE)]
        tokenizer = train_tokenizer(sample, vocabulary)

    records: list[dict[str, Any]] = [
        {"name": source.name, "sha256": source.sha256, "splits": {}, "dropped": dict(source.dropped)} for source in sources
    ]
    folder.mkdir(parents=True, exist_ok=True)
    totals = {name: _write_split(folder, name, tokenizer, [parts[name] for parts in split], records) for name in SPLITS}
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


def _write_split(
    folder: Path, name: str, tokenizer: Any, texts: list[list[str]], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write one split from each source's texts, and note each source's size in its record. Returns the total sizes."""
    lengths, rows = piece_bytes(tokenizer), []
    for record, documents in zip(records, texts, strict=True):
        row = encode(tokenizer, documents)
        # The pieces must give back the text, byte for byte, or bits per byte would be wrong.
        size = sum(len(text.encode()) for text in documents)
        if int(lengths[row].sum()) != size:
            raise BadInput(f"The tokenizer does not keep the text of {record['name']}.", "Use a byte-level one.")
        record["splits"][name] = {"documents": len(documents), "bytes": size, "tokens": len(row)}
        rows.append(row)
    tokens = np.concatenate(rows)
    _save(folder / f"{name}.npy", tokens)
    everything = "".join(text + "\f" for documents in texts for text in documents)
    write_atomically(folder / f"{name}.txt", everything.encode())
    sizes = {key: sum(record["splits"][name][key] for record in records) for key in ("documents", "bytes", "tokens")}
    return {**sizes, "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}


def load_tokens(folder: Path, split: str) -> Tokens:
    """A split's tokens, mapped from disk. Raises `BadInput` for a folder that is no corpus."""
    path = folder / f"{split}.npy"
    if not path.is_file():
        raise BadInput(f"{folder} holds no {path.name}, so it is not a corpus.", "Make one with: python -m lm.corpus")
    tokens: Tokens = np.load(path, mmap_mode="r")
    return tokens


def command_line() -> str:
    """The command as it was given, without the folders that only this machine has."""
    program = Path(sys.argv[0])
    module = f"{program.parent.name}.{program.stem}"
    return " ".join(["python -m", module, *(part.rstrip("/").rsplit("/", 1)[-1] for part in sys.argv[1:])])


def report(parser: argparse.ArgumentParser, error: OfframpError) -> NoReturn:
    """End the program with the error and its hint."""
    parser.error(" ".join(filter(None, [str(error), error.hint])))


def _save(path: Path, tokens: Tokens) -> None:
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
