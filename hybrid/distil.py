"""Distil SmolLM2 into a model whose attentions are Mamba-2 mixers, in three steps (after MOHAWK, arXiv 2408.10189).

    python -m hybrid.distil WORK -o FOLDER --prompts PROMPTS.jsonl --text TEXT.txt --keep 15

1. `match`: each mixer learns its attention's output, on SmolLM2's own hidden states. All blocks learn at once, and none
   depends on another.
2. `join`: the mixers together, in the model: the hidden state after each block should be SmolLM2's.
3. `answers`: the whole model learns SmolLM2's distribution (its 16 most probable tokens) over SmolLM2's own answers, and
   over plain text.

Before 1, `start` gives each mixer the output projection that fits best as the mixer is, and `rank` says which attentions
are missed least: each in turn is replaced by its mixer, and the distribution measured. With `--keep 15`, the 15 that are
missed most stay.

Only mixers are trained; FOLDER gets them (`offramp.model.hybrid`). WORK keeps the text, checkpoints and each step's result.
After an interruption (Ctrl-C), the same command goes on where it stopped, and a step that is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hybrid.mixer import Mixer
from hybrid.student import Student
from lm.corpus import command_line, report
from lm.forward import CHUNK
from lm.train import Stop, keep_memory, versions
from offramp.errors import BadInput, OfframpError
from offramp.files import write_atomically
from offramp.model.hybrid import MIXERS, read_mixers, write_mixers
from offramp.model.loading import load
from offramp.training.config import TrainConfig
from offramp.training.data import Data, gather
from offramp.training.distillation import Distillation
from offramp.training.loop import Budget, Loop, Loss, Training, accelerator_for, step_generator, warmed_cosine
from offramp.training.teacher import FIELDS, TeacherText, TeacherTexts

TOKENS = 2048  # of a step
LONGEST, STEP = 512, CHUNK  # tokens of a text, the rest is cut off; texts are padded to a multiple of `STEP`
HELD = 4  # batches that say how far a step is
FIRST = 0.1  # the weight of texts' first tokens
START, RIDGE = 20_000, 1e-3  # tokens of the first fit; what is added to the diagonal, as a share of it
POINT = 0.1  # share of a step's budget between two measurements
RATES = {"match": 2e-3, "join": 1e-3, "answers": 4e-4}  # the highest learning rates; at 1e-3, answers first become worse


@dataclass(frozen=True)
class Settings:
    """What is learned from, and for how many hours of work each step trains. `keep`: the number of attentions that
    stay. `start`: a folder with mixers to go on with. Where they are enough, only the third step is done.
    """

    prompts: str | None = None
    texts: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (0.0, 0.7, 0.0, 0.9)
    answers: int | None = None
    keep: int = 15
    start: str | None = None
    match_hours: float = 0.75
    join_hours: float = 0.75
    answer_hours: float = 4.0
    seed: int = 0


class Texts:
    """Texts in batches of at most `TOKENS` tokens, in random order. Those of a batch are equally long, rounded up."""

    def __init__(self, texts: TeacherTexts, seed: int) -> None:
        self.texts, self.seed = texts, seed
        self.sizes = [rounded(min(length, LONGEST)) for length in texts.lengths]
        self._epoch, self._batches = -1, list[list[int]]()

    def at(self, step: int) -> list[int]:
        """The texts of a step, as indices."""
        epoch = 0
        while step >= (batches := len(self.batches(epoch))):
            step, epoch = step - batches, epoch + 1
        return self.batches(epoch)[step]

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, as indices."""
        if epoch != self._epoch:
            draw, order = random.Random(f"{self.seed}/{epoch}"), list(range(len(self.sizes)))
            draw.shuffle(order)
            order.sort(key=self.sizes.__getitem__)  # stable: equally long texts stay in random order
            batches, at = [], 0
            while at < len(order):
                size = self.sizes[order[at]]
                several = order[at : at + TOKENS // size]
                several = [index for index in several if self.sizes[index] == size]
                batches.append(several)
                at += len(several)
            draw.shuffle(batches)
            self._epoch, self._batches = epoch, batches
        return self._batches

    def read(self, batch: Sequence[int]) -> list[TeacherText]:
        """The texts of a batch, cut to `LONGEST` tokens."""
        return [TeacherText(*(getattr(self.texts[i], name)[:LONGEST] for name in FIELDS)) for i in batch]


def boxed(texts: Sequence[Tensor]) -> Tensor:
    """A tensor of each text of a batch, (tokens, …), as one: (B, T, …), zeros where no token is.

    T is a multiple of `STEP`, and B goes with it. So there are few shapes, and the kernels are compiled for each of them.
    """
    length = rounded(max(map(len, texts)))
    box = texts[0].new_zeros(TOKENS // length, length, *texts[0].shape[1:])
    for row, text in zip(box, texts, strict=False):
        row[: len(text)] = text
    return box


def rounded(length: int) -> int:
    """A number of tokens, rounded up to a multiple of `STEP`."""
    return -(-length // STEP) * STEP


def padded(texts: Sequence[TeacherText]) -> tuple[Tensor, Tensor]:
    """The texts' ids (B, T), and which of these tokens are no padding."""
    ids = boxed([text.ids for text in texts]).long()
    return ids, boxed([torch.ones(len(text.ids), dtype=torch.bool) for text in texts])


def distance(made: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
    """The mean squared difference of (B, T, D) at the tokens that count, as a share of the wanted values' variance.

    Texts' first tokens are measured by themselves, as a share of their size, and weigh `FIRST`. All attention looks at them
    where it looks at nothing else, so what they hold must not change; and they are many times as large as all others.
    """
    made, wanted = made.float(), wanted.float()
    others = F.pad(counts[:, 1:], (1, 0))[..., None]  # multiplied by: indexing with it has a slow gradient
    mean = (wanted * others).sum((0, 1)) / others.sum()
    first, spread = (wanted[:, 0] * counts[:, :1]).square().sum(), ((wanted - mean) * others).square().sum()
    wrong_first = ((made[:, 0] - wanted[:, 0]) * counts[:, :1]).square().sum()
    return FIRST * wrong_first / first + ((made - wanted) * others).square().sum() / spread


class MixerTraining:
    """The student, its mixers, and the text; its methods are the steps."""

    def __init__(
        self, student: Student, data: Data, settings: Settings, work: Path, say: Callable[[str], None] = print
    ) -> None:
        self.student, self.settings, self.work, self.say = student, settings, work, say
        self.texts = Texts(data.adapters + data.gates, settings.seed)
        self.held = Texts(data.held, settings.seed)
        # Batches that are full; those that are not would cost as much.
        batches = sorted(self.held.batches(0), key=lambda batch: -len(batch) * self.held.sizes[batch[0]])
        self.held_batches = batches[:HELD]
        self.mixers = student.new_mixers()

    def chosen(self, which: Sequence[int]) -> dict[int, Mixer]:
        """The mixers of these blocks."""
        return {index: self.mixers[index] for index in which}  # type: ignore[misc]

    def run(self) -> dict[int, Mixer]:
        """All steps. Returns the mixers, by the block whose attention each replaces."""
        every, keep = range(len(self.mixers)), self.settings.keep
        given = read_mixers(Path(self.settings.start) / MIXERS) if self.settings.start else {}
        attentions = [block for block in every if block not in given]
        new = len(attentions) - keep
        if new < 0:
            raise BadInput(f"{self.settings.start} keeps {len(attentions)} attentions.", "Keep as many, or fewer.")
        replaced = sorted(given)
        if new:
            self._kept("start", every, self._start)
            added = sorted([block for block in self.rank() if block not in given][:new]) if keep else attentions
            self._step(f"match-{keep}", added, self.settings.match_hours, self._match, self._matched)
            replaced = sorted([*given, *added])
        for block, mixer in self.chosen(sorted(given)).items():
            mixer.take(given[block])
        if new:
            self._step(f"join-{keep}", replaced, self.settings.join_hours, self._join, self._joined)
        self._step(f"answers-{keep}", replaced, self.settings.answer_hours, self._answer, self.answered)
        return self.chosen(replaced)

    def rank(self) -> list[int]:
        """All blocks; the first are those whose attention is missed least."""
        file = self.work / "order.json"
        if not file.exists():
            losses = [self.answered(self.chosen([index]))[0] for index in range(len(self.mixers))]
            write_atomically(file, json.dumps([round(loss, 5) for loss in losses]).encode())
        losses = json.loads(file.read_text())
        return sorted(range(len(losses)), key=losses.__getitem__)

    def _step(
        self,
        name: str,
        which: Sequence[int],
        hours: float,
        loss_of: Callable[[list[TeacherText], dict[int, Mixer], int], Loss],
        measure: Callable[[dict[int, Mixer]], list[float]],
    ) -> None:
        """Train these blocks' mixers."""
        self._kept(name, which, lambda module, mixers: self._train(name, module, mixers, hours, loss_of, measure))

    def _kept(self, name: str, which: Sequence[int], work: Callable[[nn.Module, dict[int, Mixer]], None]) -> None:
        """Do work on these blocks' mixers, and leave them in WORK/name.safetensors; or take them from there."""
        file, mixers = self.work / f"{name}.safetensors", self.chosen(which)
        module = nn.ModuleDict({str(index): mixer for index, mixer in mixers.items()})
        if not file.exists():
            work(module, mixers)
            write_atomically(file, save({key: value.detach().contiguous() for key, value in module.state_dict().items()}))
        module.load_state_dict(load_file(file))

    @torch.no_grad()
    def _start(self, module: nn.Module, mixers: dict[int, Mixer]) -> None:
        """Give each mixer the output projection that fits `START` tokens best, by least squares."""
        size, width = self.mixers[0].out.shape  # type: ignore[misc]
        products, targets = (torch.zeros(len(mixers), width, other) for other in (width, size))
        tokens = 0
        for step in count():
            ids, counts = padded(self.texts.read(self.texts.at(step)))
            for index, (u, mixed, _) in enumerate(self.student.states(ids, {})):
                scanned = mixers[index].scanned(u, self.student.kernels, self.student.dtype)[counts].float()
                products[index] += scanned.T @ scanned
                targets[index] += scanned.T @ mixed[counts].float()
            tokens += int(counts.sum())
            if tokens >= START:
                break
        for index, mixer in mixers.items():
            ridge = RIDGE * products[index].diagonal().mean() * torch.eye(width)
            mixer.out.copy_(torch.linalg.solve(products[index] + ridge, targets[index]).T)

    def _train(
        self, name: str, module: nn.Module, mixers: dict[int, Mixer], hours: float, loss_of: Any, measure: Any
    ) -> None:
        rate = RATES[name.split("-")[0]]
        matrices = [parameter for parameter in module.parameters() if parameter.ndim == 2 and min(parameter.shape) > 16]
        taken = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        groups = [{"params": matrices, "lr": rate}, {"params": others, "lr": 3 * rate}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        job = Training(
            name,
            module,
            batch_of=self.texts.at,
            loss_of=lambda batch, step: loss_of(self.texts.read(batch), mixers, step),
            optimizers=[optimizer],
            schedule_of=lambda optimizer, spent: LambdaLR(optimizer, lambda _: warmed_cosine(spent())),
            seed=self.settings.seed,
            save_every=120.0,
        )
        loop = Loop(self.work / name, job, Budget(hours=hours), accelerator_for(torch.device("cpu")))

        def measured() -> None:
            spent = loop.share_spent()
            if spent < 1 and spent < POINT * len(loop.curve):
                return
            losses = [sum(column) / len(column) for column in zip(*loop.losses, strict=True)]
            point = {"spent": spent, "step": loop.step, "seconds": loop.seconds, "loss": losses, "held": measure(mixers)}
            loop.add_point(point)
            write_atomically(self.work / f"{name}.json", json.dumps(loop.curve, indent=1).encode())
            self.say(json.dumps({"at": name, **point}, default=float))

        with Stop() as stop:
            if not loop.run(measured, lambda: stop.requested):
                raise KeyboardInterrupt

    def _match(self, texts: list[TeacherText], mixers: dict[int, Mixer], step: int) -> Loss:
        ids, counts = padded(texts)
        with torch.no_grad():
            states = [(u, mixed) for u, mixed, _ in self.student.states(ids, {})]
        losses = [distance(self._mixed(mixer, states[i][0]), states[i][1], counts) for i, mixer in mixers.items()]
        return torch.stack(losses).sum(), [torch.stack(losses).mean()]

    def _mixed(self, mixer: Mixer, u: Tensor) -> Tensor:
        return mixer(u, self.student.kernels, self.student.dtype)  # type: ignore[no-any-return]

    def _join(self, texts: list[TeacherText], mixers: dict[int, Mixer], step: int) -> Loss:
        ids, counts = padded(texts)
        with torch.no_grad():
            wanted = [h for _, _, h in self.student.states(ids, {})]
        made = (h for _, _, h in self.student.states(ids, mixers))
        losses = torch.stack([distance(mine, theirs, counts) for mine, theirs in zip(made, wanted, strict=True)])
        return losses.mean(), [losses.mean(), losses[-1]]

    def _answer(self, texts: list[TeacherText], mixers: dict[int, Mixer], step: int) -> Loss:
        ids, _ = padded(texts)
        counted = boxed([text.counted for text in texts])
        generator = step_generator(self.settings.seed, step, "answers")
        vocabulary = self.student.model.config.vocab_size
        wanted = Distillation.of(texts, vocabulary, generator, torch.device("cpu"))
        rows = self.student.last(ids, mixers)[counted]
        loss = wanted.loss(self.student.logits(rows, wanted.rows))
        return loss, [loss]

    @torch.no_grad()
    def _over_held(self, loss_of: Callable[[list[TeacherText]], tuple[list[float], float]]) -> list[float]:
        """The mean of the losses over the held texts, each batch with its weight."""
        found = [loss_of(self.held.read(batch)) for batch in self.held_batches]
        whole = sum(weight for _, weight in found)
        return [sum(losses[i] * weight for losses, weight in found) / whole for i in range(len(found[0][0]))]

    def _matched(self, mixers: dict[int, Mixer]) -> list[float]:
        """The distance of each block's mixer from its attention, over the held texts."""

        def loss_of(texts: list[TeacherText]) -> tuple[list[float], float]:
            ids, counts = padded(texts)
            states = enumerate(self.student.states(ids, {}))
            pairs = ((self._mixed(mixers[i], u), mixed) for i, (u, mixed, _) in states if i in mixers)
            return [float(distance(made, wanted, counts)) for made, wanted in pairs], float(counts.sum())

        return self._over_held(loss_of)

    def _joined(self, mixers: dict[int, Mixer]) -> list[float]:
        """The distance of the last block's hidden state from SmolLM2's, and then `answered`."""

        def loss_of(texts: list[TeacherText]) -> tuple[list[float], float]:
            ids, counts = padded(texts)
            *_, (_, _, wanted) = self.student.states(ids, {})
            *_, (_, _, made) = self.student.states(ids, mixers)
            return [float(distance(made, wanted, counts))], float(counts.sum())

        return self._over_held(loss_of) + self.answered(mixers)

    def answered(self, mixers: dict[int, Mixer]) -> list[float]:
        """Over the held texts: cross-entropy with SmolLM2's distribution, −log p of its likeliest token, and how often the
        likeliest token is SmolLM2's. Nats a token."""

        def loss_of(texts: list[TeacherText]) -> tuple[list[float], float]:
            ids, _ = padded(texts)
            counted = boxed([text.counted for text in texts])
            top = boxed([text.top_ids for text in texts])[counted].long()
            targets = boxed([text.top_logp for text in texts])[counted].float().softmax(-1)
            nats = self.student.logits(self.student.last(ids, mixers)[counted]).log_softmax(-1)
            cross = -(targets * nats.gather(-1, top)).sum(-1).mean()
            right = (nats.argmax(-1) == top[:, 0]).float().mean()
            return [float(cross), float(-nats.gather(-1, top[:, :1]).mean()), float(right)], float(counted.sum())

        return self._over_held(loss_of)


def text_of(settings: Settings, work: Path) -> tuple[Any, Data]:
    """SmolLM2 as the library has it, in float32, and what it says: its own answers, and its view of plain texts."""
    backbone = load("smollm2", "bfloat16")
    config = TrainConfig(
        prompts=settings.prompts, texts=settings.texts, temperatures=settings.temperatures, answers=settings.answers
    )
    plan = {name: getattr(config, name) for name in ("prompts", "texts", "temperatures", "answers")}
    data = gather(backbone, config, (backbone.n_blocks,), work / "text", plan=plan)
    return load("smollm2", "float32", keep=True).model, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="the folder for the text, checkpoints and results")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder for the mixers")
    parser.add_argument("--prompts", help="a file of prompts, JSON lines; SmolLM2's answers to them are the text")
    parser.add_argument("--text", action="append", default=[], help="a plain text to learn from, too; may be repeated")
    parser.add_argument("--answers", type=int, help="how many answers; default: one for each prompt")
    parser.add_argument("--keep", type=int, default=Settings.keep, help="how many of the 30 attentions stay")
    parser.add_argument(
        "--start", help="go on with the mixers in this folder; more are added where fewer attentions are to stay"
    )
    parser.add_argument("--match-hours", type=float, default=Settings.match_hours, help="of the first step")
    parser.add_argument("--join-hours", type=float, default=Settings.join_hours, help="of the second step")
    parser.add_argument("--answer-hours", type=float, default=Settings.answer_hours, help="of the third step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bfloat16", action="store_true", help="products in bfloat16: for processors with AMX or AVX-512 BF16"
    )
    args = vars(parser.parse_args())
    work, out, threads = args.pop("work"), args.pop("out"), args.pop("threads")
    dtype = torch.bfloat16 if args.pop("bfloat16") else torch.float32
    settings = Settings(texts=tuple(args.pop("text")), **args)
    torch.set_num_threads(threads)
    keep_memory()
    try:
        model, data = text_of(settings, work)
        student = Student(model, dtype, compiled=True)
        training = MixerTraining(student, data, settings, work, lambda line: print(line, flush=True))
        mixers = training.run()
    except OfframpError as error:
        report(parser, error)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.")
        return
    held = dict(zip(("cross_entropy", "nats", "agreement"), training.answered(mixers), strict=True))
    record = {
        "base": "smollm2", "command": command_line(), "settings": asdict(settings), "text": data.files,
        "held": {name: round(value, 4) for name, value in held.items()}, "versions": versions(),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_mixers(out / MIXERS, {block: mixer.tensors() for block, mixer in mixers.items()}, record)
    print(f"{out / MIXERS}: mixers in blocks {sorted(mixers)}; {record['held']}")


if __name__ == "__main__":
    main()
