"""The verbs that answer prompts: demo, generate and chat."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import DecodingOptions, Json, Model, check_batch
from offramp.cli.progress import reading_bar
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput
from offramp.machine import spare_memory
from offramp.settings import setting

if TYPE_CHECKING:
    from offramp.decode.request import Generation, Token
    from offramp.model.backbone import Backbone

MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
DEMO_QUESTIONS = {
    "smollm2": [
        "Why is the sky blue?",
        "What did the Romans use concrete for?",
        "List three uses of vinegar in the house.",
    ],
    "mamba-tiny": [
        "What is the capital of France?",
        "Which planet is the largest?",
        "Who wrote Romeo and Juliet?",
    ],
}
CHAT_SAMPLING = Sampling(repetition_penalty=1.1)


def demo(
    questions: Annotated[
        list[str] | None, typer.Argument(help="Questions to ask. Default: three that come with offramp.")
    ] = None,
    *,
    model: Annotated[
        str | None, typer.Option(help="The model to ask. Default: smollm2. Another model must have exits (--exits).")
    ] = None,
    decoding: DecodingOptions,
    max_tokens: MaxTokens = 40,
    both: Annotated[
        bool, typer.Option("--both", help="Ask the Transformer and the Mamba model that come with offramp.")
    ] = False,
) -> None:
    """Answer a few questions at full depth and with exits, and show after which block each token left.

    If an exit drafts for the model, the table shows verified drafts, too: the same answer as full depth's.
    """
    from offramp.cli.terminal import answer_in_colour, comparison_table

    if both and (decoding.exits or model):
        raise BadInput("--both asks two models; --model and --exits name one.", "Leave --both out, or the others.")
    names = list(DEMO_QUESTIONS) if both else [model or "smollm2"]
    loaded = []
    for name in names:
        backbone = decoding.load(name)
        pair = decoding.engines(backbone, decoding.require_exits(backbone))
        loaded.append((name, backbone, [*pair, *decoding.drafting(backbone)]))
    compared = []
    for name, backbone, engines in loaded:
        answered = []
        for question in questions or DEMO_QUESTIONS.get(name.removesuffix("-ee"), DEMO_QUESTIONS["smollm2"]):
            with reading_bar() as progress:
                answers = [engine.generate(question, progress=progress, max_tokens=max_tokens) for engine in engines]
            answered.append(tuple(answers))
            answer_in_colour(question, answers[0], answers[1], name if both else None)
        compared.append((backbone, answered))
    comparison_table(compared)


@dataclass(frozen=True)
class AnswerOptions:
    """How long an answer may be, how the prompt is given, and how many answers are made at a time."""

    max_tokens: int = setting(128, "Longest answer, in tokens.")
    stop: tuple[str, ...] = setting((), "End an answer before this text. May be repeated.")
    raw: bool = setting(False, "Give the prompt as it is, without the model's chat template.")
    compare: bool = setting(False, "Also answer at full depth, and compare.")
    batch: int = setting(1, "With --prompts: number of answers side by side.")


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The prompt. Or use --prompts.", show_default=False)] = None,
    *,
    decoding: DecodingOptions,
    sampling: Sampling,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts: lines, or JSON lines with 'prompt'. Prints JSON lines.")
    ] = None,
    options: AnswerOptions,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or a file of prompts. A token leaves the network early where an exit is sure enough."""
    texts = _prompts(prompt, prompts)
    check_batch(options.batch)
    spare_memory()
    backbone = decoding.load(model)
    # The gain of verified decoding shows only beside full depth.
    compare = options.compare or (as_json and decoding.verifies)
    decoding = decoding.chosen_for(backbone, sampling, options.batch)
    full, early = decoding.engines(backbone, decoding.find_exits(backbone), sampling)
    early.check_use(options.max_tokens, options.raw)
    tokens, stop = options.max_tokens, options.stop
    if not (as_json or prompts or options.compare):
        ids = backbone.prompts.encode(texts[0], options.raw)
        with reading_bar() as progress:
            for token in early.stream(ids, progress=progress, max_tokens=tokens, stop=stop):
                print(token.text, end="", flush=True)
        print()
        return
    for start in range(0, len(texts), options.batch):
        batch = texts[start : start + options.batch]
        prompt_ids = [backbone.prompts.encode(text, options.raw) for text in batch]
        with reading_bar() as progress:
            answers, *others = (
                engine.generate_batch(prompt_ids, progress=progress, max_tokens=tokens, stop=stop)
                for engine in ([early, full] if compare else [early])
            )
        references = others[0] if others else [None] * len(batch)
        for text, answer, reference in zip(batch, answers, references, strict=True):
            if as_json or prompts:
                print(json.dumps(_record(answer, reference, text if prompts else None)), flush=True)
            else:
                _show_compared(backbone, text, answer, reference)


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    from offramp.files import read_lines

    if (prompt is None) == (file is None):
        raise BadInput("Give either a prompt or --prompts FILE.", 'For example: offramp generate smollm2 "Hello!"')
    prompts = read_lines(file, ("prompt", "question")) if file else [prompt or ""]
    if not all(text.strip() for text in prompts):
        raise BadInput("The prompt is empty.", "Give some text to continue.")
    return prompts


def _show_compared(backbone: Backbone, prompt: str, answer: Generation, reference: Generation | None) -> None:
    from offramp.cli.terminal import answer_in_colour, comparison_table

    assert reference is not None
    answer_in_colour(prompt, reference, answer)
    comparison_table([(backbone, [(reference, answer)])])


def chat(
    model: Model,
    *,
    decoding: DecodingOptions,
    max_tokens: MaxTokens = 256,
    sampling: Sampling = CHAT_SAMPLING,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")] = False,
) -> None:
    """Talk to the model. An empty line or Ctrl-D ends the talk."""
    from offramp.decode.request import Decided, Prefilled, Talk

    spare_memory()
    backbone = decoding.load(model)
    decoding = decoding.chosen_for(backbone, sampling)
    _, early = decoding.engines(backbone, decoding.find_exits(backbone), sampling)
    talk = Talk()
    messages: list[dict[str, str]] = []
    for prompt in _typed_lines("" if as_json or not sys.stdin.isatty() else "you> "):
        messages.append({"role": "user", "content": prompt})
        ids = backbone.prompts.encode_chat(messages)
        prefilled = started = time.perf_counter()
        batch = early.batch()
        request = batch.add(ids, talk, max_tokens=max_tokens)
        with reading_bar() as progress:
            for event in batch.run(progress):
                if isinstance(event, Prefilled):
                    prefilled = time.perf_counter()
                elif isinstance(event, Decided) and not as_json:
                    _show_token(event.token, backbone)
        answer = early.summarise(request, prefilled - started, time.perf_counter() - prefilled)
        print(json.dumps(_record(answer, None, prompt)) if as_json else "", flush=True)
        messages.append({"role": "assistant", "content": answer.text})


def _typed_lines(prompt: str) -> Iterator[str]:
    """Lines from stdin, up to an empty line or the end."""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def _show_token(token: Token, backbone: Backbone) -> None:
    from offramp.cli.terminal import shade

    print(shade(token, backbone.n_blocks), end="", flush=True)


def _record(answer: Generation, reference: Generation | None, prompt: str | None) -> dict[str, Any]:
    """An answer as JSON, with its prompt and full depth's answer if they are not None."""
    from offramp.metrics import token_f1

    record: dict[str, Any] = {"prompt": prompt} if prompt is not None else {}
    record |= asdict(answer)
    if reference is not None:
        record["full"] = asdict(reference)
        record["consistency"] = token_f1(answer.ids, reference.ids)
    return record
