"""What the peers that run on torch share: how the library loads a model, generates, scores and reads, and its facts.

`benchmarks/peers.py` imports it in environments that have only the peer's library, so torch is imported where it is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

Out = Callable[[list[int]], None]


def hugging_face(args: argparse.Namespace) -> Any:
    """The safetensors folder as the library loads it, without the tokens that end a text."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), local_files_only=True, trust_remote_code=False
    ).eval()
    model.generation_config.eos_token_id = None
    return model


def streamed(generate: Callable[..., Any], options: dict[str, Any]) -> Callable[[list[int], int, Out], None]:
    """Call a `generate` of the transformers kind, and hand what it streams to `out`."""
    import torch

    class Streamer:
        def __init__(self, out: Out) -> None:
            self.out, self.prompt_seen = out, False

        def put(self, tokens: torch.Tensor) -> None:
            if self.prompt_seen:
                self.out(tokens.flatten().tolist())
            self.prompt_seen = True  # the library streams the prompt first

        def end(self) -> None:
            pass

    @torch.inference_mode()
    def run(ids: list[int], tokens: int, out: Out) -> None:
        prompt = torch.tensor([ids])
        generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=Streamer(out),
            **options,
        )

    return run


def torch_score(model: Any) -> Callable[[list[int]], list[float]]:
    """`Peer.score` of a transformers model."""
    import torch

    @torch.inference_mode()
    def score(ids: list[int]) -> list[float]:
        return nll(model(torch.tensor([ids])).logits[0], ids)

    return score


def torch_prefill(model: Any) -> Callable[[list[int]], int]:
    """`Peer.prefill` of a transformers model: one forward pass into a new cache, with the last token's logits only."""
    import torch

    @torch.inference_mode()
    def prefill(ids: list[int]) -> int:
        return int(model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    return prefill


def torch_batch(model: Any) -> Callable[[list[list[int]], int], list[list[int]]]:
    """`Peer.batch` of a transformers model: one call of `generate`, with the prompts padded on the left."""
    import torch

    @torch.inference_mode()
    def batch(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        answers: list[list[int]] = out[:, longest:].tolist()
        return answers

    return batch


def nll(logits: Any, ids: list[int]) -> list[float]:
    """Logits (T, V) over T ids → −ln p of ids[1:]."""
    import torch

    logs = logits[:-1].double().log_softmax(-1)
    return list((-logs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]).tolist())


def torch_facts(model: Any, way: str, library: str, plain: bool) -> dict[str, Any]:
    """`Peer.facts` of a transformers model. `plain`: every token reads all weights once."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    norms = [child for name, child in decoder.named_children() if name.startswith("norm")]
    return {
        "versions": versions(*dict.fromkeys((library, "transformers", "torch"))),
        "weights": formats(decoder.layers),
        "head": formats(head),
        "weight_bytes": bytes_of(decoder.layers, *norms, head) if plain else None,
        "way": way,
    }


def formats(module: Any) -> str:
    """The dtypes of a torch module's parameters and buffers, the largest share first."""
    sizes: dict[str, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return " + ".join(sorted(sizes, key=lambda name: -sizes[name]))


def bytes_of(*modules: Any) -> int:
    """Bytes of the modules' parameters and buffers; a tensor that several of them share counts once."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def versions(*packages: str) -> dict[str, str]:
    """The packages' installed versions."""
    return {package: version(package) for package in packages}
