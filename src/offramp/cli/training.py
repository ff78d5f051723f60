"""The verbs that make something: train, calibrate and export."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli.flags import Chosen, Only
from offramp.cli.options import DecodingOptions, Json, Model, Ray, cluster_at
from offramp.cli.progress import command_line, progress_bars, resumable
from offramp.cli.shown import say
from offramp.errors import BadInput
from offramp.files import alone_in
from offramp.training.config import CalibrationConfig, TrainConfig, draft_config


def train(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the exits.", show_default=False)],
    *,
    draft: Annotated[
        bool,
        typer.Option("--draft", help="Train an exit that drafts for the mode exact, in OUTPUT/draft."),
    ] = False,
    settings: Annotated[dict[str, Any], Chosen(TrainConfig)],
    start: Annotated[
        Path | None,
        typer.Option(
            help="Folder of exits to go on from, of this model or of another one of the same shape.", show_default=False
        ),
    ] = None,
    ray: Ray = None,
    decoding: Annotated[DecodingOptions, Only("dtype")],
    as_json: Json = False,
) -> None:
    """Train exits on the model's own answers. Ctrl-C is safe: the same command resumes the work."""
    from offramp.cli.terminal import training_table
    from offramp.exits.exit_set import DRAFT
    from offramp.exits.exits import Exits
    from offramp.training.answering import made_shards
    from offramp.training.training import train as train_exits

    backbone = decoding.load(model).backbone
    config = draft_config(backbone.kinds, **settings) if draft else TrainConfig(**settings)
    output = output / DRAFT if draft else output
    before = None if start is None else Exits.load(start, backbone, any_weights=True)
    with resumable(), cluster_at(ray) as cluster, progress_bars() as progress:
        make = cluster.made_shards if cluster else made_shards
        exits = train_exits(backbone, output, config, progress, command_line(), before, make)
    if as_json:
        say(json.dumps({"output": str(output), "thresholds": exits.policy.thresholds, **exits.training}))
    else:
        training_table(exits, output)


def calibrate(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(
            help="File of prompts like those of later use, as lines or as JSON lines with 'prompt' or 'question'.",
            show_default=False,
        ),
    ],
    *,
    decoding: Annotated[DecodingOptions, Only("exits", "dtype")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the calibrated exits (default: that of --exits)."),
    ] = None,
    config: CalibrationConfig,
    as_json: Json = False,
) -> None:
    """Set early's thresholds: answers lose at most RISK on average, with probability 1 − DELTA."""
    from offramp.cli.terminal import calibration_table
    from offramp.exits.exit_set import no_exits
    from offramp.exits.sharing import on_the_hub
    from offramp.training.calibration import calibrate as calibrate_exits
    from offramp.training.losses import read_questions

    given = decoding.exits
    kept = given and not on_the_hub(given) and Path(given).suffix != ".gguf"
    folder = output or (Path(given) if given and kept else None)
    if folder is None:
        raise BadInput("There is no folder to keep the thresholds in.", "Name one: --exits DIR, or -o DIR for a new one.")
    questions = read_questions(prompts)
    loaded = decoding.load(model)
    backbone, exits = loaded.backbone, loaded.exits.early
    if exits is None:
        raise no_exits(backbone)
    with alone_in(folder), progress_bars() as progress:
        record = calibrate_exits(backbone, exits, questions, config, progress=progress)
        loaded.exits.save(folder)
    if as_json:
        say(json.dumps({"model": backbone.name, "exits": str(folder), **exits.calibration, "passed": record.passed}))
    else:
        calibration_table(record, exits, folder)


def export(
    model: Model,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for a repository for transformers.", show_default=False)
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(help="Folder for the files of the program without Python, offramp-run.", show_default=False),
    ] = None,
    decoding: Annotated[DecodingOptions, Only("exits")],
) -> None:
    """Write exits for transformers, model.generate(..., custom_generate="org/name"), or for offramp-run."""
    if (output is None) == (gguf is None):
        raise BadInput("Name one folder: -o for transformers, or --gguf for the program without Python.", "--gguf DIR")
    if gguf is not None:
        from offramp.decode.native import EXITS, MODEL, write

        modes = write(decoding.load(model), gguf)
        say(f"{gguf}: {MODEL}, and {EXITS} with the modes {', '.join(modes)}.")
        say(f'Then: offramp-run {gguf / MODEL} "Why is the sky blue?" --exits {gguf / EXITS}')
    if output is not None:
        _export_for_transformers(model, output, decoding.exits)


def _export_for_transformers(model: str, output: Path, named: str | None) -> None:
    from offramp.exits.exit_set import ExitSet, no_exits
    from offramp.exits.sharing import export as export_exits
    from offramp.model.loading import outline

    backbone = outline(model)
    with warnings.catch_warnings():  # an outline runs in no weight format that could differ from the exits'
        warnings.simplefilter("ignore")
        exits = ExitSet.find(named, backbone)
    if not exits:
        raise no_exits(backbone)
    export_exits(exits, output, backbone)
    say(f"{output}: exits of {backbone.name}.")
    say(f"To share it: hf upload org/name {output}")
