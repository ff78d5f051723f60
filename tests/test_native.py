"""The program without Python, offramp-run, and the files that `offramp export --gguf` writes for it."""

from __future__ import annotations

import ctypes
import json
import math
import random
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import equal

import offramp
from helpers import run_cli
from models import compiled_only
from offramp.errors import CorruptFile
from offramp.exits.exit_set import ExitSet
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
    assert "exact, close, close:2, early" in ran.stdout
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    return offramp.load("smollm2", "file")


@pytest.fixture(scope="module")
def opened(folder: Path) -> Any:
    """The model's file, as the library opens it."""
    for name, result in {"new": ctypes.c_void_p, "model": ctypes.c_void_p}.items():
        getattr(library(), f"offramp_file_{name}").restype = result
    return ctypes.c_void_p(call("offramp_file_new", str(folder / "model.gguf").encode(), None, None))


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


@pytest.mark.parametrize("mode", ["full", "exact", "close", "close:2", "early", "early:2"])
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
    assert "draws none" in run(files[0], "Hi", "--exits", files[1], "--mode", "close", "--temperature", "1", code=2).stderr
    assert "prompt is empty" in run(files[0], " ", code=2).stderr
    (tmp_path / "half.gguf").write_bytes(files[0].read_bytes()[:1_000_000])
    assert "damaged" in run(tmp_path / "half.gguf", "Hi", code=1).stderr


class Tokenizer:
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


def test_chat_templates_are_kept_where_pieces_can_say_what_they_do() -> None:
    pieces = chat_pieces(Tokenizer(CHATML))
    assert pieces
    assert pieces["trims"] == [1, 1, 1]
    talk = [(role, f" {role} ") for role in (*ROLES, "user")]
    rendered = Tokenizer(CHATML).apply_chat_template(
        [{"role": role, "content": content} for role, content in talk], add_generation_prompt=True
    )
    assert put_together(pieces, talk) == rendered
    assert chat_pieces(Tokenizer(CHATML.replace("m.content | trim", "m.content | upper"))) is None
    assert chat_pieces(Tokenizer("{{ messages | length }}" + CHATML)) is None
    assert chat_pieces(Tokenizer("{{ nothing.at.all }}")) is None
    assert chat_pieces(object()) is None
