"""A condition that a test watches on a cluster's workers. They import this file, so it imports little."""

from __future__ import annotations

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
    """A condition that leaves a mark for each share, by its node. A node waits in its third share until one has died."""

    marks: Path = Path()

    def engine(self, backbone: Backbone, sampling: Sampling | None = None) -> Engine:
        """As for a `Condition`."""
        node = ray.get_runtime_context().get_node_id()
        (self.marks / f"{node}-{time.monotonic_ns()}").touch()
        while len([*self.marks.glob(f"{node}-*")]) == 3 and not (self.marks / "dead").exists():
            time.sleep(0.02)
        return super().engine(backbone, sampling)
