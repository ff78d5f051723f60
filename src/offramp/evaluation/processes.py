"""Several processes answer an evaluation's questions: `torchrun --no-python offramp eval …`.

On GPUs `accelerate launch` starts them, too; on CPUs it starts a single one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from offramp.evaluation.evaluation import Condition, Evaluation, answered


def processes() -> PartialState | None:
    """The processes that this one was started with; None if it is alone."""
    return PartialState(cpu=not torch.cuda.is_available()) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def share_out(run: Evaluation, conditions: Sequence[Condition], state: PartialState) -> None:
    """Let each process answer its share, where no answer is kept yet. The main process keeps all answers, as they come."""
    parts = list(dict.fromkeys(run.answers(conditions)))
    missing = [part.missing for part in parts]
    state.wait_for_everyone()  # nothing is written before all have read what is kept
    for part, items in zip(parts, missing, strict=True):
        size = run.batch * state.num_processes
        for start in range(0, len(items), size):
            own = items[start : start + size][state.process_index :: state.num_processes]
            made = gather_object(list(answered(part.condition, run.task, run.batch, run.backbone, own)))
            if state.is_main_process:
                part.add(made, run.progress)
