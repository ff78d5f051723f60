"""Damaged files and requests: each ends well, or in an error with a sentence and a hint. None crashes or hangs.

    python tests/fuzz.py [TARGET …] [--seconds 60]

The targets are headers of GGUF and safetensors files, config.json, folders of exits, and request bodies. An input is a
valid one with a few random changes, made from its target and number: `python tests/fuzz.py exits --first 123 --count 1`
makes the one of that number again. A finding is printed with its traceback: any error but `OfframpError` or a status of
4xx, more than 5 seconds of the processor or a minute of waiting, more than 1 GB. After a crash, `fuzz.last` in the folder
for temporary files names the input. `test_fuzz.py` runs a few inputs of each target.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from helpers import exits_for
from models import COMPILED, saved, tiny
from offramp import Engine, Exits, load
from offramp.errors import OfframpError
from offramp.exits.exit_set import ExitSet
from offramp.machine import peak_memory
from offramp.model.backbone import Backbone
from offramp.model.checkpoint import Gguf, checkpoint_for
from offramp.model.loading import outline

SLOWEST, LONGEST_WAIT, MOST_MEMORY = 5, 60, 1 << 30  # of one input: seconds of the processor, seconds, bytes
LAST = Path(tempfile.gettempdir()) / "fuzz.last"
NUMBERS = [0, 1, -1, 2, 3, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
WHOLE = [*NUMBERS, 10**30, -(2**63), 10**400]
VALUES = [
    None, True, False, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, "", "x", "\ud800", "../x", "0.5", [], {},
    [0], [[]], {"a": 1}, "x" * 10_000, [1] * 1000,
]  # fmt: skip


class Hang(BaseException):
    """An input took too long."""


def changed_bytes(dice: random.Random, content: bytes) -> bytes:
    """The bytes with one to four changes."""
    made = bytearray(content)
    for _ in range(dice.randrange(1, 5)):
        at, size = dice.randrange(len(made) + 1), dice.choice([1, 2, 4, 8, 16, 64])
        kind = dice.randrange(6)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            form, number = dice.choice(["<I", "<Q"]), dice.choice(NUMBERS)
            made[at : at + struct.calcsize(form)] = struct.pack(form, number % (1 << 8 * struct.calcsize(form)))
        elif kind == 2:
            del made[at : at + size]
        elif kind == 3:
            made[at:at] = made[at : at + size] or bytes(size)
        elif kind == 4:
            made[at : at + size] = dice.randbytes(size)
        elif dice.random() < 0.3:
            del made[at:]
    return bytes(made)


def places_in(tree: Any) -> Iterator[tuple[Any, Any]]:
    """All places of a JSON value: each is a container and a key."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from places_in(value)


def changed_json(dice: random.Random, tree: Any) -> bytes:
    """A JSON value with one to three changes."""
    root = [copy.deepcopy(tree)]
    for _ in range(dice.randrange(1, 4)):
        places = list(places_in(root))
        holder, key = dice.choice(places[1:] if len(places) > 1 and dice.random() < 0.98 else places)
        old, kind = holder[key], dice.randrange(8)
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1:
            other, name = dice.choice(places)
            holder[key] = copy.deepcopy(other[name])
        elif kind < 5 and isinstance(old, int | float) and abs(old) < 1e30:
            holder[key] = dice.choice([old + 1, old - 1, 2 * old, old // 2, -old, 0])
        else:
            holder[key] = copy.deepcopy(dice.choice(dice.choice([WHOLE, VALUES, VALUES])))
    return json.dumps(root[0]).encode()


def changed_safetensors(dice: random.Random, content: bytes) -> bytes:
    """A safetensors file with changes in its header."""
    size = int.from_bytes(content[:8], "little")
    if dice.random() < 0.3:
        return changed_bytes(dice, content[: 8 + size]) + content[8 + size :]
    header = changed_json(dice, json.loads(content[8 : 8 + size]))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


Case = Callable[[], None]  # runs one input


class Targets:
    """Makes inputs in a folder. A method with the name of a target takes dice, and returns what to run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache, self._open = folder, folder / "cache", ExitStack()

    @cache  # noqa: B019 - there is one of these
    def model(self, family: str) -> Path:
        """A folder with a tiny model."""
        return saved(tiny(family), self.folder / family)

    def gguf(self, dice: random.Random) -> Case:
        """A GGUF file's header, and all that it says is there."""
        content, file, model = self._gguf(), self.folder / "x.gguf", tiny("llama").model
        file.write_bytes(changed_bytes(dice, content[:400]) + content[400:])

        def run() -> None:
            with suppress(ValueError, OSError, NotImplementedError):  # `loading` gives these a sentence
                checkpoint = Gguf(file, model)
                for name, shape in checkpoint.shapes.items():
                    checkpoint.rows(name, 0, shape[0])

        return run

    @cache  # noqa: B019
    def _gguf(self) -> bytes:
        from gguf import GGMLQuantizationType, GGUFWriter, quantize

        weights = {name: value.detach().numpy() for name, value in tiny("llama").model.named_parameters()}
        writer = GGUFWriter(self.folder / "valid.gguf", "llama")
        writer.add_block_count(6)
        writer.add_array("words", ["a", "bc", ""])
        writer.add_array("numbers", [1, 2, 3])
        packed = quantize(weights["model.embed_tokens.weight"], GGMLQuantizationType.Q8_0)
        writer.add_tensor("token_embd.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
        writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
        writer.add_tensor("blk.0.attn_q.weight", weights["model.layers.0.self_attn.q_proj.weight"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (self.folder / "valid.gguf").read_bytes()

    def safetensors(self, dice: random.Random) -> Case:
        """A safetensors file's header, and all that it says is there."""
        content, place = (self.model("llama") / "model.safetensors").read_bytes(), self.folder / "weights"
        place.mkdir(exist_ok=True)
        (place / "model.safetensors").write_bytes(changed_safetensors(dice, content))

        def run() -> None:
            with suppress(ValueError, OSError):  # as above
                checkpoint = checkpoint_for(place, tiny("llama").model)
                for name, shape in checkpoint.shapes.items() if checkpoint else ():
                    checkpoint.rows(name, 0, shape[0])

        return run

    def config(self, dice: random.Random) -> Case:
        """A model with a changed config.json: its shape is made, then it is loaded and asked."""
        folder, family = self.folder / "changed", dice.choice([*COMPILED, "gpt2", "jamba", "granitemoehybrid"])
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.model(family), folder)
        (folder / "config.json").write_bytes(changed_json(dice, json.loads((folder / "config.json").read_text())))
        dtype = dice.choice([None, "float32", "int8"])

        def run() -> None:
            shutil.rmtree(self.cache / "formats", ignore_errors=True)
            with suppress(OfframpError):
                outline(str(folder))
            Engine(load(str(folder), dtype)).generate([1, 2, 3], max_tokens=4)

        return run

    def exits(self, dice: random.Random) -> Case:
        """A folder of exits, which then decode."""
        folder, parts = self.folder / "exits", dice.choice([("ffn", "ffn"), ("linear", "deep"), ("mamba", "mamba")])
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._exits(*parts), folder)
        record, weights = folder / "offramp.json", folder / "exits.safetensors"
        if dice.random() < 0.7:
            record.write_bytes(changed_json(dice, json.loads(record.read_text())))
        else:
            weights.write_bytes(changed_safetensors(dice, weights.read_bytes()))
            signed = {**json.loads(record.read_text()), "weights_sha256": sha256(weights.read_bytes()).hexdigest()}
            record.write_text(json.dumps(signed))  # or the weights would be refused unread
        backbone = tiny(dice.choice(["llama", "llama/compiled"]))

        def run() -> None:
            exits = Exits.load(folder, backbone)
            for fill in ("project", "verify"):
                Engine(backbone, exits, fill=fill).generate([1, 2, 3], max_tokens=6)

        return run

    @cache  # noqa: B019
    def _exits(self, gate: str, readout: str) -> Path:
        exits_for("llama", gate, readout).save(self.folder / readout)
        return self.folder / readout

    def requests(self, dice: random.Random) -> Case:
        """The body of a request."""
        talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        schema = {"type": "object", "properties": {"a": {"type": "integer", "enum": [1, 2]}}, "required": ["a"]}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        path, body = dice.choice([
            ("chat/completions", {"messages": talk, "response_format": wanted}),
            ("chat/completions", {"messages": talk, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 3}),
            ("completions", {"prompt": dice.choice(["Hi", [1, 2, 3]]), "logprobs": 2, "echo": False}),
        ])  # fmt: skip
        more = {
            "model": "tiny", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 1, "n": 2,
            "stop": ["x"], "repetition_penalty": 1.1, "offramp": {"mode": "early", "ids": True}, "tools": [],
            "frequency_penalty": 0, "stream": dice.random() < 0.3, "stream_options": {"include_usage": True},
            "logit_bias": {},
        }  # fmt: skip
        body = {**body, **{name: value for name, value in more.items() if dice.random() < 0.5}}
        content = changed_bytes(dice, json.dumps(body).encode()) if dice.random() < 0.2 else changed_json(dice, body)
        client = self._client()

        def run() -> None:
            answer = client.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
            if answer.status_code >= 500 or "The engine failed" in answer.text:
                raise AssertionError(f"{answer.status_code} {answer.text[:300]} for {content[:2000]!r}")

        return run

    @cache  # noqa: B019
    def _client(self) -> Any:
        from starlette.testclient import TestClient

        from offramp.serve.answers import Rules
        from offramp.serve.api import app_of
        from offramp.serve.menu import Menu
        from offramp.serve.scheduler import Scheduler

        # Not the one that every test gets, since the chat template is set.
        tokenizer = copy.deepcopy(tiny("llama").tokenizer)
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        backbone, exits = Backbone(copy.deepcopy(tiny("llama").model), tokenizer, tiny("llama").source), exits_for("llama")
        backbone.use_compiled_blocks("float32")
        menu = Menu(backbone, ExitSet(exits), Engine(backbone, ExitSet(exits), mode="exact"))
        app = app_of(menu, Scheduler(), Rules("tiny", most_tokens=8))
        client = self._open.enter_context(TestClient(app, "http://localhost", raise_server_exceptions=False))
        assert client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}).status_code == 200
        return client

    def close(self) -> None:
        """End the server."""
        self._open.close()


NAMES = ["gguf", "safetensors", "config", "exits", "requests"]


@contextmanager
def limited() -> Iterator[None]:
    """Raises `Hang` after too long, and `MemoryError` where the process has grown too much."""

    def late(*_: Any) -> None:
        raise Hang

    before = peak_memory()
    old = {kind: signal.signal(kind, late) for kind in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SLOWEST)
    signal.alarm(LONGEST_WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for kind, handler in old.items():
            signal.signal(kind, handler)
    if peak_memory() - before > MOST_MEMORY:
        raise MemoryError(f"more than {MOST_MEMORY} bytes")


def run_one(targets: Targets, name: str, number: int) -> str:
    """Run an input. Returns the traceback of a finding, or nothing."""
    LAST.write_text(f"{name} --first {number} --count 1\n")
    case = getattr(targets, name)(random.Random(f"{name} {number}"))
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case()
    except OfframpError:
        return ""
    except KeyboardInterrupt:
        raise
    except BaseException:
        return traceback.format_exc()
    return ""


def main() -> None:
    """Run inputs of each target for so long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=NAMES, metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--count", type=int, default=10**9, help="the most inputs of a target")
    asked, found = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as folder:
        targets = Targets(Path(folder))
        os.environ["OFFRAMP_CACHE"] = str(targets.cache)
        for name in asked.targets:
            getattr(targets, name)(random.Random(0))  # what is made once takes long
            stop, number, findings = time.monotonic() + asked.seconds, asked.first, 0
            while time.monotonic() < stop and number < asked.first + asked.count:
                if trace := run_one(targets, name, number):
                    print(f"--- {name} {number}\n{trace}", flush=True)
                    findings += 1
                number += 1
            print(f"{name}: {number - asked.first} inputs, {findings} findings", flush=True)
            found += findings
        targets.close()
    sys.exit(found > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
