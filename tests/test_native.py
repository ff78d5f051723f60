"""The program without Python, offramp-run, and the files that `offramp export --gguf` writes for it."""

from __future__ import annotations

import ctypes
import json
import math
import random
import re
import string
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import equal
from transformers import GemmaTokenizer, PreTrainedTokenizerFast

import offramp
from helpers import run_cli
from models import compiled_only
from offramp.errors import CorruptFile
from offramp.exits.exit_set import ExitSet
from offramp.model import vocabulary
from offramp.model.chat import ROLES, chat_pieces, put_together
from offramp.model.checkpoint import gguf_of
from offramp.model.compiled.library import call, library
from offramp.model.core import program

pytestmark = [pytest.mark.real, compiled_only]

TIMES = {"prefill_seconds", "decode_tokens_per_second"}
PROMPTS = (
    "Why is the sky blue?",
    "Write a haiku about “rain” 🌧️.",
    "def fibonacci(n):",
    "  What is 17 + 25?\tAnswer: ",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `offramp export --gguf` writes for smollm2's file."""
    made = tmp_path_factory.mktemp("native")
    ran = run_cli("export", "smollm2", "--gguf", str(made))
    assert not ran.code, ran.stderr
    assert "exact, early" in ran.stdout
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    return offramp.load("smollm2", "file")


@pytest.fixture(scope="module")
def opened(folder: Path) -> Any:
    """The model's file, as the library opens it."""
    return open_file(folder / "model.gguf")


def open_file(path: Path) -> Any:
    """A file, as the library opens it."""
    library().offramp_file_new.restype = ctypes.c_void_p
    return ctypes.c_void_p(call("offramp_file_new", str(path).encode(), None, None))


def run(*arguments: str | Path, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run([program(), *arguments], input=stdin, capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr
    return ran


def ids_of(opened: Any, text: bytes, whole: bool = False) -> list[int]:
    tokenise = library().offramp_tokenise
    tokenise.restype = ctypes.c_int64
    room = (ctypes.c_int64 * (3 * len(text) + 8))()
    count = tokenise(opened, text, ctypes.c_int64(len(text)), whole, room, ctypes.c_int64(len(room)))
    return room[:count]


def shown(opened: Any, ids: list[int]) -> str:
    """The text of tokens, as the library has it."""
    token, length, special = library().offramp_token, ctypes.c_int64(), ctypes.c_int()
    token.restype, found = ctypes.c_void_p, b""
    for number in ids:
        at = token(opened, ctypes.c_int64(number), ctypes.byref(length), ctypes.byref(special))
        found += b"" if special.value else ctypes.string_at(at, length.value)
    return found.decode(errors="replace")


@pytest.mark.parametrize("mode", ["full", "exact", "early", "early:2"])
def test_the_program_gives_the_same_answers_as_python(folder: Path, model: Any, mode: str) -> None:
    files = folder / "model.gguf", "--exits", folder / "exits.gguf"
    ran = run(*files, "--mode", mode, "--json", "--max-tokens", "48", stdin="\n".join(PROMPTS))
    for prompt, line in zip(PROMPTS, ran.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert found.pop("prompt") == prompt
        expected = json.loads(json.dumps(asdict(model.engine(mode).generate(prompt, max_tokens=48))))
        assert found.keys() == expected.keys()
        for name in expected.keys() - TIMES:
            assert alike(found[name], expected[name]), name


@pytest.mark.parametrize("name", ["smollm2-hybrid", "smollm2-mamba", "mamba-tiny"])
def test_models_of_no_gguf_file_are_written_as_parts(name: str, tmp_path: Path) -> None:
    ran = run_cli("export", name, "--gguf", str(tmp_path))
    assert not ran.code, ran.stderr
    made, model = tmp_path / "model.gguf", offramp.load(name)
    for mode in ("full", "exact", "early"):
        ran_alone = run(made, PROMPTS[0], "--exits", tmp_path / "exits.gguf", "--mode", mode, "--max-tokens", "24")
        assert ran_alone.stdout == model.generate(PROMPTS[0], mode=mode, max_tokens=24).text + "\n"
    assert "for the program without Python" in run_cli("generate", str(made), "Hi").stderr
    file = open_file(made)
    for text in fuzzed(500):
        assert ids_of(file, text, whole=True) == model.tokenizer(text.decode(errors="replace"))["input_ids"], text


def alike(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; sums of floats may have been added in another order."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return bool(one == other)


def test_draws_are_those_of_python(folder: Path, model: Any) -> None:
    sampling = offramp.Sampling(temperature=0.8, seed=7)
    expected = model.engine("exact", sampling).generate(PROMPTS[0], max_tokens=32)
    files = folder / "model.gguf", PROMPTS[0], "--exits", folder / "exits.gguf"
    ran = run(*files, "--temperature", "0.8", "--seed", "7", "--max-tokens", "32", "--json", "--threads", "1")
    assert [token["id"] for token in json.loads(ran.stdout)["tokens"]] == expected.ids


def test_a_file_that_export_did_not_write_runs_too(model: Any) -> None:
    file = gguf_of(Path(model.source.path))
    assert file
    # It does not say which rows may be rounded to 8 bits, so none are, and later tokens may differ.
    text = model.generate(model.tokenizer("The sea")["input_ids"], mode="full", max_tokens=4).text
    ran = run(file, "The sea", "--max-tokens", "4")
    assert ran.stdout == text + "\n"
    assert "chat template is not known" in ran.stderr


def test_python_reads_the_exits_back(folder: Path, model: Any, tmp_path: Path) -> None:
    ExitSet.load(folder / "exits.gguf", model).save(tmp_path / "again")
    model.exits.save(tmp_path / "own")
    for place in ("", "draft"):
        own, again = (tmp_path / name / place for name in ("own", "again"))
        assert (own / "offramp.json").read_bytes() == (again / "offramp.json").read_bytes()
        tensors = load_file(own / "exits.safetensors"), load_file(again / "exits.safetensors")
        assert tensors[0].keys() == tensors[1].keys()
        assert all(equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    (tmp_path / "half.gguf").write_bytes((folder / "exits.gguf").read_bytes()[:100_000])
    with pytest.raises(CorruptFile):
        ExitSet.load(tmp_path / "half.gguf", model)


def test_what_export_wrote_can_be_exported_again(folder: Path, tmp_path: Path) -> None:
    ran = run_cli("export", str(folder / "model.gguf"), "--exits", str(folder / "exits.gguf"), "--gguf", str(tmp_path))
    assert not ran.code, ran.stderr
    for name in ("model.gguf", "exits.gguf"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    ran = run_cli("generate", "smollm2", "Hi", "--exits", str(folder / "model.gguf"))
    assert "holds no exits" in ran.stderr


def fuzzed(count: int) -> list[bytes]:
    """Texts of many kinds of characters, and bytes that are no text."""
    dice = random.Random(0)
    kinds = [
        lambda: chr(dice.randrange(32, 127)),
        lambda: dice.choice(" \n\r\t\u00a0\u3000"),
        lambda: chr(dice.choice([dice.randrange(0x80, 0xD800), dice.randrange(0xE000, 0x110000)])),
        lambda: dice.choice("'sStTrReEvVmMlLdDſK0123456789٣²½Ⅷ"),
        lambda: dice.choice(["<|im_end|>", "<|im_start|>", "<|", " '", "''"]),
        lambda: " " * dice.randrange(1, 60),
    ]
    texts = ["".join(dice.choice(kinds)() for _ in range(dice.randrange(40))).encode() for _ in range(count)]
    return texts + [
        bytes(dice.choice(b"\xe0\xa0\x80\xed\xf0\x90\xf4\x8f\xc2\xc0 ab") for _ in range(12)) for _ in range(count)
    ]


def test_texts_become_the_tokens_of_hugging_face(opened: Any, model: Any) -> None:
    for text in fuzzed(2000):
        expected = model.tokenizer(text.decode(errors="replace"))["input_ids"]
        assert ids_of(opened, text, whole=True) == expected, text


def byte_level(pattern: str | None, whole_words: bool) -> Tokenizer:
    """A byte-level BPE tokenizer that learned from the fuzzed texts. Without a pattern, it cuts words as GPT-2 does."""
    learned = Tokenizer(models.BPE(ignore_merges=whole_words))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    learned.pre_tokenizer = pre_tokenizers.Sequence([*cut, letters]) if cut else letters
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator([text.decode(errors="replace") for text in fuzzed(400)], trainer)
    learned.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    return learned


def of_pieces() -> Tokenizer:
    """A tokenizer as Gemma's: pieces of characters, U+2581 for spaces, and bytes for what is not known."""
    words = Tokenizer(models.BPE())
    words.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False)
    words.train_from_iterator([text.decode(errors="replace") for text in fuzzed(400)], trainer)
    learned = json.loads(words.to_str())["model"]["merges"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_end|>", "<|im_start|>"]
    characters = sorted({*string.printable.replace(" ", ""), *"▁ſ٣²½Ⅷ"})
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *("".join(pair) for pair in learned), *characters]
    made: Any = GemmaTokenizer(vocab={token: number for number, token in enumerate(dict.fromkeys(vocabulary))})
    made.add_special_tokens({"additional_special_tokens": special[4:]})
    backend: Tokenizer = made.backend_tokenizer
    return backend


def write_file(file: Path, tokenizer: Tokenizer, kind: str, chat: dict[str, Any] | None = None) -> None:
    """Write a tiny model with this tokenizer, as llama.cpp's converter writes one, and perhaps `chat_pieces`."""
    names = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    writer, rows = GGUFWriter(file, "llama"), np.zeros((32, 32), np.float32)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(2)
    writer.add_context_length(64)
    if kind == "gpt2":
        vocabulary.describe(PreTrainedTokenizerFast(tokenizer_object=tokenizer), writer)
    else:
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre("default")
        writer.add_token_list([name for name, _ in names])
        writer.add_token_types([3 if name in special else 6 if re.fullmatch("<0x..>", name) else 1 for name, _ in names])
        writer.add_token_scores([-float(number) for number in range(len(names))])
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(False)
    for name, value in (chat or {}).items():
        kind_of_value = GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.ARRAY
        writer.add_key_value(f"offramp.chat.{name}", value, kind_of_value)
    writer.add_tensor("token_embd.weight", np.zeros((len(names), 32), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", rows[0])
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("gpt2", lambda: byte_level(None, whole_words=False)),
        ("gpt2", lambda: byte_level(vocabulary.QWEN2, whole_words=False)),
        ("gpt2", lambda: byte_level(vocabulary.LLAMA3, whole_words=True)),
        ("gpt2", lambda: byte_level(vocabulary.TINY, whole_words=False)),
        ("llama", of_pieces),
    ],
    ids=["gpt2", "qwen2", "llama3", "mamba-tiny", "sentencepiece"],
)
def test_other_tokenizers_are_those_of_hugging_face(kind: str, make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    write_file(tmp_path / "x.gguf", tokenizer, kind)
    file = open_file(tmp_path / "x.gguf")
    long = 0
    for text in fuzzed(1500):
        read = text.decode(errors="replace")
        expected = tokenizer.encode(read, add_special_tokens=False).ids
        assert ids_of(file, text) == expected, text
        assert shown(file, expected) == tokenizer.decode(expected, skip_special_tokens=True), text
        long += len(expected) < len(read)
    assert long > 300  # merges were made


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("Name a model", ()),
        ("more than one prompt", ("x.gguf", "a", "b")),
        ("'0' is no value for --max-tokens", ("x.gguf", "--max-tokens", "0")),
        ("'warm' is no value for --temperature", ("x.gguf", "--temperature", "warm")),
        ("--help lists the options", ("x.gguf", "--verbose")),
    ],
)
def test_wrong_arguments_are_said(sentence: str, arguments: tuple[str, ...]) -> None:
    assert sentence in run(*arguments, code=2).stderr


def test_files_that_do_not_fit_are_said(folder: Path, tmp_path: Path) -> None:
    files = folder / "model.gguf", folder / "exits.gguf"
    assert "cannot be opened" in run("none.gguf", "Hi", code=1).stderr
    assert "holds exits" in run(files[1], "Hi", code=1).stderr
    assert "needs exits" in run(files[0], "Hi", "--mode", "exact", code=1).stderr
    assert "no mode 'magic'" in run(files[0], "Hi", "--exits", files[1], "--mode", "magic", code=1).stderr
    assert "prompt is empty" in run(files[0], " ", code=2).stderr
    (tmp_path / "half.gguf").write_bytes(files[0].read_bytes()[:1_000_000])
    assert "damaged" in run(tmp_path / "half.gguf", "Hi", code=1).stderr


class Templated:
    """A tokenizer with a chat template alone."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, talk: list[dict[str, str]], **options: Any) -> str:
        from jinja2 import Environment

        return Environment().from_string(self.chat_template).render(messages=talk, **options)


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


TURNS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }} Answer:"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def test_chat_templates_are_kept_where_pieces_can_say_what_they_do() -> None:
    pieces = chat_pieces(Templated(CHATML))
    assert pieces
    assert pieces["trims"] == [1, 1, 1]
    talk = [(role, f" {role} ") for role in (*ROLES, "user")]
    rendered = Templated(CHATML).apply_chat_template(
        [{"role": role, "content": content} for role, content in talk], add_generation_prompt=True
    )
    assert put_together(pieces, talk) == rendered
    assert chat_pieces(Templated(CHATML.replace("m.content | trim", "m.content | upper"))) is None
    pieces = chat_pieces(Templated(TURNS))
    assert pieces
    assert (pieces["answer"], pieces["assistant"]) == (" Answer:", " ")
    assert chat_pieces(Templated("{{ messages | length }}" + CHATML)) is None
    assert chat_pieces(Templated("{{ nothing.at.all }}")) is None
    assert chat_pieces(object()) is None
