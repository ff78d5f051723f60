"""Train exits on your own prompts, calibrate them, and keep them in a folder.

    python examples/own_prompts.py MODEL PROMPTS.txt FOLDER [HOURS]

PROMPTS.txt has a prompt on each line, some hundreds of them. The last third is kept for the calibration.
"""

import sys
from pathlib import Path

import offramp
from offramp.training.losses import Question

name, file, folder = sys.argv[1:4]
hours = float(sys.argv[4]) if len(sys.argv) > 4 else 0.5
prompts = Path(file).read_text().splitlines()
kept = len(prompts) // 3
trained = Path(folder) / "prompts.txt"
trained.parent.mkdir(parents=True, exist_ok=True)
trained.write_text("\n".join(prompts[:-kept]))
model = offramp.load(name)
exits = offramp.train(model, folder, offramp.TrainConfig(prompts=str(trained), hours=hours))
record = offramp.calibrate(model, exits, [Question(prompt) for prompt in prompts[-kept:]])
exits.save(folder)
print(
    f"{folder}: {'calibrated' if record.passed else 'no policy passed: all exits stay closed'}; {exits.policy.describe()}"
)
