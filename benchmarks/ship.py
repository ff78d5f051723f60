"""Copy a folder of exits to where it ships. Exits that no policy opens after its test stay behind.

    .venv/bin/python benchmarks/ship.py FROM TO

The draft exit and the sketch of the head always ship. Without exits, the mode `early` reads out by the sketch alone: its
answers are those with exits that never open. Policies that open an exit leave the record.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.exits.format import Record, read_tensors
from offramp.exits.policy import Policy

SKETCH = "sketch."
NONE: dict[str, Any] = {"thresholds": (), "perhaps": (), "keys": ()}  # the rules of no exit


def opens(policy: dict[str, Any]) -> bool:
    """Whether a policy opens an exit."""
    made = Policy.from_json(policy)
    return any(map(made.opens, range(len(made.thresholds))))


def without_exits(calibration: dict[str, Any]) -> dict[str, Any]:
    """A calibration's record, with policies of no exit."""
    if not calibration:
        return {}
    kept = [test for test in calibration["tested"] if not opens(test["policy"])]
    tested = [{**test, "policy": test["policy"] | NONE} for test in kept]
    return {**calibration, "policy": calibration["policy"] | NONE, "tested": tested, "untested": []}


def strip(folder: Path) -> bool:
    """Leave the exits out if no policy that passed opens one. Returns whether they went."""
    record = Record.read(folder)
    records = [record.calibration, *record.elsewhere.values()]
    passed = [test["policy"] for each in records for test in each.get("tested", []) if test["passed"]]
    if not record.config.sketch or not record.config.layers or any(map(opens, passed)):
        return False
    all_tensors = read_tensors(folder, record.weights_sha256)
    tensors = {name: tensor for name, tensor in all_tensors.items() if name.startswith(SKETCH)}
    made = replace(
        record,
        config=replace(record.config, layers=(), tails=()),
        policy=replace(record.policy, **NONE),
        calibration=without_exits(record.calibration),
        elsewhere={format: without_exits(each) for format, each in record.elsewhere.items()},
    )
    made.write(folder, tensors)
    return True


def main(argv: list[str]) -> None:
    source, target = map(Path, argv)
    shutil.copytree(source, target, dirs_exist_ok=True)
    print(f"{target}: {'no exit may open, so no exit ships' if strip(target) else 'with its exits'}")


if __name__ == "__main__":
    main(sys.argv[1:])
