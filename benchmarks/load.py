"""How does the server hold under many clients? Every answer is compared with the same answer alone.

    .venv/bin/python benchmarks/load.py [MODEL] [--clients 64] [--requests 300] [--dtype float32] [--hostile 0]

Starts `offramp serve` on a free port of this machine, and asks it with OpenAI's client: prompts of mixed lengths, half of
them streamed. A tenth is cancelled after a few tokens, a twentieth is malformed. Then it checks that no answer was lost or
mixed up, that malformed requests got status 400, and how much memory the server took. `--minutes` goes on for so long
instead of for a number of requests. `--against URL` puts the same load on another server that speaks OpenAI's protocol,
without checks. `--hostile 8` adds eight clients that send `hostile_requests` without a pause, and leave half of them early.

Prints a table: throughput, and times to the first token, for a token, and for a request. Answers of `exact` are full
depth's, and in float32 they are compared token for token; other formats are only timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import openai

import offramp
from offramp.files import read_lines
from offramp.training.data import PROMPTS

PATIENCE = 120.0  # seconds for the server to start
SYSTEM = "You are a helpful assistant that answers in plain words. " * 4


@dataclass(frozen=True)
class Asked:
    """One request of the load."""

    messages: list[dict[str, str]]
    tokens: int
    streamed: bool
    kind: str  # whole, cancelled or malformed


@dataclass(frozen=True)
class Got:
    """What became of a request: its text (None without one), HTTP status, and seconds to the first and the last token."""

    text: str | None
    status: int
    first: float
    last: float
    tokens: int


def load_of(count: int, seed: int = 0) -> list[Asked]:
    """So many requests: short and long prompts, with and without a system prompt that many share."""
    draw, lines = random.Random(seed), read_lines(PROMPTS, ())
    made = []
    for number in range(count):
        several = draw.choices(lines, k=draw.choice((1, 1, 1, 4, 12)))
        messages = [{"role": "user", "content": " ".join(several)}]
        if draw.random() < 0.5:
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        kind = "cancelled" if number % 10 == 7 else "malformed" if number % 20 == 13 else "whole"
        made.append(Asked(messages, draw.choice((8, 24, 48)), draw.random() < 0.5 or kind == "cancelled", kind))
    return made


def hostile_requests() -> list[dict[str, Any]]:
    """Requests for chats that ask for much, or for nonsense."""
    many = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(2000)}}
    chain = {f"d{number}": {"items": {"$ref": f"#/$defs/d{number + 1}"}} for number in range(1200)}
    wide = {"anyOf": [{"type": "object", "properties": {f"a{number}": {"type": "string"}}} for number in range(900)]}
    schemas = [many, {"$defs": chain, "$ref": "#/$defs/d0"}, wide, {"type": "string", "pattern": "^(.*a.{100}){9}$"}]
    forms = [{"type": "json_schema", "json_schema": {"name": "x", "schema": schema}} for schema in schemas]
    short = [{"role": "user", "content": "What is 9?"}]
    three = {"messages": short, "n": 3, "max_tokens": 30}
    asked: list[dict[str, Any]] = [{**three, "response_format": form} for form in forms]
    asked.append({"messages": [{"role": "user", "content": "9" * 900_000}]})
    asked.append({"messages": [{"role": "user", "content": "x"}] * 1000, "max_tokens": 1})
    asked.append({"messages": short, "n": 16, "logprobs": True, "top_logprobs": 20, "stop": ["\0" * 256] * 16})
    return asked


@contextmanager
def hostile(address: str, model: str, clients: int) -> Iterator[Counter[int]]:
    """So many clients send `hostile_requests`, and wait 0.2 or 10 seconds for an answer. Yields a count of statuses."""
    over, requests, statuses = threading.Event(), hostile_requests(), Counter[int]()
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)

    def harm(number: int) -> None:
        while not over.is_set():
            status = 0  # left before it was answered
            with suppress(openai.APITimeoutError):
                try:
                    patient = client.with_options(timeout=(0.2, 10)[number % 2])
                    patient.chat.completions.create(model=model, **requests[number % len(requests)])
                    status = 200
                except openai.APIStatusError as error:
                    status = error.status_code
            statuses[status] += 1
            number += 1

    with ThreadPoolExecutor(max(1, clients)) as threads:
        for number in range(clients):
            threads.submit(harm, number)
        try:
            yield statuses
        finally:
            over.set()


def ask(client: Any, model: str, asked: Asked) -> Got:
    """Send one request. A refusal is tried again as long as the server asks for it."""
    settings: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": asked.tokens}
    if asked.kind == "malformed":
        settings["temperature"] = -1
    start = time.monotonic()
    while True:
        try:
            return answer(client, asked, settings, start)
        except openai.RateLimitError as error:
            time.sleep(float(error.response.headers["retry-after"]))
        except openai.APIStatusError as error:
            return Got(None, error.status_code, 0.0, 0.0, 0)


def answer(client: Any, asked: Asked, settings: dict[str, Any], start: float) -> Got:
    """The answer to one request."""
    if not asked.streamed:
        found = client.chat.completions.create(messages=asked.messages, **settings)
        seconds = time.monotonic() - start
        return Got(found.choices[0].message.content, 200, seconds, seconds, found.usage.completion_tokens)
    text, first, tokens = "", 0.0, 0
    with client.chat.completions.create(messages=asked.messages, stream=True, **settings) as parts:
        for part in parts:
            # Other servers begin with an empty part, before they have read the prompt.
            if part.choices and part.choices[0].finish_reason is None and (text or part.choices[0].delta.content):
                first, tokens = first or time.monotonic() - start, tokens + 1
                text += part.choices[0].delta.content or ""
            if asked.kind == "cancelled" and tokens == 3:
                break
    return Got(text, 200, first, time.monotonic() - start, tokens)


@contextmanager
def served(model: str, dtype: str | None) -> Iterator[tuple[str, int]]:
    """`offramp serve` on a free port: its address and its process. It is ended by SIGTERM, and must then end by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        "from offramp.cli import main; main()",
        "serve",
        model,
        "--port",
        str(port),
        "--mode",
        "exact",
    ]
    process = subprocess.Popen([*command, *(["--dtype", dtype] if dtype else [])], stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}/v1", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until something listens at the port."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise SystemExit("The server did not start.")


def resident(process: int) -> float:
    """The memory that a process has in use, in MiB."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(
    address: str, model: str, asked: list[Asked], clients: int, minutes: float, process: int | None
) -> tuple[list[Any], Any]:
    """All requests, so many at a time; with `minutes`, again and again for so long. Pairs, and the memory at times."""
    pairs: list[tuple[Asked, Got]] = []
    memory: list[float] = []
    end, lock, turn = time.monotonic() + 60 * minutes, threading.Lock(), iter(range(10**9))
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)

    def work(_: int) -> None:
        while True:
            with lock:
                number = next(turn)
                if process is not None and number % 25 == 0:
                    memory.append(resident(process))
            if time.monotonic() > end if minutes else number >= len(asked):
                return
            one = asked[number % len(asked)]
            got = ask(client, model, one)
            with lock:
                pairs.append((one, got))

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(work, range(clients)))
    return pairs, memory


def check(pairs: list[tuple[Asked, Got]], model: str, dtype: str | None) -> list[str]:
    """What went wrong; answers in float32 are compared with the same engine's alone."""
    wrong = []
    engine = offramp.Engine(offramp.load(model, dtype).backbone) if dtype == "float32" else None
    alone: dict[str, str] = {}
    for asked, got in pairs:
        if asked.kind == "malformed":
            wrong += [f"status {got.status} for a malformed request"] if got.status != 400 else []
        elif got.text is None:
            wrong.append(f"status {got.status}")
        elif engine is not None:
            key = json.dumps([asked.messages, asked.tokens])
            if key not in alone:
                ids = engine.backbone.prompts.encode_chat(asked.messages)
                alone[key] = engine.generate(ids, max_tokens=asked.tokens).text
            same = alone[key].startswith(got.text) if asked.kind == "cancelled" else alone[key] == got.text
            wrong += [] if same else [f"{got.text!r} instead of {alone[key]!r}"]
    return wrong


def at(values: list[float], share: float) -> str:
    """The quantile of sorted times, in ms."""
    return f"{1000 * values[min(len(values) - 1, int(share * len(values)))]:.0f}" if values else "–"


def table(pairs: list[tuple[Asked, Got]], seconds: float) -> str:
    """The measures of answered requests, as a Markdown table."""
    whole = [(asked, got) for asked, got in pairs if asked.kind == "whole" and got.text is not None]
    firsts = sorted(got.first for asked, got in whole if asked.streamed)
    each = sorted((got.last - got.first) / (got.tokens - 1) for asked, got in whole if asked.streamed and got.tokens > 1)

    rate = sum(got.tokens for _, got in pairs) / seconds
    lasts = sorted(got.last for _, got in whole)
    cells = [f"{rate:.0f}", *(at(values, share) for values in (firsts, each, lasts) for share in (0.5, 0.95))]
    head = "| tokens/s | first token, ms: p50 | p95 | a token, ms: p50 | p95 | a request, ms: p50 | p95 |\n"
    head += f"{7 * '|---'}|\n"
    return f"{head}| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--dtype", help="the weights' format; float32 compares every answer")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on for so long")
    parser.add_argument("--hostile", type=int, default=0, help="clients more that try to disturb the others")
    parser.add_argument("--against", help="another server's address, such as http://127.0.0.1:8080/v1")
    args = parser.parse_args(argv)
    asked, start = load_of(args.requests), time.monotonic()
    if args.against:
        pairs, memory = run(args.against, args.model, asked, args.clients, args.minutes, None)
        wrong: list[str] = []
    else:
        with served(args.model, args.dtype) as (address, process):
            start = time.monotonic()
            with hostile(address, args.model, args.hostile) as statuses:
                pairs, memory = run(address, args.model, asked, args.clients, args.minutes, process)
        if statuses:
            print(f"{args.hostile} hostile clients got these statuses (0: left before): {dict(statuses)}")
    seconds = time.monotonic() - start
    if not args.against:
        wrong = check(pairs, args.model, args.dtype)
    kinds = Counter(one.kind for one, _ in pairs)
    print(f"{args.clients} clients, {len(pairs)} requests in {seconds:.1f} s: {dict(kinds)}")
    print(table(pairs, seconds))
    if memory:
        later = memory[len(memory) // 2 :]
        print(f"memory, MiB: {memory[0]:.0f} at first, {statistics.median(later):.0f} later, {max(memory):.0f} at most")
    print("\n".join(wrong[:5]) or "no answer was wrong, lost or mixed up" * (args.dtype == "float32"))
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(pairs)} requests went wrong")


if __name__ == "__main__":
    main()
