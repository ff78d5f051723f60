"""What the rows of a pass cost, in steps of full depth: passes of one row.

A table knows some machines. `offramp bench --costs` measures a model on this machine, and what it finds is kept in the
cache. Costs decide how many drafts are made, and never what they are compared with: answers do not change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch

from offramp.files import cache_folder, in_the_cache, read_json, write_atomically
from offramp.machine import processor
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import MOST_DRAFTS, kernels

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 32)  # rows of the passes whose costs are known
Table = dict[tuple[str, str], dict[str, tuple[float, ...]]]
# The costs of 0, 1, … more rows, at these widths. They were measured for smollm2 on one maker's processors with these
# kernels: AMD's with AVX2 by one run of offramp bench --costs for each format (those of bfloat16 and int4 are its means
# with two runs of a script that is not kept); Intel's by two runs of it (int4 is the mean of int4 and of the file's 4 bits,
# whose first rows cost less); AMD's with AVX-512 by scripts that are not kept, those of 32 rows against a step of a
# compiled loop, which is shorter than a single one, and those of 9 to 16 on a straight line. On other processors, they are
# a guess.
ROW_COSTS: Table = {
    ("AMD", "AVX-512 BF16 and VNNI"): {
        "float32": (0.0, 0.04, 0.15, 0.16, 0.17, 0.2, 0.29, 0.39, 0.48, 0.76, 1.13, 2.6),
        "bfloat16": (0.0, 0.02, 0.06, 0.1, 0.12, 0.16, 0.2, 0.25, 0.35, 0.66, 1.07, 2.7),
        "int8": (0.0, 0.08, 0.25, 0.4, 0.7, 0.9, 1.15, 1.35, 1.61, 2.41, 3.47, 7.7),
        "int4": (0.0, 0.07, 0.15, 0.25, 0.4, 0.55, 0.75, 1.0, 1.18, 1.73, 2.47, 5.4),
    },
    ("AMD", "AVX2"): {
        "float32": (0.0, 0.02, 0.07, 0.11, 0.32, 0.32, 0.39, 0.47, 0.6, 0.84, 1.41, 3.16),
        "bfloat16": (0.0, 0.07, 0.13, 0.4, 0.61, 0.72, 1.26, 1.55, 1.76, 2.11, 3.02, 6.5),
        "int8": (0.0, 0.22, 0.66, 1.08, 1.52, 1.93, 2.48, 3.07, 3.27, 4.73, 7.24, 15.55),
        "int4": (0.0, 0.18, 0.5, 0.74, 1.01, 1.46, 1.71, 2.18, 2.38, 3.59, 5.09, 11.06),
    },
    ("Intel", "AVX-512 and VNNI"): {
        "float32": (0.0, 0.06, 0.12, 0.12, 0.12, 0.12, 0.12, 0.14, 0.28, 0.45, 1.17, 1.61),
        "bfloat16": (0.0, 0.12, 0.19, 0.19, 0.19, 0.19, 0.19, 0.19, 0.46, 0.67, 1.7, 3.06),
        "int8": (0.0, 0.24, 0.5, 0.5, 0.5, 0.5, 0.62, 0.81, 1.1, 1.66, 3.41, 6.96),
        "int4": (0.0, 0.04, 0.12, 0.12, 0.19, 0.34, 0.47, 0.67, 1.02, 1.6, 2.54, 6.28),
    },
}
ELSEWHERE = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05)
# The same for a model whose weights stay in a processor's cache: reading them is no longer what a step takes its time for,
# so each row adds its part. Measured for models of mamba-tiny's shape by offramp bench --costs, the means of two or three
# runs; in int4 with AVX2, by one run.
IN_CACHE = 32 << 20  # bytes that a step of such a model reads at most
CACHED_COSTS: Table = {
    ("AMD", "AVX-512 BF16 and VNNI"): {
        "float32": (0.0, 0.22, 0.36, 0.46, 0.5, 0.68, 0.91, 1.12, 1.37, 2.13, 3.15, 7.2),
        "bfloat16": (0.0, 0.29, 0.52, 0.73, 1.02, 1.24, 1.56, 1.83, 2.1, 2.92, 4.02, 8.4),
        "int8": (0.0, 0.43, 0.78, 1.07, 1.4, 1.75, 2.09, 2.43, 2.82, 3.99, 5.55, 11.8),
        "int4": (0.0, 0.47, 0.66, 1.25, 1.39, 1.88, 2.08, 2.59, 3.01, 4.26, 5.93, 12.6),
    },
    ("AMD", "AVX2"): {
        "float32": (0.0, 0.1, 0.17, 0.25, 0.41, 0.47, 0.87, 1.03, 1.36, 1.89, 2.82, 6.19),
        "bfloat16": (0.0, 0.19, 0.35, 0.65, 0.84, 1.11, 1.46, 1.69, 2.41, 3.07, 4.69, 9.46),
        "int8": (0.0, 0.47, 0.98, 1.42, 1.91, 2.33, 2.76, 3.31, 3.98, 5.44, 7.99, 16.24),
        "int4": (0.0, 0.43, 0.68, 1.07, 1.48, 1.8, 2.29, 2.73, 3.69, 4.64, 6.65, 13.7),
    },
    ("Intel", "AVX-512 and VNNI"): {
        "float32": (0.0, 0.29, 0.3, 0.34, 0.46, 0.58, 0.72, 0.85, 1.35, 1.77, 2.53, 4.91),
        "bfloat16": (0.0, 0.29, 0.33, 0.53, 0.74, 0.97, 1.15, 1.45, 2.05, 2.69, 3.65, 6.95),
        "int8": (0.0, 0.52, 0.69, 0.97, 1.27, 1.6, 1.87, 2.26, 2.82, 3.91, 5.33, 11.32),
        "int4": (0.0, 0.56, 0.58, 0.87, 1.19, 1.49, 1.73, 2.1, 2.64, 3.54, 4.88, 10.18),
    },
}
CACHED_ELSEWHERE = (0.0, 0.4, 0.7, 1.0, 1.35, 1.7, 2.0, 2.4)


def row_costs(backbone: Backbone) -> tuple[float, ...]:
    """The costs of 0 to `MOST_DRAFTS` more rows of a pass on this machine: measured ones, or those of the table."""
    kept = _measured(read_json(cache_folder() / "costs.json").get(_key(backbone)))
    return _at_all_widths(kept) if kept else costs_in_table(backbone.precision, backbone.step_bytes)


def costs_in_table(precision: str, step_bytes: int) -> tuple[float, ...]:
    """The costs of 0 to `MOST_DRAFTS` more rows of a pass by the tables of machines.

    `precision` is that of a backbone, and `step_bytes` are those that a step reads.
    """
    table, found = _tables(step_bytes)
    for (maker, instructions), costs in table.items():
        if maker in processor() and kernels() == instructions:
            found = costs.get(precision, found)
    return _at_all_widths(found)


def _tables(step_bytes: int) -> tuple[Table, tuple[float, ...]]:
    """The table for a model of this size, and its costs elsewhere."""
    return (CACHED_COSTS, CACHED_ELSEWHERE) if step_bytes <= IN_CACHE else (ROW_COSTS, ELSEWHERE)


def keep(backbone: Backbone, costs: Sequence[float]) -> None:
    """Let these costs, at `WIDTHS`, be the model's on this machine. Raises `OfframpError` where the cache is unusable."""
    file = cache_folder() / "costs.json"
    with in_the_cache():
        write_atomically(file, json.dumps({**read_json(file), _key(backbone): [*costs]}).encode())


def _key(backbone: Backbone) -> str:
    """What the costs depend on."""
    where = processor(), kernels(), torch.get_num_threads()
    return repr((backbone.source.fingerprint, backbone.weight_format, backbone.engine, *where))


def _measured(kept: object) -> list[float] | None:
    """Costs that were kept: as many as `WIDTHS`, from 0 on, and none less than the one before. None for anything else."""
    if not isinstance(kept, list) or not all(isinstance(cost, int | float) and 0 <= cost < 1e6 for cost in kept):
        return None
    return kept if len(kept) == len(WIDTHS) and kept[0] == 0 and kept == sorted(kept) else None


def _at_all_widths(costs: Sequence[float]) -> tuple[float, ...]:
    """The costs of 0 to `MOST_DRAFTS` more rows from those at the first `WIDTHS`.

    They are on straight lines between these widths, and beyond them.
    """
    widths, rows = WIDTHS[: len(costs)], np.arange(1, MOST_DRAFTS + 2)
    slope = (costs[-1] - costs[3]) / (widths[-1] - widths[3])
    beyond = costs[-1] + slope * (rows - widths[-1])
    return tuple(np.where(rows <= widths[-1], np.interp(rows, widths, costs), beyond).tolist())
