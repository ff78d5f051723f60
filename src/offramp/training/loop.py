"""The training loop that exits, `lm/` and `hybrid/` share: steps, checkpoints, exact resumption, several processes.

`accelerate` places the tensors, mixes precisions, clips gradients, and writes and reads checkpoints. A step depends only on
the seed and its number. So a resumed run gives the same result, bit for bit, as a run without interruption.

Several processes train together if `torchrun` starts them, or on GPUs `accelerate launch`. Each process takes an equal
share of a step's batch, and the gradients are averaged. The result is the same as with one process, up to rounding, on
three conditions. The loss is a mean over the batch. All shares weigh the same in it (for a mean over tokens, each needs as
many tokens). The step draws neither dropout nor a sampled vocabulary. Otherwise it is another run of the same method. Each
process loads the backbone on its own device.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from offramp.errors import BadInput, BadNumbers, CorruptFile
from offramp.files import alone_in, put, write_atomically
from offramp.progress import Progress, silent

POINTS = 60  # points of a stage's curve of losses
STATE = "loop.json"  # in a checkpoint
SIMILAR = 32  # batches whose texts are sorted by length
Loss = tuple[Tensor, list[Tensor]]  # the loss that a step minimises, and the losses that are reported


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, or hours of work.

    Work is processor time divided by the number of threads, so that neither pauses nor a busy machine count.
    """

    steps: int | None = None
    hours: float | None = None


@dataclass(frozen=True)
class Training:
    """The work of a loop: a module, its batches, its loss and its optimizers.

    name: names the job in messages and seeds its steps together with `seed`. module: its parameters that require a gradient
    are trained and saved, the others are not. batch_of: the items of a step's batch, a list or a tensor of one item a row.
    loss_of: the loss of a share of these items in that step. optimizers: one or several, for different parameters.
    schedule_of: the learning rate schedule of an optimizer, stepped after each step; it is given a function that returns
    the share of the budget that is spent. save_every: seconds between checkpoints. bfloat16: matrix products in it.
    """

    name: str
    module: nn.Module
    batch_of: Callable[[int], Any]
    loss_of: Callable[[Any, int], Loss]
    optimizers: list[Optimizer]
    schedule_of: Callable[[Optimizer, Callable[[], float]], LRScheduler]
    seed: int = 0
    save_every: float = 20.0
    bfloat16: bool = False


def accelerator_for(device: torch.device, bfloat16: bool = False) -> Accelerator:
    """An accelerator for a model on this device; with `bfloat16`, matrix products under `autocast` are computed in it.

    accelerate keeps one precision for the whole process. If another one is set already, it stays, and the loop uses an
    autocast of its own.
    """
    place: dict[str, Any] = {"cpu": device.type == "cpu"}
    try:
        precision = "bf16" if bfloat16 else "no"
        return Accelerator(step_scheduler_with_optimizer=False, mixed_precision=precision, **place)
    except ValueError:
        return Accelerator(step_scheduler_with_optimizer=False, **place)


def alone(folder: Path, device: torch.device) -> AbstractContextManager[None]:
    """Do `alone_in` for all processes that train together on devices of this kind: the main one holds the lock."""
    return alone_in(folder) if accelerator_for(device).is_main_process else nullcontext()


class Loop:
    """Trains a job until its budget is spent, from the last checkpoint in `folder` if there is one.

    step: the number of finished steps; seconds: of work; curve: points that the caller adds; losses: those of each step
    since the last point. Raises `CorruptFile` for a damaged checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        job: Training,
        budget: Budget,
        accelerator: Accelerator,
        curve: list[dict[str, Any]] | None = None,
    ) -> None:
        self.folder, self.job, self.budget, self.accelerator = folder, job, budget, accelerator
        self.step, self.seconds = 0, 0.0
        self.curve = [] if curve is None else curve
        self.losses: list[list[float]] = []
        job.module.to(accelerator.device)
        self._trained = nn.ParameterList(parameter for parameter in job.module.parameters() if parameter.requires_grad)
        accelerator.prepare_model(self._trained, evaluation_mode=True)  # this loop averages gradients itself
        schedules = [job.schedule_of(optimizer, self.share_spent) for optimizer in job.optimizers]
        self._optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in job.optimizers]
        self._schedules = [accelerator.prepare_scheduler(schedule) for schedule in schedules]
        self._restore()

    def share_spent(self) -> float:
        """The share of the budget that is spent, from 0; 1 or more at the end."""
        if self.budget.steps is not None:
            return self.step / self.budget.steps if self.budget.steps > 0 else 1.0
        return self.seconds / (3600 * (self.budget.hours or 0))

    def add_point(self, point: dict[str, Any]) -> None:
        """Add a point to the curve."""
        self.curve.append(point)
        self.losses.clear()

    def run(self, after_step: Callable[[], None], stop: Callable[[], bool] = lambda: False) -> bool:
        """Train, and call `after_step` after each step. Returns whether the budget is spent.

        `stop` is called before each step. If it returns true, training stops, and can be resumed. Raises `BadNumbers` for a
        loss that is not finite.
        """
        saved, started, worked_before = time.monotonic(), time.process_time(), self.seconds
        while self.share_spent() < 1:
            if self._mean([float(stop())])[0] > 0:
                self._save()
                return False
            losses = self._train_step()
            self.step += 1
            worked = worked_before + (time.process_time() - started) / torch.get_num_threads()
            self.seconds, *losses = self._mean([worked, *losses])
            self.losses.append(losses)
            for schedule in self._schedules:
                schedule.step()
            after_step()
            if time.monotonic() - saved > self.job.save_every:
                self._save()
                saved = time.monotonic()
        self._save()
        return True

    def _train_step(self) -> list[float]:
        job, process = self.job, self.accelerator.process_index
        torch.manual_seed(step_generator(job.seed, self.step, job.name).initial_seed() + process)  # dropout
        with self._autocast():
            loss, losses = job.loss_of(self._share_of(job.batch_of(self.step)), self.step)
        if not math.isfinite(float(loss.detach())):
            raise BadNumbers(f"The loss of the {job.name} became NaN at step {self.step}.", "Try a lower learning rate.")
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:
            for parameter in self._trained:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self.accelerator.clip_grad_norm_(self._trained.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        return [float(value.detach()) for value in losses]

    def _autocast(self) -> AbstractContextManager[Any]:
        """The job's precision: accelerate's, or torch's own where accelerate was set to another one before."""
        if (self.accelerator.mixed_precision == "bf16") == self.job.bfloat16:
            precision: AbstractContextManager[Any] = self.accelerator.autocast()
            return precision
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.job.bfloat16)

    def _share_of(self, items: Any) -> Any:
        """This process's items: with n processes every n-th, or all if there are fewer items than processes."""
        processes = self.accelerator.num_processes
        return items if len(items) < processes else items[self.accelerator.process_index :: processes]

    def _mean(self, values: list[float]) -> list[float]:
        """The mean over all processes, for each of the values."""
        if self.accelerator.num_processes == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        means: list[float] = self.accelerator.reduce(numbers, "mean").tolist()
        return means

    def _state(self) -> dict[str, Any]:
        """A checkpoint's values besides parameters, optimizers and schedules. accelerate would put them into a pickle."""
        return {"step": self.step, "seconds": self.seconds, "curve": self.curve, "losses": self.losses}

    def _save(self) -> None:
        """Write a checkpoint. Only a complete one gets a name that begins with `step-`."""
        whole, partial = self.folder / f"step-{self.step:09d}", self.folder / "partial"
        if whole.exists() or not self.accelerator.is_main_process:
            return
        shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.save_state(str(partial))
        (partial / STATE).write_text(json.dumps(self._state()), "utf-8")
        put(partial, whole)
        for older in set(self.folder.glob("step-*")) - {whole}:
            shutil.rmtree(older)

    def _restore(self) -> None:
        newest = max(self.folder.glob("step-*"), default=None)
        if newest is not None:
            try:
                self.accelerator.load_state(str(newest))
                state = json.loads((newest / STATE).read_text("utf-8"))
                self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
                self.curve[:] = state["curve"]
            except Exception as error:
                raise CorruptFile(f"The checkpoint {newest} is damaged.", "Delete it and run the command again.") from error


class Fit:
    """Fits modules in one or several stages, over epochs of texts; the losses go to `curve`.

    Checkpoints of a stage go to the folder `work`/`stage`. After an interruption, the same calls resume from the last one.
    """

    def __init__(
        self,
        work: Path,
        device: torch.device,
        seed: int = 0,
        batch: int = 8,
        progress: Progress = silent,
        bfloat16: bool = False,
    ) -> None:
        self.work, self.device, self.seed, self.batch, self.bfloat16 = work, device, seed, batch, bfloat16
        self.progress = progress
        self.curve: list[dict[str, Any]] = []

    def run(
        self,
        stage: str,
        module: nn.Module,
        texts: Sized,
        budget: Budget,
        rate: float,
        loss_of: Callable[[list[int], int], Loss],
        lengths: list[int] | None = None,
    ) -> None:
        """Train `module` with AdamW: a short warm-up, then a cosine to zero. Each epoch has the texts in a new order.

        `loss_of` is given the indices of a batch's texts and the step. `lengths`: those of the texts; with them, the texts
        of a batch have similar lengths, so that little is padded.
        """
        per_epoch = self.steps_of(texts)

        @cache
        def batches_of(epoch: int) -> list[list[int]]:
            return batches(len(texts), self.batch, step_generator(self.seed, epoch, stage), lengths)

        def batch_of(step: int) -> list[int]:
            epoch, place = divmod(step, per_epoch)
            return batches_of(epoch)[place]

        def schedule_of(optimizer: Optimizer, share_spent: Callable[[], float]) -> LRScheduler:
            return LambdaLR(optimizer, lambda _: warmed_cosine(share_spent()))

        module.to(self.device).train()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
        job = Training(stage, module, batch_of, loss_of, [optimizer], schedule_of, self.seed, bfloat16=self.bfloat16)
        accelerator = accelerator_for(self.device, self.bfloat16)
        loop = Loop(self.work / stage, job, budget, accelerator, self.curve)
        progress = self.progress if accelerator.is_main_process else silent

        def after_step() -> None:
            losses = [round(loss, 4) for loss in loop.losses[-1]]
            spent = loop.share_spent()
            points = sum(point["stage"] == stage for point in self.curve)
            if spent >= min(1.0, (points + 1) / POINTS):
                loop.add_point({"stage": stage, "step": loop.step, "loss": losses})
            steps = loop.step if spent >= 1 else max(loop.step + 1, round(loop.step / spent))  # with hours, an estimate
            progress(stage, loop.step, steps, f"loss {sum(losses) / len(losses):.3f}")

        loop.run(after_step)
        module.eval()

    def steps_of(self, texts: Sized, epochs: int = 1) -> int:
        """The number of steps for so many epochs."""
        return epochs * -(-len(texts) // self.batch)


def batches(count: int, size: int, generator: torch.Generator, lengths: list[int] | None = None) -> list[list[int]]:
    """The indices of `count` texts in batches, in random order; with their `lengths`, similar ones together."""
    order = torch.randperm(count, generator=generator).tolist()
    if lengths is not None:
        window = SIMILAR * size
        windows = [order[at : at + window] for at in range(0, count, window)]
        order = [index for part in windows for index in sorted(part, key=lengths.__getitem__)]
    found = [order[at : at + size] for at in range(0, count, size)]
    if lengths is not None:
        found = [found[place] for place in torch.randperm(len(found), generator=generator)]
    return found


def warmed_cosine(spent: float, warm: float = 0.05) -> float:
    """The learning rate as a share of the highest, when the share `spent` of the budget is spent."""
    if spent < warm:
        return max(spent / warm, 0.04)
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (spent - warm) / (1 - warm)))


def claim(work: Path, plan: dict[str, Any]) -> None:
    """Note in the folder `work` what is trained there. Raises `BadInput` if that was something else last time."""
    note, wanted = work / "plan.json", json.dumps(plan)
    if not note.exists():
        write_atomically(note, wanted.encode())
    elif note.read_text("utf-8") != wanted:
        raise BadInput(
            f"{work} holds an unfinished training with other settings.",
            "Run it again with its own settings to finish it, or delete that folder to start anew.",
        )


def step_generator(seed: int, step: int, stage: str = "") -> torch.Generator:
    """The random generator of one step of one stage."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
