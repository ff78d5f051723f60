"""Average the weights of models, each trained from the one before (arXiv 2203.05482).

    python -m lm.average MODEL MODEL [...] -o MEAN

The mean is often better than each model: every training ends in another place around the same minimum, and the loss in the
middle is lower. Everything but the weights comes from the last model. `training.json` keeps the records of all models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.corpus import command_line, report
from lm.train import save, versions
from offramp.errors import BadInput, OfframpError


def average(folders: list[Path], out: Path, command: str = "") -> dict[str, Any]:
    """Save the mean of the models' weights in `out`, and return its record.

    Raises `BadInput` for a folder without a training record, and for models of different shapes.
    """
    records = []
    for folder in folders:
        try:
            records.append(json.loads((folder / "training.json").read_text()))
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder} is no folder that lm.train made.", "Name at least two of them.") from error
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False) for folder in folders
    ]
    mean = models[-1]
    states = [model.state_dict() for model in models]
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
    if any(shape != shapes[-1] for shape in shapes):
        raise BadInput("The models have different shapes.", "Average models that were trained one from another.")
    mean.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in shapes[-1]})
    record = {
        "command": command,
        "parameters": sum(parameter.numel() for parameter in mean.parameters()),
        "corpus": records[-1]["corpus"],
        "versions": versions(),
        "models": [{name: value for name, value in model.items() if name != "corpus"} for model in records],
    }
    save(mean, AutoTokenizer.from_pretrained(folders[-1], trust_remote_code=False), out, record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="folders made by python -m lm.train")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the mean's folder")
    args = parser.parse_args()
    try:
        average(args.models, args.out, command_line())
    except OfframpError as error:
        report(parser, error)


if __name__ == "__main__":
    main()
