"""A header is believed only as far as the file goes: damaged safetensors and GGUF files are refused, in words."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import exits_for, run_cli
from models import saved, tiny
from offramp import Exits, load
from offramp.errors import CorruptFile
from offramp.model.checkpoint import Gguf
from offramp.model.headers import read_gguf, read_safetensors

U32, STRING, ARRAY = 4, 8, 9  # GGUF's types of values
F32, Q4_0 = 0, 2  # and of tensors


def safetensors_file(path: Path, header: object, data: int = 24) -> Path:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def tensor(start: int, stop: int, shape: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor(0, 24, [7])},  # another length than the shape's
        {"a": tensor(0, 24, [2, 3], "BF16")},
        {"a": tensor(0, 16, [4]), "b": tensor(0, 16, [4]), "c": tensor(16, 24, [2])},  # one over another
        {"a": tensor(0, 8, [2]), "b": tensor(12, 24, [3])},  # a hole
        {"a": tensor(24, 0, [6])},
        {"a": tensor(-8, 16, [6])},
        {"a": tensor(0, 24, [-2, -3])},
        {"a": tensor(0, 24, [2.0, 3])},
        {"a": tensor(0, 24, [2**62, 2**62])},
        {"a": tensor(0, 24, "12")},
        {"a": tensor(0, 24, [24], "F128")},
        {"a": tensor(0, 24, [6], ["F32"])},
        {"a": tensor(0, 28, [7])},  # beyond the file
        {"a": tensor(0, 16, [4])},  # not to its end
        {"a": {"dtype": "F32", "shape": [6]}},
        {"a": None},
        [1, 2],
        "{",
        "[" * 100_000,
        '{"a": ' * 100_000,
    ],
)
def test_a_safetensors_header_that_does_not_fit_its_file_is_refused(header: object, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=r"x\.safetensors"):
        read_safetensors(safetensors_file(tmp_path / "x.safetensors", header))


def test_all_of_a_safetensors_file_is_found(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "none": torch.empty(0, 4), "one": torch.tensor(1.0), "ids": torch.arange(5)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_safetensors(tmp_path / "x.safetensors")
    assert {name: place.shape for name, place in found.items()} == {name: (*part.shape,) for name, part in tensors.items()}
    assert torch.equal(found["a"].read(0, 2).view(torch.float32).view(2, 3), tensors["a"])


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def gguf_tensor(shape: tuple[int, ...], kind: int = F32, offset: int = 0, name: str = "a") -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_file(
    path: Path, fields: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None
) -> Path:
    """A GGUF file with 64 bytes of data. `counts`: how many tensors and fields it claims to have."""
    known = (field("general.architecture", STRING, text("llama")), *fields)
    head = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(known)))) + b"".join([*known, *tensors])
    path.write_bytes(head + bytes(-len(head) % 32 + 64))
    return path


@pytest.mark.parametrize(
    "parts",
    [
        {"counts": (2**60, 1)},
        {"counts": (0, 2**60)},
        {"fields": (struct.pack("<Q", 2**60),)},  # the length of a key
        {"fields": (field("a", STRING, struct.pack("<Q", 2**40)),)},
        {"fields": (field("a", ARRAY, struct.pack("<IQ", U32, 2**62)),)},
        {"fields": (field("a", ARRAY, struct.pack("<IQ", STRING, 2**62)),)},
        {"fields": (field("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000),)},
        {"fields": (field("a", 99, b""),)},
        {"fields": (field("general.alignment", U32, struct.pack("<I", 0)),), "tensors": (gguf_tensor((16,)),)},
        {"fields": (field("general.alignment", STRING, text("x")),)},
        {"fields": (field("general.alignment", U32, struct.pack("<I", 2**31)),), "tensors": (gguf_tensor((16,)),)},
        {"fields": (field("general.architecture", U32, struct.pack("<I", 5)),)},
        {"tensors": (gguf_tensor((17,)),)},
        {"tensors": (gguf_tensor((16,), offset=32),)},
        {"tensors": (gguf_tensor((16,), offset=2**63),)},
        {"tensors": (gguf_tensor((2**40, 2**40)),)},
        {"tensors": (gguf_tensor((2**32, 2**32)),)},  # 2 ** 64 entries, 0 in 64 bits
        {"tensors": (gguf_tensor((4, 0)),)},
        {"tensors": (gguf_tensor((1,) * 5),)},
        {"tensors": (gguf_tensor((16, 2), Q4_0),)},  # half a block
        {"tensors": (gguf_tensor((16,), 77),)},
        {"tensors": (text("a") + struct.pack("<I", 2**32 - 1),)},
    ],
)
def test_a_gguf_header_that_does_not_fit_its_file_is_refused(parts: dict, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)):
        read_gguf(gguf_file(tmp_path / "x.gguf", **parts))


def test_a_gguf_header_is_read(tmp_path: Path) -> None:
    words = field("words", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("b"))
    parts = (gguf_tensor((4, 2)), gguf_tensor((32, 1), Q4_0, 32, "b"))
    architecture, places = read_gguf(gguf_file(tmp_path / "x.gguf", (words,), parts))
    assert architecture == "llama"
    assert [(place.shape, place.row_bytes) for place in places.values()] == [((2, 4), 16), ((1, 32), 18)]
    assert places["b"].offset - places["a"].offset == 32


def test_a_model_with_a_damaged_header_gets_a_sentence_and_a_hint(tmp_path: Path, own_cache: Path) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    some = next(name for name, part in weights.items() if part.shape == (32, 32))
    at = content.index(b"[32,32]", content.index(some.encode()))
    (folder / "model.safetensors").write_bytes(content[:at] + b"[32,64]" + content[at + 7 :])
    claimed = gguf_file(tmp_path / "x.gguf", counts=(2**60, 1))
    for name in (folder, claimed):
        ran = run_cli("generate", str(name), "Hello")
        assert ran.code == 1
        assert "cannot be read" in ran.stderr
        assert "fetch it again" in ran.stderr


def test_a_config_that_names_more_weights_than_the_files_hold_is_refused(tmp_path: Path, own_cache: Path) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100_000}))
    with pytest.raises(CorruptFile, match="its config names"):
        load(str(folder), "float32")


def test_a_tensor_of_a_shape_that_the_library_does_not_expect_is_refused(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "x.gguf", tensors=(gguf_tensor((), name="blk.0.attn_q.weight"),))
    with pytest.raises(ValueError, match="cannot have the shape"):
        Gguf(file, tiny("llama").model).shapes  # noqa: B018


def test_a_threshold_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    exits_for("llama").save(tmp_path)
    record = json.loads((tmp_path / "offramp.json").read_text())
    record["policy"]["thresholds"][0] = 10**400
    (tmp_path / "offramp.json").write_text(json.dumps(record))
    with pytest.raises(CorruptFile, match="damaged"):
        Exits.load(tmp_path, tiny("llama"))
