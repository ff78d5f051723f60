"""How fast does the server answer one client, and many at once, and what does its prompt cache save?

    .venv/bin/python benchmarks/clients.py [MODEL] [--dtype bfloat16] [--clients 1,4,16] [--requests 3] [--tokens 48]
    .venv/bin/python benchmarks/clients.py [MODEL] --against http://127.0.0.1:8080/v1

Starts `offramp serve` on a free port of this machine, and asks it with OpenAI's client. Answers are greedy and streamed.

1. Closed loop: each client asks, reads the answer to its end, and asks again. Clients begin one after the other. Prompts
   have about 256 tokens, and no two begin alike.
2. The prompt cache: the first token after a system prompt of about 500 tokens, the first time and the second time.
3. One stream beside the engine in this process, as `offramp generate` runs it, in turn.

`--against` puts the first load on another server that speaks OpenAI's protocol.
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import openai

import offramp
from load import Asked, Got, answer, at, served
from offramp import Engine
from offramp.errors import OfframpError
from offramp.evaluation.bench import PROMPTS as SHORT
from offramp.files import read_lines
from offramp.machine import machine
from offramp.training.data import PROMPTS

PROMPT_TOKENS, SYSTEM_TOKENS = 256, 500  # about so many, by characters
CHARACTERS = 4.6  # of a token of the prompts' text
STAGGER = 0.6  # seconds between the first requests of two clients
PAIRS = 5  # of the cache's and of the stream's measurements


def text_of(tokens: int, draw: random.Random) -> str:
    """Questions, up to about so many tokens, that no other text begins with."""
    lines = [f"Note {draw.randrange(10**6)}."]
    while sum(map(len, lines)) < tokens * CHARACTERS:
        lines.append(draw.choice(read_lines(PROMPTS, ())))
    return " ".join(lines)


def streamed(client: Any, model: str, messages: list[dict[str, str]], tokens: int) -> Got:
    """One streamed answer."""
    settings = {"model": model, "temperature": 0, "max_tokens": tokens}
    return answer(client, Asked(messages, tokens, True, "whole"), settings, time.monotonic())


def closed_loop(client: Any, model: str, clients: int, requests: int, tokens: int) -> str:
    """A row of the table: throughput, and times to the first token and for each next one, of so many clients."""
    draw = random.Random(clients)
    texts = [[text_of(PROMPT_TOKENS, draw) for _ in range(requests)] for _ in range(clients)]

    def work(number: int) -> list[Got]:
        time.sleep(STAGGER * number)
        return [streamed(client, model, [{"role": "user", "content": text}], tokens) for text in texts[number]]

    start = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        got = [each for answers in threads.map(work, range(clients)) for each in answers]
    seconds = time.monotonic() - start
    firsts = sorted(each.first for each in got)
    later = sorted((each.last - each.first) / (each.tokens - 1) for each in got if each.tokens > 1)
    cells = [at(values, share) for values in (firsts, later) for share in (0.5, 0.95)]
    return f"| {clients} | {sum(each.tokens for each in got) / seconds:.0f} | {' | '.join(cells)} |"


def cache(client: Any, model: str) -> str:
    """What the first token costs after a long system prompt that is new, and after one that was seen."""
    draw, times = random.Random(0), []
    for _ in range(PAIRS):
        system = {"role": "system", "content": text_of(SYSTEM_TOKENS, draw)}
        asked = [[system, {"role": "user", "content": text}] for text in ("Why?", "How is it done?")]
        firsts = [streamed(client, model, messages, 4).first for messages in asked]
        times.append(firsts)
    new, seen = (median(firsts[place] for firsts in times) for place in (0, 1))
    ratio = median(first / second for first, second in times)
    shown = f"{1000 * new:.0f} ms, the second time {1000 * seen:.0f} ms: {ratio:.1f} times sooner"
    return f"first token after a system prompt: {shown}"


def stream(client: Any, model: str, dtype: str, tokens: int) -> str:
    """The rate of one stream over HTTP beside the engine's in this process, in turn, prompt by prompt."""
    backbone = offramp.load(model, dtype).backbone
    engine = Engine(backbone, offramp.ExitSet.shipped(backbone).drafting, fill="verify")
    ratios, rates = [], []
    for turn in range(PAIRS + 1):
        seconds = [0.0, 0.0]
        count = [0, 0]
        for text in SHORT:
            got = streamed(client, model, [{"role": "user", "content": text}], tokens)
            made = engine.generate(text, max_tokens=tokens)
            for side, (spent, decoded) in enumerate(
                ((got.last - got.first, got.tokens), (len(made.tokens) / made.decode_tokens_per_second, len(made.tokens)))
            ):
                seconds[side], count[side] = seconds[side] + spent, count[side] + decoded
        if turn:
            ours, alone = (tokens / spent for tokens, spent in zip(count, seconds, strict=True))
            rates.append(ours)
            ratios.append(ours / alone)
    spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
    return f"one stream: {median(rates):.0f} tokens/s, {median(ratios):.2f} ({spread}) of the engine's in this process"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--against", help="another server's address, such as http://127.0.0.1:8080/v1")
    args = parser.parse_args(argv)

    def loops(client: Any) -> None:
        closed_loop(client, args.model, 1, 1, 8)  # a warm-up
        print("| clients | tokens/s | first token, ms: p50 | p95 | a token, ms: p50 | p95 |\n|---|---|---|---|---|---|")
        for clients in map(int, args.clients.split(",")):
            print(closed_loop(client, args.model, clients, args.requests, args.tokens), flush=True)

    print(f"{args.model}, {args.dtype}; {machine()}\n")
    try:
        if args.against:
            loops(openai.OpenAI(base_url=args.against, api_key="none", timeout=600))
            return
        with served(args.model, args.dtype) as (address, _):
            client = openai.OpenAI(base_url=address, api_key="none", timeout=600)
            loops(client)
            print(f"\n{cache(client, args.model)}", flush=True)
            print(stream(client, args.model, args.dtype, args.tokens))
    except OfframpError as error:
        parser.error(f"{error} {error.hint}")


if __name__ == "__main__":
    main()
