"""Train a small Mamba-2 language model on two CPU cores.

    python -m lm.train CORPUS -o MODEL --hours 1.2 [--start MODEL]

CORPUS is a folder made by `python -m lm.corpus`. After an interruption (Ctrl-C), the same command goes on where it stopped.
`--steps N` instead of `--hours` makes the result a function of the seed alone. With `--hours`, the learning rate follows
the time worked: processor time divided by threads, so that neither pauses nor a busy machine count. The result is a folder
that transformers' AutoModelForCausalLM loads, in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Mamba2Config, Mamba2ForCausalLM

import offramp
from lm.corpus import END, Lengths, Tokens, command_line, load_tokens, piece_bytes, report
from lm.forward import Forward
from offramp.errors import BadInput, OfframpError
from offramp.files import put, write_atomically
from offramp.training.loop import Budget, Loop, Loss, Training, accelerator_for, claim

LARGEST = 16_000_000  # bytes of the weights file
VALIDATE = 0.05  # share of the budget between two points of the curve
VALIDATION_TOKENS = 50_000
CHECKPOINT = 120.0  # seconds between checkpoints


@dataclass(frozen=True)
class Settings:
    """How a model is trained; the fields are the flags of `python -m lm.train`.

    hours, steps: the budget, in hours of work or in steps. blocks, width, state: the model's shape. batch: windows of a
    step. length: tokens of a window. learning_rate: AdamW's highest rate. matrix_rate: the highest rate of Muon, which
    trains the blocks' matrices; with 0, AdamW trains them too. warm_up, decay: the shares of the budget in which the rates
    rise, and fall to zero. bfloat16: compute matrix products in bfloat16, which is twice as fast on a processor with AMX or
    AVX-512 BF16.
    """

    hours: float | None = None
    steps: int | None = None
    blocks: int = 12
    width: int = 256
    state: int = 64
    batch: int = 8
    length: int = 512
    learning_rate: float = 1.5e-2
    matrix_rate: float = 0.012
    warm_up: float = 0.02
    decay: float = 0.5
    bfloat16: bool = False
    seed: int = 0


def new_model(settings: Settings, vocabulary: int, end: int) -> Mamba2ForCausalLM:
    """A random model. Raises `BadInput` if its weights would be larger than `LARGEST`."""
    config = Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        num_hidden_layers=settings.blocks,
        state_size=settings.state,
        head_dim=64,
        num_heads=2 * settings.width // 64,
        expand=2,
        n_groups=1,
        conv_kernel=4,
        chunk_size=64,
        use_bias=False,
        tie_word_embeddings=True,
        rescale_prenorm_residual=True,
        initializer_range=0.04,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.device("meta"):
        size = 2 * sum(parameter.numel() for parameter in Mamba2ForCausalLM(config).parameters())
    if size > LARGEST:
        raise BadInput(f"The model would take {size / 1e6:.1f} MB, of at most {LARGEST / 1e6:.0f}.", "Make it smaller.")
    torch.manual_seed(settings.seed)
    return Mamba2ForCausalLM(config).float()


def batch_at(tokens: Tokens, step: int, settings: Settings) -> Tensor:
    """The step's windows of tokens, (batch, length + 1). Raises `BadInput` for too few tokens.

    Every epoch cuts the tokens at new places and shuffles the windows.
    """
    windows = (len(tokens) - 1) // settings.length - 1
    if windows < settings.batch:
        raise BadInput(f"{len(tokens)} tokens are too few for batches of {settings.batch} × {settings.length}.")
    epoch, index = divmod(step, windows // settings.batch)
    generator = np.random.default_rng([settings.seed, epoch])
    shift = int(generator.integers(settings.length))
    chosen = generator.permutation(windows)[index * settings.batch : (index + 1) * settings.batch]
    starts = shift + chosen * settings.length
    return torch.from_numpy(np.stack([tokens[at : at + settings.length + 1] for at in starts]).astype(np.int64))


def schedule(settings: Settings, share_spent: float) -> float:
    """The learning rate as a share of the highest, at this share of the budget: it rises, stays, falls to zero."""
    rise = share_spent / settings.warm_up if settings.warm_up else 1.0
    fall = (1 - share_spent) / settings.decay if settings.decay else 1.0
    return max(0.0, min(1.0, rise, fall))


def optimizers_for(model: Any, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (Jordan et al. 2024) for the matrices of the blocks. Raises `BadInput` if torch has no Muon."""
    matrices = [parameter for parameter in model.backbone.layers.parameters() if parameter.ndim == 2]
    if not settings.matrix_rate:
        matrices = []
    elif not hasattr(torch.optim, "Muon"):
        raise BadInput(f"torch {torch.__version__} has no Muon.", "Install torch 2.9 or newer, or give --matrix-rate 0.")
    taken = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    # Only matrices get weight decay: the scale of norms, biases, the convolution and the scan's parameters matters.
    groups = [
        {"params": [parameter for parameter in rest if parameter.ndim == 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in rest if parameter.ndim != 2], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    ]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=settings.matrix_rate, weight_decay=0.025))
    return made


def loss_of(forward: Forward, batch: Tensor) -> Loss:
    """The loss, in nats a token."""
    loss = forward.loss(forward.last(batch[:, :-1]), batch[:, 1:])
    return loss, [loss]


@torch.no_grad()
def bits_per_byte(forward: Forward, tokens: Tokens, lengths: Lengths, length: int, batch: int) -> float:
    """The model's bits per byte over about `VALIDATION_TOKENS`, in evenly spaced windows that start from an empty state.

    It overestimates, since a window's first tokens have little context; `lm.evaluate` gives every token its context.
    """
    windows = max(1, (len(tokens) - 1) // length)
    # All batches have the same shape, since the compiled code is made for one.
    batches = max(1, min(windows, VALIDATION_TOKENS // length) // batch)
    starts = np.linspace(0, windows - 1, batches * batch).astype(int) * length
    nats, size = 0.0, 0
    for group in starts.reshape(batches, batch):
        rows = np.stack([tokens[at : at + length + 1] for at in group]).astype(np.int64)
        ids = torch.from_numpy(rows)
        nats += float(forward.surprise(forward.last(ids[:, :-1]), ids[:, 1:]).double().sum())
        size += int(lengths[rows[:, 1:]].sum())
    return nats / math.log(2) / size


def train(
    corpus: Path,
    folder: Path,
    settings: Settings,
    start: Path | None = None,
    command: str = "",
    compiled: bool = False,
) -> dict[str, Any] | None:
    """Train, save the model in `folder` and return the record, or None if a signal stopped it before the end.

    The unfinished work is in `folder`/.training. If that is there, training goes on with it.
    """
    tokens, record = load_tokens(corpus, "train"), json.loads((corpus / "corpus.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(corpus, trust_remote_code=False)
    model = model_to_train(corpus, tokenizer, settings, start)
    model.train()
    forward = Forward(model, compiled, torch.bfloat16 if settings.bfloat16 else torch.float32)
    work = folder / ".training"
    claim(work, {**asdict(settings), "corpus": record["splits"]})

    def schedule_of(optimizer: torch.optim.Optimizer, share_spent: Callable[[], float]) -> LambdaLR:
        return LambdaLR(optimizer, lambda _: schedule(settings, share_spent()))

    job = Training(
        "model",
        model,
        batch_of=lambda step: batch_at(tokens, step, settings),
        loss_of=lambda batch, step: loss_of(forward, batch),
        optimizers=optimizers_for(model, settings),
        schedule_of=schedule_of,
        seed=settings.seed,
        save_every=CHECKPOINT,
    )
    # The forward pass rounds to bfloat16 by itself.
    accelerator = accelerator_for(torch.device("cpu"))
    loop = Loop(work / "checkpoint", job, Budget(settings.steps, settings.hours), accelerator)
    after_step = Validation(loop, forward, settings, load_tokens(corpus, "valid"), piece_bytes(tokenizer), folder)
    with Stop() as stop:
        if not loop.run(after_step, lambda: stop.requested):
            return None

    record = {
        "command": command,
        "settings": asdict(settings),
        "start": start.name if start else None,
        "steps": loop.step,
        "tokens": loop.step * settings.batch * settings.length,
        "seconds": round(loop.seconds, 1),
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": loop.curve[-1],
        "curve": loop.curve,
        "corpus": record,
        "versions": versions(),
    }
    if accelerator.is_main_process:
        save(model, tokenizer, folder, record)
    accelerator.wait_for_everyone()
    return record


def model_to_train(corpus: Path, tokenizer: Any, settings: Settings, start: Path | None) -> Any:
    """A random model, or the model in the folder `start`, in float32. Raises `BadInput` if their tokenizers differ."""
    if start is None:
        return new_model(settings, len(tokenizer), tokenizer.convert_tokens_to_ids(END))
    if AutoTokenizer.from_pretrained(start, trust_remote_code=False).get_vocab() != tokenizer.get_vocab():
        raise BadInput(f"{start} has another tokenizer than {corpus}.", f"Make the corpus with --tokenizer {start}.")
    return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, trust_remote_code=False)


class Validation:
    """Called after each step; at every 1/20 of the budget, it adds a point to the loop's curve and to `curve.json`."""

    def __init__(
        self, loop: Loop, forward: Forward, settings: Settings, tokens: Tokens, lengths: Lengths, folder: Path
    ) -> None:
        self.loop, self.forward, self.settings = loop, forward, settings
        self.tokens, self.lengths, self.folder = tokens, lengths, folder

    def __call__(self) -> None:
        loop, settings = self.loop, self.settings
        share = loop.share_spent()
        if share < self._share_at_last_point() + VALIDATE and share < 1:
            return
        measured = bits_per_byte(self.forward, self.tokens, self.lengths, settings.length, settings.batch)
        point = {
            "done": round(share, 4),
            "step": loop.step,
            "tokens": loop.step * settings.batch * settings.length,
            "seconds": round(loop.seconds, 1),
            "loss": round(statistics.fmean(loss for (loss,) in loop.losses), 4),
            "valid_bits_per_byte": round(measured, 4),
        }
        loop.add_point(point)
        if loop.accelerator.is_main_process:
            write_atomically(self.folder / "curve.json", json.dumps(loop.curve, indent=1).encode())
            print(json.dumps(point), flush=True)

    def _share_at_last_point(self) -> float:
        if not self.loop.curve:
            return 0.0
        point = self.loop.curve[-1]
        return float(point["step"] / self.settings.steps if self.settings.steps else point["done"])


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide on the result."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "offramp": offramp.__version__,
    }


def save(model: Any, tokenizer: Any, folder: Path, record: dict[str, Any]) -> None:
    """Write the model in bfloat16, its tokenizer and its record to `folder`, and delete the unfinished work there."""
    made = folder / ".training" / "model"
    end = model.config.eos_token_id
    # The setting is meant for new weights, but transformers 5 applies it to loaded weights too, at each loading.
    model.config.rescale_prenorm_residual = False
    # A copy is rounded; the model itself stays in float32.
    rounded = type(model)(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    rounded.save_pretrained(made)
    tokenizer.save_pretrained(made)
    size = (made / "model.safetensors").stat().st_size
    if size > LARGEST:
        raise BadInput(f"The weights take {size / 1e6:.1f} MB, of at most {LARGEST / 1e6:.0f}.", "Train a smaller model.")
    (made / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False))
    for file in sorted(made.iterdir()):
        put(file, folder / file.name)
    shutil.rmtree(made.parent)


def keep_memory() -> None:
    """Make glibc keep freed memory for the next step. Allocating it anew takes an eighth of a step's time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never give the end of the heap back


class Stop:
    """While this context is open, SIGINT (Ctrl-C) and SIGTERM only set `requested`, so that no step is interrupted."""

    def __enter__(self) -> Stop:
        self.requested = False
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="a folder made by python -m lm.corpus")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the model's folder")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--hours", type=float, help="hours of work to train for")
    budget.add_argument("--steps", type=int)
    parser.add_argument("--blocks", type=int, default=Settings.blocks, help="at least 12")
    parser.add_argument("--width", type=int, default=Settings.width, help="a multiple of 32")
    parser.add_argument("--state", type=int, default=Settings.state)
    parser.add_argument("--batch", type=int, default=Settings.batch, help="windows a step")
    parser.add_argument("--length", type=int, default=Settings.length, help="tokens of a window")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--matrix-rate", type=float, default=Settings.matrix_rate, help="Muon's highest; 0: AdamW alone")
    parser.add_argument("--warm-up", type=float, default=Settings.warm_up, help="share of the budget")
    parser.add_argument("--decay", type=float, default=Settings.decay, help="share of the budget")
    parser.add_argument(
        "--bfloat16", action="store_true", help="products in bfloat16: for processors with AMX or AVX-512 BF16"
    )
    parser.add_argument("--start", type=Path, help="the model to go on with; it decides on the shape")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.blocks < 12 or args.width % 32:
        parser.error("--blocks must be at least 12, and --width a multiple of 32.")
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    if (args.hours or args.steps or 0) <= 0:
        parser.error("--hours and --steps must be more than 0.")
    torch.set_num_threads(args.threads)
    keep_memory()
    try:
        record = train(args.corpus, args.out, settings, args.start, command_line(), shutil.which("g++") is not None)
    except OfframpError as error:
        report(parser, error)
    if record is None:
        print("Stopped. The same command goes on from here.")
        return
    print(f"{args.out}: {record['validation']['valid_bits_per_byte']} bits per byte on validation text")


if __name__ == "__main__":
    main()
