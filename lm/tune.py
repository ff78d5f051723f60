"""Tune a model so that its early blocks predict what its last block will: LayerSkip (arXiv 2404.16710) as a LoRA.

    python -m lm.tune MODEL -o TUNED --own-prompts FILE

After an interruption (Ctrl-C), the same command goes on where it stopped. Needs the library peft (offramp's extra tune).

This changes the model on purpose, because a block's hidden state was never meant to be read out. A low-rank update of the
blocks' matrices (LoRA, arXiv 2106.09685, by the library `peft`) is trained in two ways that LayerSkip describes. Samples
skip blocks, deeper ones more often (section 3.1 there). And every step reads out some of the blocks with the model's own
final norm and head, and deeper blocks count more (section 3.2). The targets are not a text's next tokens but the untuned
model's own distribution over its own answers: the tuned model should say the same, but earlier.

The result is a new model, with the update merged into its weights; exits are then trained for it. `measure_held_out`
compares it with the untuned model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lm.corpus import command_line, report
from offramp.cli.progress import progress_bars, resumable
from offramp.errors import BadInput, OfframpError
from offramp.files import install_hint, put
from offramp.model.backbone import Backbone
from offramp.model.loading import load
from offramp.progress import Progress, silent
from offramp.training.config import TrainConfig, check_least, check_rates
from offramp.training.data import gather
from offramp.training.distillation import Distillation, pad_batch
from offramp.training.loop import Budget, Fit, Loss, accelerator_for, alone, step_generator
from offramp.training.teacher import TeacherText

WORSE = 0.02  # the share by which tuning may raise the perplexity without a warning


@dataclass(frozen=True)
class TuneConfig:
    """How a model is tuned; most fields are flags of `python -m lm.tune`.

    rank: that of the low-rank update. skip: share of the samples that skip the last block; earlier blocks are skipped less
    often. exit_scale: weight of early blocks' losses relative to the last block's. every: a step reads out one block in
    this many, and the last. bfloat16: multiply in it, which is faster where the processor can. prompts, texts, max_prompts,
    answer_tokens: as in `TrainConfig`. epochs: passes over the text. batch: sequences of a step. learning_rate: the highest
    one.
    """

    rank: int = 32
    skip: float = 0.05
    exit_scale: float = 0.02
    every: int = 4
    bfloat16: bool = True
    prompts: str | None = None
    texts: tuple[str, ...] = ()
    max_prompts: int | None = None
    answer_tokens: int = 96
    epochs: int = 2
    batch: int = 8
    learning_rate: float = 2e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, rank=1, every=1, max_prompts=1, answer_tokens=1, epochs=0, batch=1)
        check_rates(self.learning_rate)
        if not 0 <= self.skip < 1:
            raise BadInput(f"A share of {self.skip} samples cannot skip a block.", "Give a number from 0 to below 1.")


def exit_weights(blocks: int, step: int, exit_scale: float, every: int) -> dict[int, float]:
    """For each block that the step reads out, the weight of its loss; they sum to 1 (LayerSkip, section 3.2)."""
    weights = {index: exit_scale * index * (index + 1) / 2 for index in range(step % every, blocks - 1, every)}
    weights[blocks - 1] = blocks - 1 + exit_scale * (blocks - 2) * (blocks - 1) / 2
    total = sum(weights.values())
    return {index: weight / total for index, weight in weights.items() if weight}


def draw_layer_dropout(blocks: int, samples: int, skip: float, generator: torch.Generator) -> Tensor:
    """Which samples run which block: (blocks, samples), 1 to run it and 0 to skip it (LayerSkip, section 3.1).

    `skip` is the probability that a sample skips the last block.
    """
    odds = torch.tensor([skip * (2 ** (index / max(1, blocks - 1)) - 1) for index in range(blocks)])
    return (torch.rand(blocks, samples, generator=generator) >= odds[:, None]).float()


@contextmanager
def record_states(backbone: Backbone, keep: Tensor | None = None) -> Iterator[list[Tensor]]:
    """While the context is open, append the output (B, T, D) of each block of the library's model to the list.

    With `keep` (blocks, B), a sample skips a block where it is 0.
    """
    states: list[Tensor] = []

    def leaving(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        h = out[0] if isinstance(out, tuple) else out
        if keep is not None:
            before = args[0] if args else kwargs["hidden_states"]
            h = before + keep[len(states), :, None, None].to(h.dtype) * (h - before)
        states.append(h)
        return (h, *out[1:]) if isinstance(out, tuple) else h

    hooks = [block.register_forward_hook(leaving, with_kwargs=True) for block in backbone.blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def tune(
    backbone: Backbone,
    folder: str | Path,
    config: TuneConfig | None = None,
    progress: Progress = silent,
    command: str = "",
) -> dict[str, Any]:
    """Tune a model and save it in `folder`, for `load` and for the library; returns the record that is kept beside it.

    The backbone must run on the library's own float32 weights (`load(name, "float32", keep=True)`), and is changed. Called
    again with the same config after an interruption, it resumes the work. Raises `BadInput` for unusable settings,
    where `peft` is missing, and where another training is at work in `folder`.
    """
    _check(backbone, Path(folder))
    with alone(Path(folder), backbone.device):
        return _tune(backbone, Path(folder), config or TuneConfig(), progress, command)


def _tune(backbone: Backbone, folder: Path, config: TuneConfig, progress: Progress, command: str) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    work, accelerator = folder / ".training", accelerator_for(backbone.device)
    progress = progress if accelerator.is_main_process else silent
    names = ("prompts", "texts", "max_prompts", "answer_tokens", "seed")
    reading = TrainConfig(**{name: getattr(config, name) for name in names})
    data = gather(backbone, reading, (backbone.n_blocks,), work, progress, plan=asdict(config))
    backbone.use_library_blocks()
    texts = data.adapters + data.gates
    before = measure_held_out(backbone, data.held)

    torch.manual_seed(config.seed)
    lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=_matrices(backbone), bias="none")
    adapted = get_peft_model(backbone.model, lora)
    fit = Fit(work, backbone.device, config.seed, config.batch, progress, config.bfloat16)

    def loss_of(batch: list[int], step: int) -> Loss:
        return _loss(backbone, [texts[index] for index in batch], step, config)

    fit.run("tuning", adapted, texts, Budget(fit.steps_of(texts, config.epochs)), config.learning_rate, loss_of)
    parameters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.merge_and_unload()
    backbone.use_library_blocks()
    record = {
        "command": command,
        "config": {**asdict(config), "prompts": None, "texts": []},
        "text": data.files,
        "untuned": {"name": backbone.name, "fingerprint": backbone.source.fingerprint},
        "parameters": parameters,
        "held_out": {"before": before, "after": measure_held_out(backbone, data.held)},
        "curve": fit.curve,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _save(backbone, folder, record)
        shutil.rmtree(work)
    accelerator.wait_for_everyone()
    return record


def _check(backbone: Backbone, folder: Path) -> None:
    """Raise `BadInput` for the model's own folder, and where `peft` is missing."""
    if importlib.util.find_spec("peft") is None:
        raise BadInput("Tuning needs the library peft.", install_hint("tune"))
    if backbone.source.path and folder.resolve() == Path(backbone.source.path).resolve():
        raise BadInput(f"{folder} holds the model itself, which would be lost.", "Name another folder.")


def _loss(backbone: Backbone, texts: list[TeacherText], step: int, config: TuneConfig) -> Loss:
    """Cross-entropy with the untuned model, in nats a token: the weighted sum over the step's blocks; the last block's."""
    generator = step_generator(config.seed, step, "tuning")
    ids, counted = pad_batch([text.ids for text in texts]).long(), pad_batch([text.counted for text in texts])
    wanted = Distillation.of(texts, backbone.vocab_size, generator, backbone.device)
    weights = exit_weights(backbone.n_blocks, step, config.exit_scale, config.every)
    keep = draw_layer_dropout(backbone.n_blocks, len(texts), config.skip, generator)
    ids, counted, keep = (tensor.to(backbone.device) for tensor in (ids, counted, keep))
    with record_states(backbone, keep) as states:
        _trunk(backbone)(input_ids=ids, use_cache=False)
    losses = {}
    with torch.autocast(backbone.device.type, enabled=False):  # the head and the softmax stay in float32
        for index in weights:
            losses[index] = wanted.loss(backbone.logits(states[index][counted].float(), wanted.rows))
    total = torch.stack([weights[index] * loss for index, loss in losses.items()]).sum()
    return total, [total, losses[backbone.n_blocks - 1]]


@torch.inference_mode()
def measure_held_out(backbone: Backbone, texts: Sequence[TeacherText]) -> dict[str, Any]:
    """Measure the model on held-out answers of the untuned one.

    `positions`: how many were measured. `perplexity`: that of the answers at full depth. `agreement`: for each block, the
    share of positions where the model's own norm and head, applied after the block, choose the same token as the untuned
    model at full depth.
    """
    backbone.model.eval()
    hits, nats, count = torch.zeros(backbone.n_blocks), 0.0, 0
    for text in texts:
        counted = text.counted.to(backbone.device)
        with record_states(backbone) as states:
            _trunk(backbone)(input_ids=text.ids[None].long().to(backbone.device), use_cache=False)
        targets = text.top_ids[text.counted][:, 0].long().to(backbone.device)
        for index, h in enumerate(states):
            logits = backbone.logits(h[0, counted])
            hits[index] += int((logits.argmax(-1) == targets).sum())
        nats -= float(logits.log_softmax(-1).gather(1, targets[:, None]).sum())
        count += len(targets)
    return {
        "positions": count,
        "perplexity": round(math.exp(nats / count), 4),
        "agreement": [round(float(hit) / count, 4) for hit in hits],
    }


def _trunk(backbone: Backbone) -> nn.Module:
    """The library's model without its head."""
    trunk: nn.Module = getattr(backbone.model, backbone.family.trunk)
    return trunk


def _matrices(backbone: Backbone) -> list[str]:
    """Names of the linear layers in the blocks, without Mamba's out_proj: fused kernels read it, so `peft` refuses it."""
    mamba = any(mixer is not None for mixer in map(backbone.mixer, range(backbone.n_blocks)))
    names = {
        name.rpartition(".")[2]
        for block in backbone.blocks
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"
    }
    return sorted(names - ({"out_proj"} if mamba else set()))


def _save(backbone: Backbone, folder: Path, record: dict[str, Any]) -> None:
    """Write the model, its tokenizer and the record to `folder`, each file whole or not at all."""
    unfinished = folder / ".training" / "model"
    dtype = getattr(backbone.config, "dtype", None) or torch.float32
    backbone.model.to(dtype).save_pretrained(unfinished, max_shard_size="1000GB")
    if backbone.tokenizer is not None:
        backbone.tokenizer.save_pretrained(unfinished)
    (unfinished / "tuning.json").write_text(json.dumps(record, indent=1), "utf-8")
    for file in sorted(unfinished.iterdir()):
        put(file, folder / file.name)


def print_table(record: dict[str, Any], folder: Path) -> None:
    """How often each block, read out by the model's own head, agrees with the untuned full depth, before and after."""
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    table = Table(title=f"{folder}: agreement with the untuned model, on held-out answers of its own", title_justify="left")
    for column in ("after block", "before", "after"):
        table.add_column(column, justify="right")
    for block, (old, new) in enumerate(zip(before["agreement"], after["agreement"], strict=True), start=1):
        table.add_row(str(block), f"{old:.0%}", f"{new:.0%}")
    console = Console(highlight=False)
    console.print(table)
    change = after["perplexity"] / before["perplexity"] - 1
    console.print(
        f"Perplexity of those answers at full depth: {before['perplexity']:.3f} before, {after['perplexity']:.3f} after "
        f"({change:+.1%}).",
        soft_wrap=True,
    )
    if change > WORSE:
        hint = "Try a lower --learning-rate or --exit-scale, or more prompts."
        console.print(
            f"[yellow]That is more than {WORSE:.0%} worse, too much for what early blocks gain.[/] {hint}", soft_wrap=True
        )
    console.print(f"This is another model now. Exits for it: offramp train {folder} -o DIR", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a hub name, a folder, or an alias")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the tuned model's folder")
    parser.add_argument("--own-prompts", dest="prompts", help="a file of prompts to answer (default: offramp's list)")
    parser.add_argument("--max-prompts", type=int, help="use only so many prompts, the first ones")
    parser.add_argument("--answer-tokens", type=int, default=TuneConfig.answer_tokens, help="longest answer")
    parser.add_argument("--rank", type=int, default=TuneConfig.rank, help="rank of the low-rank update")
    parser.add_argument("--skip", type=float, default=TuneConfig.skip, help="share of samples that skip the last block")
    parser.add_argument("--exit-scale", type=float, default=TuneConfig.exit_scale, help="weight of early blocks' losses")
    parser.add_argument("--epochs", type=int, default=TuneConfig.epochs, help="passes over the text")
    parser.add_argument("--learning-rate", type=float, default=TuneConfig.learning_rate)
    parser.add_argument("--seed", type=int, default=TuneConfig.seed)
    settings = vars(parser.parse_args())
    name, folder = settings.pop("model"), settings.pop("out")
    try:
        backbone = load(name, "float32", keep=True)
        with resumable(), progress_bars() as progress:
            print_table(tune(backbone, folder, TuneConfig(**settings), progress, command_line()), folder)
    except OfframpError as error:
        report(parser, error)


if __name__ == "__main__":
    main()
