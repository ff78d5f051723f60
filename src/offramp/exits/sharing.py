"""Exits on the Hugging Face hub: their files, those of exits that draft, and a model card made from the record.

A repository can also hold what transformers needs to decode with the exits: `custom_generate/generate.py`, which names
offramp's function, and `custom_generate/requirements.txt`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp import __version__
from offramp.errors import BadInput, CorruptFile, ModelNotFound, reason_of
from offramp.files import write_atomically
from offramp.model.hub import is_hub_name, offline

if TYPE_CHECKING:
    from offramp.exits.exits import Exits
    from offramp.model.backbone import Backbone

CARD = "README.md"
SOME_NAME = "org/name"  # in the card of a folder, which does not know its name on the hub


def on_the_hub(name: str | Path) -> bool:
    """Whether exits of this name are on the hub, as in `org/name` or `org/name@revision`, and not in a folder."""
    return is_hub_name(str(name)) and not Path(name).exists()


def fetched(name: str) -> Path:
    """The folder on this machine with the files of a hub repository of exits. Raises `ModelNotFound`."""
    from huggingface_hub import snapshot_download

    from offramp.exits.exits import DRAFT, RECORD, WEIGHTS

    repository, _, revision = name.partition("@")
    files = [f"{folder}{file}" for folder in ("", f"{DRAFT}/") for file in (RECORD, WEIGHTS)]
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=files, local_files_only=offline())
        )
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        raise ModelNotFound(
            f"There are no exits '{name}': no such folder, and the hub says: {reason_of(error)}",
            "Check the name and the network, or name a folder that `offramp train` wrote.",
        ) from error


def push(exits: Exits, repository: str, drafts: Exits | None = None, private: bool = False, licence: str = "") -> str:
    """Upload exits, and perhaps those that draft, to a repository of the hub, which is made if it is not there.

    `licence`: an identifier of the hub, such as apache-2.0. The token is the one that `hf auth login` keeps. Returns the
    address of the commit. Raises `CorruptFile` where the hub refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        _write(exits, Path(temporary), drafts, card(exits, repository, drafts, licence))
        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=temporary, commit_message="Exits of offramp"))
        except Exception as error:  # as in `fetched`
            raise CorruptFile(
                f"The hub did not take the exits: {reason_of(error)}",
                "Log in (hf auth login), and check the name and the network.",
            ) from error


def export(exits: Exits, folder: Path, backbone: Backbone, fill: str, drafts: Exits | None = None) -> None:
    """Write what `push` uploads and the code for transformers: `model.generate(…, custom_generate=folder)`.

    `fill`: that of calls that name none. Files of the same names are replaced, as `save` does. Raises `BadInput` for the
    model's own folder.
    """
    if backbone.source.path and folder.resolve() == Path(backbone.source.path).resolve():
        raise BadInput(f"{folder} holds the model itself, whose {CARD} would be lost.", "Name another folder.")
    _write(exits, folder, drafts, card(exits, SOME_NAME, drafts, fill=fill))
    major, minor = __version__.split(".")[:2]
    requirements = REQUIREMENTS.format(least=__version__, below=f"{major}.{int(minor) + 1}")
    write_atomically(folder / "custom_generate" / "requirements.txt", requirements.encode())
    write_atomically(folder / "custom_generate" / "generate.py", GENERATE.format(fill=fill).encode())


def _write(exits: Exits, folder: Path, drafts: Exits | None, text: str) -> None:
    """Write the exits, those that draft, and the model card."""
    from offramp.exits.exits import DRAFT

    exits.save(folder)
    if drafts is not None:
        drafts.save(folder / DRAFT)
    write_atomically(folder / CARD, text.encode())


# transformers compares one version a line, and only the first of a line.
REQUIREMENTS = """# offramp is not on PyPI. Install it from its own repository.
offramp>={least}
offramp<{below}
"""
GENERATE = '''"""`model.generate` with the early exits of this repository. The package offramp does the work."""

from offramp import generate_with_exits

FILL = "{fill}"  # what skipped blocks remember; verify: exits draft, and full depth decides


def generate(model, fill=FILL, threshold=None, **arguments):
    """Take the arguments of `model.generate`, and of offramp: `fill`, and `threshold` in place of the exits' own policy."""
    return generate_with_exits(model, fill, threshold, **arguments)
'''


def card(exits: Exits, repository: str, drafts: Exits | None = None, licence: str = "", fill: str = "") -> str:
    """The model card: what the exits are for, how good they are, how they were made, and how to use them.

    `fill`: the default of the repository's `generate.py`, if it has one.
    """
    base = str(exits.backbone.get("name", ""))
    on_hub = base.count("/") == 1  # then the hub links the exits from the model's page
    header = {
        "library_name": "offramp",
        "license": licence,
        "base_model": base if on_hub else "",
        "base_model_relation": "adapter" if on_hub else "",
    }
    named = [f"{name}: {value}" for name, value in header.items() if value]
    places = ", ".join(f"{layer}{f' + {tail}' if tail else ''}" for layer, tail in exits.config.places)
    parts = [
        "\n".join(["---", *named, "tags:", "- early-exit", "- dynamax", *(["- custom_generate"] if fill else []), "---"]),
        f"# Early exits for {base}",
        f"Exits after blocks {places} of {exits.backbone.get('blocks')}, made with offramp "
        "([DYNAMAX](https://arxiv.org/abs/2504.20922)): easy tokens leave the network early.",
        "## How to use",
        *([IN_TRANSFORMERS.format(base=base if on_hub else "MODEL", repository=repository, fill=fill)] if fill else []),
        f'```\nofframp generate {base} "Why is the sky blue?" --exits {repository}\n```',
        PYTHON.format(base=base, repository=repository),
        *_quality("Exits that decide", exits),
        _guarantee(exits),
        *(_quality("Exits that draft, while full depth decides (`--fill verify`)", drafts) if drafts else []),
        *_making(exits),
    ]
    return "\n\n".join(parts) + "\n"


PYTHON = """```python
import offramp

model = offramp.load("{base}")
exits = offramp.Exits.from_pretrained("{repository}", model)
print(offramp.Engine(model, exits).generate("Why is the sky blue?").text)
```"""


IN_TRANSFORMERS = """\
`{repository}` stands for this repository, or for a folder with its files. In transformers, where the package offramp is
installed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = AutoModelForCausalLM.from_pretrained("{base}")
prompt = tokenizer("Why is the sky blue?", return_tensors="pt")
exits = {{"custom_generate": "{repository}", "trust_remote_code": True}}
model.generate(**prompt, **exits, streamer=TextStreamer(tokenizer), max_new_tokens=64)
```

`generate` also takes `fill=` (default: `{fill}`) and `threshold=`. With `fill="verify"`, exits draft and full depth
decides. With other fills the exits decide, and the answer may be another.

In offramp:"""


def _quality(title: str, exits: Exits) -> list[str]:
    rows = [row for row in exits.training.get("validation", []) if isinstance(row, dict)]
    lines = ["| after block | agreement | drafts right: first, second, third |", "|---|---|---|"]
    for row in rows:
        drafts = ", ".join(f"{share:.1%}" for share in row.get("acceptance") or []) or "–"
        lines.append(f"| {row.get('block')} | {row.get('agreement', 0):.1%} | {drafts} |")
    said = "How often an exit says what full depth says, on held-out answers of the model:"
    return [f"## {title}", said, "\n".join(lines)] if rows else []


def _guarantee(exits: Exits) -> str:
    known: dict[str, Any] = exits.calibration
    passed = [row for row in known.get("tested", []) if isinstance(row, dict) and row.get("passed")]
    if not passed:
        return "No guarantee: the thresholds were not calibrated."
    last, sure = passed[-1], 1 - known.get("delta", 0)
    return (
        f"Calibrated on {known.get('n')} prompts: with a probability of {sure:.0%}, an answer loses at most "
        f"{known.get('risk')} on average (loss: {known.get('loss')}, fill: {known.get('fill')}). On these prompts it lost "
        f"{last.get('loss', 0):.3f} and saved {last.get('flops_saved', 0):.1%} of FLOPs."
    )


def _making(exits: Exits) -> list[str]:
    known, config = exits.training, exits.config
    texts = ", ".join(str(row.get("prompts") or row.get("text")) for row in known.get("text", []) if isinstance(row, dict))
    purposes = {"adapters": "for read-outs", "gates": "for gates", "validation": "held out"}
    counts = [f"{known.get('tokens', {}).get(name, 0):,} {purpose}" for name, purpose in purposes.items()]
    return [
        "## How they were made",
        f"```\n{known.get('command', '')}\n```",
        f"Text: the model's own answers ({texts}), in tokens: {', '.join(counts)}. Gate: {config.gate}; read-out: "
        f"{config.readout}; weights: {exits.weight_format}.",
    ]
