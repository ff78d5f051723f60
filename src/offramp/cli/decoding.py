"""The verbs that answer prompts: generate and chat."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.flags import Only
from offramp.cli.options import DecodingOptions, Json, Model
from offramp.cli.progress import reading_bar
from offramp.cli.shown import say
from offramp.decode.sampling import Sampling
from offramp.errors import BadInput
from offramp.machine import spare_memory
from offramp.settings import RESEARCH, setting

if TYPE_CHECKING:
    from offramp.decode.request import Generation, Token
    from offramp.model.backbone import Backbone

MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
SIDE_BY_SIDE = 8  # answers to a file of prompts that are made at a time
CHAT_SAMPLING = Sampling(repetition_penalty=1.1)


@dataclass(frozen=True)
class AnswerOptions:
    """How long an answer may be, and how the prompt is given."""

    max_tokens: int = setting(128, "Longest answer, in tokens.")
    stop: tuple[str, ...] = setting((), "End an answer before this text. May be repeated.")
    raw: bool = setting(False, "Give the prompt as it is, without the model's chat template.", panel=RESEARCH)
    compare: bool = setting(False, "Also answer at full depth, and compare.", panel=RESEARCH)


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The prompt. Or use --prompts.", show_default=False)] = None,
    *,
    decoding: Annotated[DecodingOptions, Only("mode", "exits", "dtype", "fill", "threshold")],
    sampling: Annotated[Sampling, Only("temperature", "top_p", "seed", "repetition_penalty")],
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, as lines or JSON lines with 'prompt'; prints JSON lines.")
    ] = None,
    options: AnswerOptions,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or a file of prompts."""
    texts = _prompts(prompt, prompts)
    spare_memory()
    loaded = decoding.load(model)
    backbone, engine = loaded.backbone, decoding.engine(loaded, sampling)
    engine.plan.check_use(options.max_tokens, options.raw)
    engines = [engine, loaded.engine("full", sampling)] if options.compare else [engine]
    tokens, stop = options.max_tokens, options.stop
    if not (as_json or prompts or options.compare):
        ids = backbone.prompts.encode(texts[0], options.raw)
        with reading_bar() as progress:
            for token in engine.stream(ids, progress=progress, max_tokens=tokens, stop=stop):
                say(token.text, end="")
        say("")
        return
    for start in range(0, len(texts), SIDE_BY_SIDE):
        batch = texts[start : start + SIDE_BY_SIDE]
        prompt_ids = [backbone.prompts.encode(text, options.raw) for text in batch]
        with reading_bar() as progress:
            answers, *others = (
                each.generate_batch(prompt_ids, progress=progress, max_tokens=tokens, stop=stop) for each in engines
            )
        references = others[0] if others else [None] * len(batch)
        for text, answer, reference in zip(batch, answers, references, strict=True):
            if as_json or prompts:
                say(json.dumps(_record(answer, reference, text if prompts else None)))
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
    from offramp.cli.terminal import answer_in_colour, modes_table

    assert reference is not None
    answer_in_colour(prompt, reference, answer)
    modes_table(f"{backbone.name}, {backbone.weight_format}", {"full": [reference], answer.mode: [answer]})


def chat(
    model: Model,
    *,
    decoding: Annotated[DecodingOptions, Only("mode", "exits", "dtype")],
    max_tokens: MaxTokens = 256,
    sampling: Annotated[Sampling, Only("temperature", "top_p", "seed")] = CHAT_SAMPLING,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")] = False,
) -> None:
    """Talk to the model. An empty line or Ctrl-D ends the talk."""
    from offramp.decode.request import Decided, Prefilled, Talk

    spare_memory()
    loaded = decoding.load(model)
    backbone, engine = loaded.backbone, decoding.engine(loaded, sampling)
    talk = Talk()
    messages: list[dict[str, str]] = []
    for prompt in _typed_lines("" if as_json or not sys.stdin.isatty() else "you> "):
        messages.append({"role": "user", "content": prompt})
        ids = backbone.prompts.encode_chat(messages)
        prefilled = started = time.perf_counter()
        batch = engine.batch()
        request = batch.add(ids, talk, max_tokens=max_tokens)
        with reading_bar() as progress:
            for event in batch.run(progress):
                if isinstance(event, Prefilled):
                    prefilled = time.perf_counter()
                elif isinstance(event, Decided) and not as_json:
                    _show_token(event.token)
        answer = engine.summarise(request, prefilled - started, time.perf_counter() - prefilled)
        say(json.dumps(_record(answer, None, prompt)) if as_json else "")
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


def _show_token(token: Token) -> None:
    from offramp.cli.terminal import shade

    print(shade(token), end="", flush=True)


def _record(answer: Generation, reference: Generation | None, prompt: str | None) -> dict[str, Any]:
    """An answer as JSON, with its prompt and full depth's answer if they are not None."""
    from offramp.metrics import token_f1

    record: dict[str, Any] = {"prompt": prompt} if prompt is not None else {}
    record |= asdict(answer)
    if reference is not None:
        record["full"] = asdict(reference)
        record["consistency"] = token_f1(answer.ids, reference.ids)
    return record
