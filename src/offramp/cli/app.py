"""The command line: one short function a verb. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from offramp.errors import BadInput, OfframpError

if TYPE_CHECKING:
    from offramp.decode.engine import Engine
    from offramp.decode.request import Generation
    from offramp.decode.sampling import Sampling
    from offramp.exits.exits import Exits
    from offramp.exits.policy import Policy
    from offramp.model.backbone import Backbone
    from offramp.progress import Progress

app = typer.Typer(
    help="Early exits for any Hugging Face causal language model: easy tokens leave the network early.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(
        help="A hub name (org/name), a local folder, a GGUF file, or an alias (smollm2, mamba-tiny, mamba-tiny-ee).",
        show_default=False,
    ),
]
ExitsFolder = Annotated[
    str | None,
    typer.Option("--exits", help="Folder with trained exits. Without it: the exits that ship for this model, if any."),
]
Fill = Annotated[
    str,
    typer.Option(
        help="What skipped blocks keep of a token: project (keys, values and Mamba state made of the exit's hidden state), "
        "copy (the last block's keys and values), freeze (the Mamba state as it was), defer (exact, computed with the next "
        "token that goes on), verify (as defer, and full depth decides)."
    ),
]
Threshold = Annotated[
    str | None,
    typer.Option(
        help="Confidence a token must exceed to leave, 0 to 1: one for all exits, or one for each (1,1,0.9,0.8). "
        "1 closes an exit, 0 opens it to all. Default: the exits' own policy, of which nothing is kept otherwise."
    ),
]
Confidence = Annotated[
    str | None,
    typer.Option(
        help="gate (learned), or training-free: max-prob, margin, entropy, or patience: the share of open exits that "
        "agree in a row (all need --threshold). Default: the exits'."
    ),
]
Decay = Annotated[float, typer.Option(help="Thresholds that fall over so many tokens of an answer (CALM); 0: they do not.")]
Candidates = Annotated[
    int,
    typer.Option(
        help="Read out only so many tokens that a sketch of the head names, such as 2048; 0: all. Needs "
        "--threshold, and exits with a sketch."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Weights: bfloat16, float32, int8, int4 or int4-head4. Default: bfloat16 where it passes the self-check."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for another program to read.")]
Raw = Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the model's chat template.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text. May be repeated.")]
Reference = Annotated[
    str | None,
    typer.Option(help="Compare with this model's full depth instead: the one that MODEL was tuned from."),
]
Penalty = Annotated[float, typer.Option(help="Repetition penalty; 1 is none.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token; above, tokens are drawn.")]
TopK = Annotated[int, typer.Option(help="Draw from so many most probable tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the most probable tokens that together have this probability.")]
MinP = Annotated[float, typer.Option(help="Draw from tokens with at least this share of the highest probability.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]


def main() -> None:
    """Entry point: every error a user can cause ends in one sentence and a hint, never in a traceback."""
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except OfframpError as error:
        _fail(str(error), error.hint, 1)
    except KeyboardInterrupt:
        _fail("Stopped.", "", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say nothing more
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", "", 1)


def _fail(message: str, hint: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(code)


@app.command()
def demo(
    questions: Annotated[list[str] | None, typer.Argument(help="Questions to ask. Default: a few of ours.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model to ask; exits must ship with it or be given. Default: smollm2.")
    ] = None,
    exits: ExitsFolder = None,
    threshold: Threshold = None,
    fill: Fill = "project",
    dtype: Dtype = None,
    max_tokens: MaxTokens = 40,
    both: Annotated[
        bool, typer.Option("--both", help="Ask the Transformer and the Mamba model that come with offramp.")
    ] = False,
) -> None:
    """Answer a few questions at full depth and with exits, and show which block each token left at."""
    from offramp.cli.terminal import answer_in_colour, comparison_table

    if both and (exits or model):
        raise BadInput("--both asks two models; --model and --exits name one.", "Leave --both out, or the others.")
    names = list(DEMO_QUESTIONS) if both else [model or "smollm2"]
    loaded = []
    for name in names:
        backbone = _load(name, dtype)
        found = _exits(backbone, exits, fill)
        if found is None:
            raise BadInput(f"No exits ship for {name}.", f"Train some: offramp train {name} -o DIR, then add --exits DIR.")
        loaded.append((backbone, _engines(backbone, found, _policy(backbone, found, threshold), fill)))
    asked = []
    for name, (backbone, (full, early)) in zip(names, loaded, strict=True):
        pairs = []
        for question in questions or DEMO_QUESTIONS.get(name.removesuffix("-ee"), DEMO_QUESTIONS["smollm2"]):
            pairs.append((full.generate(question, max_tokens=max_tokens), early.generate(question, max_tokens=max_tokens)))
            answer_in_colour(question, *pairs[-1], name if both else None)
        asked.append((backbone, pairs))
    comparison_table(asked)


DEMO_QUESTIONS = {
    "smollm2": [
        "Why is the sky blue?",
        "Why do cats purr?",
        "Describe the taste of a ripe mango.",
    ],
    "mamba-tiny": [
        "What is the capital of France?",
        "Which planet is the largest?",
        "Who wrote Romeo and Juliet?",
    ],
}


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The prompt. Or use --prompts.", show_default=False)] = None,
    exits: ExitsFolder = None,
    fill: Fill = "project",
    threshold: Threshold = None,
    confidence: Confidence = None,
    decay: Decay = 0.0,
    candidates: Candidates = 0,
    dtype: Dtype = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    raw: Raw = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer at full depth, and compare.")] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts (lines, or JSON lines with 'prompt'); writes JSON lines.")
    ] = None,
    batch: Annotated[int, typer.Option(help="With --prompts: so many answers side by side.")] = 1,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or a file of them, leaving the network early where an exit is sure enough."""
    from offramp.decode.sampling import Sampling
    from offramp.files import read_lines

    if (prompt is None) == (prompts is None):
        raise BadInput("Give either a prompt or --prompts FILE.", 'For example: offramp generate smollm2 "Hello!"')
    many = read_lines(prompts, ("prompt", "question")) if prompts else [prompt or ""]
    if any(not one.strip() for one in many):
        raise BadInput("The prompt is empty.", "Give some text to go on from.")
    if batch < 1:
        raise BadInput(f"{batch} answers side by side are too few.", "Give --batch 1 or more.")
    sampling = Sampling(temperature, top_k, top_p, min_p, seed, repetition_penalty)
    backbone = _load(model, dtype)
    found = _exits(backbone, exits, fill)
    full, early = _engines(
        backbone, found, _policy(backbone, found, threshold, confidence, decay, candidates), fill, sampling
    )
    ends = tuple(stop or ())
    if not (as_json or prompts or compare):
        for token in early.stream(backbone.prompts.encode(many[0], raw), max_tokens=max_tokens, stop=ends):
            print(token.text, end="", flush=True)
        print()
        return
    # What verified decoding is for can only be seen beside full depth.
    compare = compare or (as_json and fill == "verify")
    for start in range(0, len(many), batch):
        some = many[start : start + batch]
        ids = [backbone.prompts.encode(one, raw) for one in some]
        answers = early.generate_batch(ids, max_tokens=max_tokens, stop=ends)
        references = full.generate_batch(ids, max_tokens=max_tokens, stop=ends) if compare else [None] * len(some)
        for one, answer, reference in zip(some, answers, references, strict=True):
            if as_json or prompts:
                print(json.dumps(_record(answer, reference, one if prompts else None)), flush=True)
            else:
                from offramp.cli.terminal import answer_in_colour, comparison_table

                assert reference is not None
                answer_in_colour(one, reference, answer)
                comparison_table([(backbone, [(reference, answer)])])


@app.command()
def chat(
    model: Model,
    exits: ExitsFolder = None,
    fill: Fill = "project",
    threshold: Threshold = None,
    dtype: Dtype = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    repetition_penalty: Penalty = 1.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")] = False,
) -> None:
    """Talk to the model. An empty line or Ctrl-D ends the talk."""
    from offramp.cli.terminal import shade
    from offramp.decode.request import Decided, Prefilled, Talk
    from offramp.decode.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, seed, repetition_penalty)
    backbone = _load(model, dtype)
    found = _exits(backbone, exits, fill)
    _, early = _engines(backbone, found, _policy(backbone, found, threshold), fill, sampling)
    talk = Talk()
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("" if as_json or not sys.stdin.isatty() else "you> ")
        except EOFError:
            return
        if not said.strip():
            return
        messages.append({"role": "user", "content": said})
        ids = backbone.prompts.encode_chat(messages)
        started = prefilled = time.perf_counter()
        batch = early.batch()
        request = batch.add(ids, talk, max_tokens=max_tokens)
        for event in batch.run():
            if isinstance(event, Prefilled):
                prefilled = time.perf_counter()
            elif isinstance(event, Decided) and not as_json:
                print(shade(event.token, backbone.n_blocks), end="", flush=True)
        if as_json:
            answer = early.summarise(request, prefilled - started, time.perf_counter() - prefilled)
            print(json.dumps(_record(answer, None, said)), flush=True)
        else:
            print()
        text = "".join(token.text for token in request.tokens)
        messages.append({"role": "assistant", "content": text})


@app.command()
def train(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the exits.", show_default=False)],
    layers: Annotated[
        str | None, typer.Option(help="Blocks run before each exit: 10,15,20,25. Default: four places.")
    ] = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="Instead, one early exit that drafts for --fill verify, in OUTPUT/draft.")
    ] = False,
    gate: Annotated[str | None, typer.Option(help="Exit classifier: linear, ffn or mamba. Default: mamba.")] = None,
    readout: Annotated[
        str | None, typer.Option(help="Adapter before the LM head: none, linear, mamba or deep. Default: mamba.")
    ] = None,
    gate_width: Annotated[int, typer.Option(help="Bottleneck of a gate, in dims; a multiple of 16.")] = 64,
    readout_width: Annotated[
        int | None, typer.Option(help="Bottleneck of a read-out, a multiple of 32. Default: 512, with --draft 256.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Plain text, or JSON lines with 'text', to read too. Repeatable.")
    ] = None,
    own_prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to answer: lines, or JSON lines with 'prompt'. Default: a list of ours."),
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(help="Use only the first so many prompts.")] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(help="Longest answer to a prompt. Default: 48, with --draft 96.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the text for the adapters. Default: 4, with --draft 8.")
    ] = None,
    gate_epochs: Annotated[int, typer.Option(help="Passes over the text for the gates.")] = 4,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest learning rate of the adapters. Default: 0.003, with --draft 0.002.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="An exit agrees if its token is among the full model's k best.")] = 1,
    sketch: Annotated[
        int | None,
        typer.Option(
            help="Dims of a sketch of the head, for --candidates; a multiple of 32; 0: none. Default: where it pays."
        ),
    ] = None,
    precision: Annotated[float, typer.Option(help="Agreement that the default thresholds ask for.")] = 0.98,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Train exits from the model's own answers. Ctrl-C is safe: the same command goes on where it stopped."""
    from offramp.exits.exits import DRAFT
    from offramp.training.config import TrainConfig, draft_config
    from offramp.training.training import train

    given = {
        "layers": _layers(layers),
        "gate": gate,
        "readout": readout,
        "readout_width": readout_width,
        "prompts": str(own_prompts) if own_prompts else None,
        "answer_tokens": answer_tokens,
        "epochs": epochs,
        "learning_rate": learning_rate,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None} | {
        "gate_width": gate_width,
        "texts": tuple(map(str, text or ())),
        "max_prompts": max_prompts,
        "gate_epochs": gate_epochs,
        "top_k": top_k,
        "sketch": sketch,
        "precision": precision,
        "seed": seed,
    }
    backbone = _load(model, dtype)
    config = draft_config(backbone.n_blocks, **settings) if draft else TrainConfig(**settings)
    output = output / DRAFT if draft else output
    try:
        with _progress() as progress:
            exits = train(backbone, output, config, progress, " ".join(["offramp", *sys.argv[1:]]))
    except KeyboardInterrupt:
        _fail("Stopped.", "Nothing is lost: the same command goes on from here.", 130)
    if as_json:
        print(json.dumps({"output": str(output), "thresholds": exits.policy.thresholds, **exits.training}))
    else:
        from offramp.cli.terminal import training_table

        training_table(exits, output)


@app.command()
def calibrate(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(
            help="Prompts like those to come: lines, or JSON lines with 'prompt' or 'question'.", show_default=False
        ),
    ],
    exits: ExitsFolder = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the calibrated exits. Default: that of --exits.")
    ] = None,
    risk: Annotated[float, typer.Option(help="Highest expected loss of an answer, 0 to 1.")] = 0.05,
    delta: Annotated[float, typer.Option(help="How likely the guarantee may fail.")] = 0.05,
    loss: Annotated[
        str,
        typer.Option(
            help="How much an answer differs: f1 (1 - token F1 with full depth's), exact (0 or 1), task (how much worse it "
            "scores against the prompts' 'answer')."
        ),
    ] = "f1",
    policy: Annotated[
        str, typer.Option(help="What to choose: thresholds, decay (they fall along an answer), patience, fixed (a block).")
    ] = "thresholds",
    confidence: Confidence = None,
    fill: Fill = "project",
    max_tokens: MaxTokens = 48,
    stop: Stop = None,
    raw: Raw = False,
    reference: Reference = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Set the exits' thresholds so that answers differ by at most RISK on average, with probability 1 - DELTA."""
    from offramp.training.calibration import calibrate, read_questions

    if exits is None and output is None:
        raise BadInput("There is no folder to keep the thresholds in.", "Name one: --exits DIR, or -o DIR for a new one.")
    folder = output or Path(exits or "")
    questions = read_questions(prompts)
    backbone = _load(model, dtype)
    found = _exits(backbone, exits)
    if found is None:
        raise BadInput(f"No exits ship for {backbone.name}.", f"Train some: offramp train {backbone.name} -o DIR")
    other = _load(reference, dtype) if reference else None
    chosen = confidence or found.policy.confidence
    with _progress() as progress:
        settings = (risk, delta, loss, fill, policy, chosen, max_tokens, tuple(stop or ()), raw, other)
        record = calibrate(backbone, found, questions, *settings, progress)
    if exits and folder == Path(exits):
        found.save_record(folder)
    else:
        found.save(folder)
    if as_json:
        print(json.dumps({"model": backbone.name, "exits": str(folder), **found.calibration, "passed": record.passed}))
    else:
        from offramp.cli.terminal import calibration_table

        calibration_table(record, found, folder)


@app.command()
def tune(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tuned model.", show_default=False)],
    rank: Annotated[int, typer.Option(help="Rank of the low-rank update.")] = 32,
    skip: Annotated[float, typer.Option(help="How often a sample skips the last block; others more seldom.")] = 0.05,
    exit_scale: Annotated[float, typer.Option(help="How much early blocks weigh beside the last one.")] = 0.02,
    own_prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to answer: lines, or JSON lines with 'prompt'. Default: a list of ours."),
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(help="Use only the first so many prompts.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Plain text, or JSON lines with 'text', to read too. Repeatable.")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(help="Longest answer to a prompt.")] = 96,
    epochs: Annotated[int, typer.Option(help="Passes over the text.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-4,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Json = False,
) -> None:
    """Change the model so that its early blocks say what it will say: a LoRA with LayerSkip's loss. Ctrl-C is safe."""
    from offramp.training.config import TuneConfig
    from offramp.training.tuning import tune

    config = TuneConfig(
        rank=rank,
        skip=skip,
        exit_scale=exit_scale,
        prompts=str(own_prompts) if own_prompts else None,
        max_prompts=max_prompts,
        texts=tuple(map(str, text or ())),
        answer_tokens=answer_tokens,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
    )
    backbone = _load(model, "float32", keep=True)
    try:
        with _progress() as progress:
            record = tune(backbone, output, config, progress, " ".join(["offramp", *sys.argv[1:]]))
    except KeyboardInterrupt:
        _fail("Stopped.", "Nothing is lost: the same command goes on from here.", 130)
    if as_json:
        print(json.dumps({"output": str(output), **record}))
    else:
        from offramp.cli.terminal import tuning_table

        tuning_table(record, output)


@app.command("eval")
def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help="Of truthfulqa, truthfulqa-mc, triviaqa, coqa; several with commas.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="The task's official file, or TASK=FILE for one of several tasks. Default: from the hub."),
    ] = None,
    exits: ExitsFolder = None,
    fill: Fill = "project",
    threshold: Annotated[
        list[str] | None,
        typer.Option(help="As for generate; may be repeated, to measure each. Default: the exits' own, calibrated or not."),
    ] = None,
    confidence: Confidence = None,
    decay: Decay = 0.0,
    candidates: Candidates = 0,
    dtype: Dtype = None,
    reference: Reference = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions of each task.")] = None,
    batch: Annotated[int, typer.Option(help="So many answers side by side.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the intervals' resampling.")] = 0,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.", show_default=False)] = None,
) -> None:
    """Score answers on a task, with exits and at full depth, and say what they cost. Ctrl-C is safe."""
    from offramp.cli.terminal import result_line
    from offramp.evaluation.evaluation import Condition, Evaluation, save_results
    from offramp.evaluation.tasks import load_task
    from offramp.files import cache_folder

    if batch < 1:
        raise BadInput(f"{batch} answers side by side are too few.", "Give --batch 1 or more.")
    names = task.split(",")
    tasks = [load_task(name, _file_for(name, names, data or []), limit) for name in names]
    backbone = _load(model, dtype)
    other = _load(reference, dtype) if reference else None
    found = _exits(backbone, exits, fill)
    conditions = [Condition()]
    if found is not None:
        settings: list[str | None] = [*threshold] if threshold else [None]
        policies = [_policy(backbone, found, one, confidence, decay, candidates) for one in settings]
        conditions += [Condition(fill, policy, found) for policy in policies]
    elif threshold:
        _policy(backbone, None, threshold[0])
    work = out.with_name(f".{out.name}.answers") if out else cache_folder() / "answers"
    results, runs = [], []
    try:
        for one in tasks:
            with _progress() as progress:
                command = " ".join(["offramp", *sys.argv[1:]])
                run = Evaluation(backbone, one, work, other, batch, seed, command, progress)
                done = [run.run(condition) for condition in conditions]
            runs.append(run)
            for result in done:
                result_line(result)
            results += done
    except KeyboardInterrupt:
        _fail("Stopped.", "Nothing is lost: the same command goes on from here.", 130)
    if out:
        save_results(results, out)
    for file in {file for run in runs for file in run.files}:
        file.unlink(missing_ok=True)
    with suppress(OSError):  # another run's answers are there too
        work.rmdir()


def _file_for(task: str, tasks: list[str], data: list[str]) -> str | None:
    """What `--data` names for a task."""
    named = dict(one.split("=", 1) for one in data if "=" in one)
    plain = [one for one in data if "=" not in one]
    if len(plain) > 1 or (plain and len(tasks) > 1) or set(named) - set(tasks):
        raise BadInput("It is not clear which --data is for which task.", "For example: --data triviaqa=FILE")
    return named.get(task, plain[0] if plain else None)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Files that offramp eval --json wrote.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write; its figures lie beside it.")],
) -> None:
    """Make a page to look at from results: quality and consistency against cost, exits by position, coloured answers."""
    from offramp.evaluation.evaluation import load_results
    from offramp.evaluation.report import write

    figures = write(load_results(results), output)
    print(f"{output}, and {len(figures)} figures in {figures[0].parent}" if figures else output)


@app.command()
def inspect(model: Model, exits: ExitsFolder = None, dtype: Dtype = None, as_json: Json = False) -> None:
    """Show a model's blocks, where exits would go and what a token costs there. The config is enough."""
    from offramp.cli.terminal import anatomy, anatomy_table
    from offramp.model.loading import outline

    backbone = outline(model, dtype)
    facts = anatomy(backbone, _exits(backbone, exits))
    if as_json:
        print(json.dumps(facts))
    else:
        anatomy_table(facts)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="The model, as for generate.")] = "smollm2",
    against: Annotated[str, typer.Option(help="What to compare with: transformers.")] = "transformers",
    dtype: Dtype = "bfloat16",
    tokens: Annotated[int, typer.Option(help="Tokens to decode in each run.")] = 48,
    prefill: Annotated[
        int | None, typer.Option(help="Time reading a prompt of so many tokens instead of decoding.")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights of the model's shape: only its config is needed.")
    ] = False,
    fills: Annotated[
        str | None, typer.Option(help="Instead, compare fills beside one another: full,defer,verify.", show_default=False)
    ] = None,
    exits: ExitsFolder = None,
    threshold: Threshold = None,
    pairs: Annotated[int, typer.Option(help="Pairs of runs, taking turns.")] = 5,
    as_json: Json = False,
) -> None:
    """Time decoding at full depth beside another library: paired runs, so that a slow minute meets both."""
    from offramp.evaluation.bench import compare, compare_fills, compare_prefill

    if against != "transformers":
        raise BadInput(f"'{against}' cannot be compared with here.", "Use transformers; `make bench` has more peers.")
    if tokens < 2 or pairs < 1 or (prefill is not None and prefill < 2):
        raise BadInput("A run needs at least 2 tokens, and there must be at least one pair.", "Try --tokens 48 --pairs 5.")
    if random:
        from offramp.model.loading import outline

        backbone = outline(model, dtype, random=True)
    else:
        backbone = _load(model, dtype, keep=fills is None)
    if fills is not None:
        from offramp.cli.terminal import fills_table

        found = {fill: None if fill == "full" else _exits(backbone, exits, fill) for fill in fills.split(",")}
        if any(one is None for fill, one in found.items() if fill != "full"):
            raise BadInput(f"{backbone.name} has no exits to open.", f"Train some: offramp train {backbone.name} -o DIR")
        policies = {fill: _policy(backbone, one, threshold) for fill, one in found.items() if one}
        fills_result = compare_fills(backbone, found, policies, tokens, pairs)
        print(json.dumps(asdict(fills_result))) if as_json else fills_table(asdict(fills_result))
        return
    result = asdict(compare(backbone, tokens, pairs) if prefill is None else compare_prefill(backbone, prefill, pairs))
    if as_json:
        print(json.dumps(result))
    else:
        from offramp.cli.terminal import bench_table

        bench_table(result)


def _load(model: str, dtype: str | None, keep: bool = False) -> Backbone:
    with _status(f"Loading {model} …"):
        from offramp.model.loading import load

        return load(model, dtype, keep=keep)


def _exits(backbone: Backbone, folder: str | None, fill: str = "") -> Exits | None:
    """The exits in a folder, or those that ship with offramp; for verified decoding, those that draft."""
    from offramp.exits.exits import load_exits, shipped_for

    draft = fill == "verify"
    return load_exits(folder, backbone, draft) if folder else shipped_for(backbone, draft)


def _engines(
    backbone: Backbone, exits: Exits | None, policy: Policy | None, fill: str, sampling: Sampling | None = None
) -> tuple[Engine, Engine]:
    """One engine at full depth, and one with the exits, under the same settings."""
    from offramp.decode.engine import Engine

    return Engine(backbone, sampling=sampling), Engine(backbone, exits, policy, fill, sampling)


def _policy(
    backbone: Backbone,
    exits: Exits | None,
    threshold: str | None,
    confidence: str | None = None,
    decay: float = 0.0,
    candidates: int = 0,
) -> Policy | None:
    """What the flags say; None for the exits' own policy."""
    from offramp.exits.policy import Policy

    if threshold is None:
        if decay or candidates or (confidence and exits and confidence != exits.policy.confidence):
            raise BadInput(
                f"{f'The confidence {confidence!r}' if confidence else 'A policy of your own'} has no default threshold.",
                "Give one: --threshold 0.9",
            )
        return None
    try:
        thresholds = tuple(float(part) for part in threshold.split(","))
    except ValueError:
        raise BadInput(
            f"'{threshold}' is not a threshold.", "For example --threshold 0.9, or --threshold 1,1,0.9,0.8"
        ) from None
    if exits is None:
        if min(thresholds) < 1:
            raise BadInput(f"{backbone.name} has no exits to open.", f"Train some: offramp train {backbone.name} -o DIR")
        return None
    thresholds = thresholds * len(exits) if len(thresholds) == 1 else thresholds
    return Policy(thresholds, confidence or exits.policy.confidence, decay, candidates)


def _record(answer: Generation, reference: Generation | None, prompt: str | None) -> dict[str, Any]:
    from offramp.metrics import token_f1

    record: dict[str, Any] = {"prompt": prompt} if prompt is not None else {}
    record |= asdict(answer)
    if reference is not None:
        record["full"] = asdict(reference)
        record["consistency"] = token_f1(answer.ids, reference.ids)
    return record


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"'{text}' is not a list of block numbers.", "For example: --layers 10,15,20,25") from None


@contextmanager
def _status(message: str) -> Iterator[None]:
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note="")
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield report
