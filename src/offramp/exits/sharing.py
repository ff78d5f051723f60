"""Exits on the Hugging Face hub: their files, and a model card made from their records.

A repository can also hold what transformers needs to decode with the exits: `custom_generate/generate.py`, which names
offramp's function, and `custom_generate/requirements.txt`. Their texts are in the folder `templates`.
"""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError

from offramp import __version__
from offramp.errors import BadInput, CorruptFile, ModelNotFound, reason_of
from offramp.exits.exits import Exits
from offramp.exits.format import RECORD, WEIGHTS
from offramp.files import write_atomically
from offramp.model.hub import is_hub_name, offline

if TYPE_CHECKING:
    from offramp.model.backbone import Backbone

CARD = "README.md"
SOME_NAME = "org/name"  # stands for the name on the hub, which a folder's card does not know


def on_the_hub(name: str | Path) -> bool:
    """Whether exits of this name are on the hub, as in `org/name` or `org/name@revision`, and not in a folder."""
    return is_hub_name(str(name)) and not Path(name).exists()


def fetched(name: str, folders: tuple[str, ...]) -> Path:
    """The folder on this machine with the files of exits of a hub repository's folders. Raises `ModelNotFound`."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    wanted = [(Path(folder) / file).as_posix() for folder in folders for file in (RECORD, WEIGHTS)]
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=wanted, local_files_only=offline())
        )
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        raise ModelNotFound(
            f"There are no exits '{name}': no such folder, and the hub says: {reason_of(error)}",
            "Check the name and the network, or name a folder that `offramp train` wrote.",
        ) from error


def push(exits: Any, repository: str, private: bool = False, licence: str = "") -> str:
    """Upload an `ExitSet` to a repository of the hub; arguments as for `ExitSet.push_to_hub`."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        exits.save(temporary)
        text = card(exits.early, exits.draft, repository, licence)
        write_atomically(Path(temporary) / CARD, text.encode())
        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=temporary, commit_message="Exits of offramp"))
        except Exception as error:  # as in `fetched`
            raise CorruptFile(
                f"The hub did not take the exits: {reason_of(error)}",
                "Log in (hf auth login), and check the name and the network.",
            ) from error


def export(exits: Any, folder: Path, backbone: Backbone) -> None:
    """Write the files that `push` uploads, and the code for transformers: `model.generate(…, custom_generate=folder)`.

    Files of the same names are replaced, as in `save`. Raises `BadInput` for the model's own folder.
    """
    if backbone.source.path and folder.resolve() == Path(backbone.source.path).resolve():
        raise BadInput(f"{folder} holds the model itself, and its {CARD} would be overwritten.", "Name another folder.")
    exits.save(folder)
    major, minor = __version__.split(".")[:2]
    below = f"{major}.{int(minor) + 1}"
    code = folder / "custom_generate"
    write_atomically(folder / CARD, card(exits.early, exits.draft, SOME_NAME, code=True).encode())
    write_atomically(code / "requirements.txt", _filled("requirements.txt.jinja", least=__version__, below=below).encode())
    write_atomically(code / "generate.py", _filled("generate.py.jinja").encode())


def card(early: Exits | None, draft: Exits | None, repository: str, licence: str = "", code: bool = False) -> str:
    """The model card: what the exits are for, how good they are, how they were made, and how to use them.

    `code`: the repository has code for transformers. Raises `CorruptFile` for records that hold nonsense.
    """
    titles = ("Exits that decide", early), ("The exit that drafts", draft)
    groups = [(title, exits) for title, exits in titles if exits]
    base = groups[0][1].owner.name
    try:
        passed = [row for row in (early.calibration if early else {}).get("tested", []) if row["passed"]]
        return _filled(
            "card.md",
            licence=licence,
            base=base,
            on_hub=base.count("/") == 1,  # then the hub links the exits from the model's page
            code=code,
            repository=repository,
            groups=groups,
            early=early,
            last=passed[-1] if passed else None,
            places=lambda exits: ", ".join(f"{layer}{f' + {tail}' if tail else ''}" for layer, tail in exits.config.places),
            shares=lambda row: ", ".join(f"{share:.1%}" for share in row.get("acceptance") or []) or "–",
            texts=_texts,
            counts=_counts,
        )
    except (TypeError, ValueError, KeyError, AttributeError, TemplateError) as error:  # a stranger's record
        raise CorruptFile(f"The record of the exits is damaged: {reason_of(error)}", "Train them again.") from error


def _texts(exits: Exits) -> str:
    rows = [row for row in exits.training.get("text", []) if isinstance(row, dict)]
    return ", ".join(str(row.get("prompts") or row.get("text")) for row in rows)


def _counts(exits: Exits) -> str:
    purposes = {"adapters": "for read-outs", "gates": "for gates", "validation": "held out"}
    tokens = exits.training.get("tokens", {})
    return ", ".join(f"{tokens.get(name, 0):,} {purpose}" for name, purpose in purposes.items())


def _filled(name: str, **values: Any) -> str:
    """A file of the folder `templates`, filled with values."""
    text = (files("offramp.exits") / "templates" / name).read_text("utf-8")
    return Environment(keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True).from_string(text).render(values)
