"""The verbs that make something: train, calibrate, tune and export."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli.flags import Chosen, Only
from offramp.cli.options import DecodingOptions, Json, Model, Ray, Reference, cluster_at
from offramp.cli.progress import command_line, progress_bars, resumable
from offramp.errors import BadInput
from offramp.files import alone_in
from offramp.training.config import CalibrationConfig, TrainConfig, TuneConfig, draft_config


def train(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the exits.", show_default=False)],
    *,
    draft: Annotated[
        bool,
        typer.Option("--draft", help="Train one shallow exit that drafts for --fill verify, in OUTPUT/draft."),
    ] = False,
    settings: Annotated[dict[str, Any], Chosen(TrainConfig)],
    start: Annotated[
        Path | None,
        typer.Option(
            help="A folder of exits to go on from. They may be another model's of the same shape, such as the one that "
            "this model was tuned from.",
            show_default=False,
        ),
    ] = None,
    ray: Ray = None,
    decoding: Annotated[DecodingOptions, Only("dtype")],
    as_json: Json = False,
) -> None:
    """Train exits on the model's own answers. Ctrl-C is safe: the same command resumes the work."""
    from offramp.cli.terminal import training_table
    from offramp.exits.exits import DRAFT, Exits
    from offramp.training.teacher import made_shards
    from offramp.training.training import train as train_exits

    backbone = decoding.load(model)
    config = draft_config(backbone.kinds, **settings) if draft else TrainConfig(**settings)
    output = output / DRAFT if draft else output
    before = None if start is None else Exits.load(start, backbone, any_weights=True)
    with resumable(), cluster_at(ray) as cluster, progress_bars() as progress:
        make = cluster.made_shards if cluster else made_shards
        exits = train_exits(backbone, output, config, progress, command_line(), before, make)
    if as_json:
        print(json.dumps({"output": str(output), "thresholds": exits.policy.thresholds, **exits.training}))
    else:
        training_table(exits, output)


def calibrate(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(
            help="A file of prompts like those of later use: lines, or JSON lines with 'prompt' or 'question'.",
            show_default=False,
        ),
    ],
    *,
    decoding: Annotated[DecodingOptions, Only("exits", "dtype")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the calibrated exits. Default: --exits, if that is a folder."),
    ] = None,
    config: CalibrationConfig,
    reference: Reference = None,
    as_json: Json = False,
) -> None:
    """Set the exits' thresholds so that answers differ by at most RISK on average, with probability 1 − DELTA."""
    from offramp.cli.terminal import calibration_table
    from offramp.exits.sharing import on_the_hub
    from offramp.training.calibration import calibrate as calibrate_exits
    from offramp.training.losses import read_questions

    folder = output or (Path(decoding.exits) if decoding.exits and not on_the_hub(decoding.exits) else None)
    if folder is None:
        raise BadInput("There is no folder to keep the thresholds in.", "Name one: --exits DIR, or -o DIR for a new one.")
    questions = read_questions(prompts)
    backbone = decoding.load(model)
    exits = decoding.require_exits(backbone)
    reference_backbone = decoding.load(reference) if reference else None
    with alone_in(folder), progress_bars() as progress:
        record = calibrate_exits(backbone, exits, questions, config, reference_backbone, progress)
        exits.save(folder)
    if as_json:
        print(json.dumps({"model": backbone.name, "exits": str(folder), **exits.calibration, "passed": record.passed}))
    else:
        calibration_table(record, exits, folder)


def tune(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tuned model.", show_default=False)],
    *,
    config: TuneConfig,
    as_json: Json = False,
) -> None:
    """Tune a model so that its early blocks predict its last one: a LoRA with LayerSkip's loss. Ctrl-C is safe."""
    from offramp.cli.terminal import tuning_table
    from offramp.training.tuning import tune as tune_model

    backbone = DecodingOptions(dtype="float32").load(model, keep=True)
    with resumable(), progress_bars() as progress:
        record = tune_model(backbone, output, config, progress, command_line())
    if as_json:
        print(json.dumps({"output": str(output), **record}))
    else:
        tuning_table(record, output)


def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the repository.", show_default=False)],
    *,
    decoding: Annotated[DecodingOptions, Only("exits")],
    fill: Annotated[
        str | None,
        typer.Option(
            help="The fill of calls that name none: project, copy, freeze, defer or verify. Default: verify where exits "
            "that draft are there, else project.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write exits as a repository for transformers: model.generate(..., custom_generate="org/name")."""
    from offramp.decode.fills import fill_named
    from offramp.exits.exits import exits_and_drafts
    from offramp.exits.sharing import export as export_exits
    from offramp.model.loading import outline

    chosen = None if fill is None else fill_named(fill)
    backbone = outline(model)
    with warnings.catch_warnings():  # an outline runs in no weight format that could differ from the exits'
        warnings.simplefilter("ignore")
        exits, drafts = exits_and_drafts(backbone, decoding.exits)
    chosen = chosen or fill_named("verify" if drafts else "project")
    chosen(backbone)  # raises for a fill that this model cannot have
    export_exits(exits, output, backbone, chosen.name, drafts)
    print(f"{output}: exits of {backbone.name}, fill {chosen.name}.")
    print(f"To share it: hf upload org/name {output}")
