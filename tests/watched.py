"""A condition that a test watches on a cluster's workers. They import this file, so it imports little."""

from __future__ import annotations

import importlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import ray

from offramp import Engine
from offramp.decode.sampling import Sampling
from offramp.evaluation.evaluation import Condition
from offramp.model.backbone import Backbone


@dataclass(frozen=True)
class Watched(Condition):
    """A condition that leaves a mark for each share, by its node. In its third share, a node waits until another dies."""

    marks: Path = Path()

    def engine(self, backbone: Backbone, sampling: Sampling | None = None) -> Engine:
        """As for a `Condition`."""
        node = ray.get_runtime_context().get_node_id()
        (self.marks / f"{node}-{time.monotonic_ns()}").touch()
        while len([*self.marks.glob(f"{node}-*")]) == 3 and not {*self.marks.glob("dead_*")} - {
            self.marks / f"dead_{node}"
        }:
            time.sleep(0.02)
        return super().engine(backbone, sampling)


def wait(backbone: Backbone, marks: Path) -> None:
    """A share that leaves a mark and never ends."""
    (marks / ray.get_runtime_context().get_node_id()).touch()
    while True:
        time.sleep(60)


def crash(backbone: Backbone, share: object) -> None:
    """A share that ends its worker."""
    os._exit(1)


class Missing:
    """What a worker cannot have, as a machine with another version lacks a module."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return importlib.import_module, ("offramp.missing",)
