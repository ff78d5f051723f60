"""One peer of the speed benchmark. It loads its model once, then answers requests, one JSON line each.

    PYTHON benchmarks/peers.py PEER [options]

`benchmarks/speed.py` starts it in the peer's own environment, so it imports only the peer's library, and offramp only for
the peer `offramp`. Its first line is {"ready": {...}}, with versions, formats, and how the peer is run. Then

    {"op": "generate", "ids": [...], "tokens": 64}          →  {"ids", "prefill_seconds", "decode_seconds", "decode_tokens"}
    {"op": "score", "ids": [...]}                           →  {"nll": [...]}
    {"op": "prefill", "ids": [...]}                         →  {"ids", "seconds", "tokens"}
    {"op": "batch", "prompts": [[...], ...], "tokens": 64}  →  {"ids", "seconds", "tokens"}
    {"op": "teach", "prompts": 128, "tokens": 64}           →  {"seconds", "tokens"}

`generate` is greedy, takes one prompt at a time, and makes exactly `tokens` new tokens, even after an end of text. Prefill
lasts until the first of them is out (with drafts, the first few); decoding is the rest. `score` gives −ln p of ids[1:],
each after all the ids before it. `prefill` reads a prompt and chooses one token. `batch` answers all prompts at once, as
`generate` does. `teach` makes answers for training exits, to the first prompts that come with offramp. The `seconds` of
these three are from the request to its end, and their `tokens` are those read (`prefill`) or made. A request that fails
gives {"error": ...}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch_peers import (
    Out,
    formats,
    hugging_face,
    nll,
    streamed,
    torch_batch,
    torch_facts,
    torch_prefill,
    torch_score,
    versions,
)

CONTEXT = 4096  # tokens that llama.cpp reserves memory for


@dataclass(frozen=True)
class Peer:
    """What a worker serves.

    `facts` are for the reader of the table. Their `weight_bytes` are the bytes of weights that a token must read; None if
    the number differs from token to token. `generate(ids, tokens, out)` calls `out` with new tokens as soon as the library
    hands them over: one, or several where drafts were accepted. `score` is None where the library gives no logits. The
    others are None where nothing is compared by them: `prefill(ids)` gives the next token, `batch(prompts, tokens)` the
    answers, `teach(prompts, tokens)` the number of tokens made.
    """

    facts: dict[str, Any]
    generate: Callable[[list[int], int, Out], None]
    score: Callable[[list[int]], list[float]] | None
    prefill: Callable[[list[int]], int] | None = None
    batch: Callable[[list[list[int]], int], list[list[int]]] | None = None
    teach: Callable[[int, int], int] | None = None


def offramp_peer(args: argparse.Namespace) -> Peer:
    """offramp's engine at full depth."""
    import torch

    import offramp
    from offramp.model.compiled.runtime import Compiled

    torch.set_num_threads(args.threads)
    model = offramp.load(args.model, args.dtype).backbone
    # Without this, the engine would stop at an end of text.
    type(model).stop_ids = frozenset()  # type: ignore[method-assign,assignment]
    engine = offramp.Engine(model)

    def generate(ids: list[int], tokens: int, out: Out) -> None:
        for token in engine.stream(ids, max_tokens=tokens):
            out([token.id])

    def batch(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        return [answer.ids for answer in engine.generate_batch(prompts, max_tokens=tokens)]

    costs, compiled = engine.plan.costs, model.runtime if isinstance(model.runtime, Compiled) else None
    facts = {
        "versions": versions("offramp", "torch", "transformers"),
        "weights": model.weight_format.removesuffix("-head4"),
        "head": compiled.head.name if compiled else formats(model.head),
        "weight_bytes": sum(costs.block_bytes(index, 0) for index in range(model.n_blocks)) + costs.head_bytes,
        "bits": model.runtime.bits,
        "way": f"Engine.stream, full depth, {model.engine}",
    }
    return Peer(
        facts,
        generate,
        lambda ids: nll(model.forward(torch.tensor([ids]))[0], ids),
        lambda ids: next(engine.stream(ids, max_tokens=1)).id,
        batch,
        lambda prompts, tokens: taught(model, prompts, tokens),
    )


def taught(model: Any, prompts: int, tokens: int) -> int:
    """Answer prompts as `offramp train` does, for exits at the usual places. Returns the answers' tokens."""
    from offramp.exits.config import suggested_places
    from offramp.training.config import TrainConfig
    from offramp.training.data import gather

    config = TrainConfig(max_prompts=prompts, answer_tokens=tokens, temperatures=(0.0,))
    with TemporaryDirectory() as work:
        data = gather(model, config, suggested_places(model.n_blocks)[0], Path(work))
        return sum(int(text.counted.sum()) for part in (data.adapters, data.gates, data.held) for text in part)


def transformers_peer(args: argparse.Namespace) -> Peer:
    """The library's own `generate`: plain, or one of its two ways to draft without a second model."""
    model = hugging_face(args)
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "transformers": (f"generate, {model.config._attn_implementation}", {}),
        "layerskip": (f"generate(assistant_early_exit={args.layer})", {"assistant_early_exit": args.layer}),
        "lookup": ("generate(prompt_lookup_num_tokens=10)", {"prompt_lookup_num_tokens": 10}),
    }
    way, options = ways[args.peer]
    facts = torch_facts(model, way, "transformers", plain=args.peer == "transformers")
    if args.peer != "transformers":
        return Peer(facts, streamed(model.generate, options), torch_score(model))
    return Peer(facts, streamed(model.generate, options), torch_score(model), torch_prefill(model), torch_batch(model))


def economize_peer(args: argparse.Namespace) -> Peer:
    """The package economize: early-exit drafts, or CALM."""
    import economize
    import torch
    from economize.techniques.dynamic_depth import CalmConfig
    from economize.techniques.early_exit import EarlyExitConfig

    base = hugging_face(args)
    if args.way == "calm":
        technique = CalmConfig(confidence="softmax", min_layer=args.layer)
        decoding = economize.DecodeConfig(cycle_length=1, sync_interval=1)
        way = f"CALM, softmax confidence above {technique.threshold} from block {args.layer}"
    else:
        technique = EarlyExitConfig(exit_layer=args.layer, head="shared")
        decoding = economize.DecodeConfig(cycle_length=4)
        way = f"early-exit drafts after block {args.layer}, shared head, cycles of 4"
    facts = torch_facts(base, way, "economize", plain=False)
    model = economize.apply(base, technique, decoding=decoding)

    # Its `generate` refuses the cache that transformers 5.24 hands it; `decode` is the loop underneath.
    def generate(ids: list[int], tokens: int, out: Out) -> None:
        seen = len(ids)

        def watch(sequence: torch.Tensor) -> bool:
            nonlocal seen
            new = sequence[seen:].tolist()
            seen += len(new)
            if new:
                out(new)
            return False

        result = model.decode(torch.tensor(ids), tokens, stop=watch)
        if rest := result.tokens[seen - len(ids) :].tolist():  # it does not call `stop` after the last tokens
            out(rest)

    return Peer(facts, generate, None)


def llamacpp_peer(args: argparse.Namespace) -> Peer:
    """llama.cpp on the model's GGUF file, requantised if asked for; or its look-up, as llama-cpp-python has it."""
    import ctypes

    import llama_cpp
    import numpy as np
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    path = requantised(args) if args.requantise else Path(args.model)

    def load(context: int, logits_all: bool, drafts: LlamaPromptLookupDecoding | None = None) -> llama_cpp.Llama:
        options = {"n_threads": args.threads, "n_threads_batch": args.threads, "draft_model": drafts, "verbose": False}
        return llama_cpp.Llama(str(path), n_ctx=context, logits_all=logits_all, **options)

    # Look-up keeps the logits of the whole context; without `logits_all` there is room for those of one batch only.
    model = load(CONTEXT, args.lookup, LlamaPromptLookupDecoding() if args.lookup else None)
    greedy = llama_cpp.llama_sampler_init_greedy()

    def step(ids: list[int]) -> int:
        model.eval(ids)
        return int(llama_cpp.llama_sampler_sample(greedy, model.ctx, -1))

    def generate(ids: list[int], tokens: int, out: Out) -> None:
        model.reset()
        for _ in range(tokens):
            ids = [step(ids)]
            out(ids)

    def prefill(ids: list[int]) -> int:
        model.reset()
        return step(ids)

    def score(ids: list[int]) -> list[float]:
        scorer = load(len(ids), True)  # keeps every token's logits, which would slow `generate`
        scorer.eval(ids)
        logits = np.asarray(scorer.scores[: len(ids) - 1], dtype=np.float64)
        top = logits.max(-1, keepdims=True)
        log_sum = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
        return list((log_sum - logits[np.arange(len(ids) - 1), ids[1:]]).tolist())

    def looked_up(ids: list[int], tokens: int, out: Out) -> None:
        model.reset()
        for token in islice(model.generate(ids, temp=0.0), tokens):
            out([token])

    name = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(model.model, name, len(name))
    way = "generate(temp=0), LlamaPromptLookupDecoding()" if args.lookup else "eval and greedy sampler, token by token"
    facts = {
        "versions": versions("llama-cpp-python"),
        **gguf_facts(path),
        "way": f"{way}; {name.value.decode()}; compiled for this processor",
    }
    return Peer(facts, looked_up, None) if args.lookup else Peer(facts, generate, score, prefill)


def requantised(args: argparse.Namespace) -> Path:
    """The model's GGUF file in another format, made once in the working folder."""
    import llama_cpp

    path = Path(args.work) / f"{Path(args.model).stem}-as-{args.requantise}.gguf"
    if not path.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.allow_requantize = args.threads, True
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{args.requantise}")
        unfinished = path.with_suffix(".part")
        if llama_cpp.llama_model_quantize(args.model.encode(), str(unfinished).encode(), params):
            raise RuntimeError(f"llama_model_quantize could not write {args.requantise}")
        unfinished.rename(path)
    return path


PEERS = {
    "offramp": offramp_peer,
    "transformers": transformers_peer,
    "layerskip": transformers_peer,
    "lookup": transformers_peer,
    "economize": economize_peer,
    "llamacpp": llamacpp_peer,
}


def gguf_facts(path: Path) -> dict[str, Any]:
    """Formats and bytes in a GGUF file. A tied embedding is the head too, so it is read whole for every token."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    read = [tensor for name, tensor in tensors.items() if name != "token_embd.weight" or tensor is head]
    sizes: dict[str, int] = {}
    for tensor in read:
        if tensor is not head:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return {
        "weights": " + ".join(name for name in sorted(sizes, key=lambda name: -sizes[name]) if name != "F32"),
        "head": head.tensor_type.name,
        "weight_bytes": sum(int(tensor.n_bytes) for tensor in read),
        "bits": 8 * sum(int(tensor.n_bytes) for tensor in read) / sum(int(tensor.n_elements) for tensor in read),
    }


def answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """The peer's answer to a request, with its times in seconds."""
    op = request.pop("op")
    if op == "generate":
        return generated(peer, **request)
    way: Callable[..., Any] | None = getattr(peer, op)
    if way is None:
        return {"error": f"this peer does not do '{op}'"}
    started = time.perf_counter()
    result = way(**request)
    seconds = time.perf_counter() - started
    if op == "score":
        return {"nll": result}
    if op == "teach":
        return {"seconds": seconds, "tokens": result}
    if op == "prefill":
        return {"seconds": seconds, "tokens": len(request["ids"]), "ids": [result]}
    if any(len(ids) != request["tokens"] for ids in result):
        return {"error": f"an answer does not have {request['tokens']} tokens"}
    return {"seconds": seconds, "tokens": sum(map(len, result)), "ids": result}


def generated(peer: Peer, ids: list[int], tokens: int) -> dict[str, Any]:
    """The answer to a request to generate."""
    bursts: list[list[int]] = []
    times: list[float] = []

    def out(burst: list[int]) -> None:
        times.append(time.perf_counter())
        bursts.append(burst)

    started = time.perf_counter()
    peer.generate(ids, tokens, out)
    made = [token for burst in bursts for token in burst]
    if len(made) != tokens:
        return {"error": f"{len(made)} tokens came instead of {tokens}"}
    return {
        "ids": made,
        "prefill_seconds": times[0] - started,
        "decode_seconds": times[-1] - times[0],
        "decode_tokens": len(made) - len(bursts[0]),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", required=True, help="a safetensors folder, a GGUF file, or offramp's name for it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layer", type=int, default=10, help="drafts leave after this block; CALM may leave from it on")
    parser.add_argument("--way", choices=("draft", "calm"), default="draft", help="economize: which technique")
    parser.add_argument("--lookup", action="store_true", help="llama.cpp: drafts are looked up in the text")
    parser.add_argument("--requantise", help="a GGUF format, such as Q8_0, made from --model by llama.cpp")
    parser.add_argument("--work", default="build/bench", help="folder for what --requantise makes")
    args = parser.parse_args(argv)

    # Libraries print to stdout as they like; only answers may reach the driver.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = PEERS[args.peer](args)

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    say({"ready": {**peer.facts, "threads": args.threads}})
    for line in sys.stdin:
        try:
            say(answer(peer, json.loads(line)))
        except Exception as error:  # a library may raise anything; the driver reports it and goes on with the others
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
