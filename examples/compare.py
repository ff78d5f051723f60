"""Compare the modes: times, FLOPs, and whether the answer changes.

python examples/compare.py [MODEL]
"""

import sys

import offramp

model = offramp.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
questions = ["Why is the sky blue?", "What is the capital of France?", "How do you boil an egg?"]
for mode in model.modes:
    model.generate(questions[0], mode, max_tokens=8)  # the first answer also warms the processor's caches
answers = {mode: [model.generate(question, mode, max_tokens=48) for question in questions] for mode in model.modes}
for mode, given in answers.items():
    speed = sum(answer.decode_tokens_per_second for answer in given) / len(given)
    saved = sum(answer.flops_saved for answer in given) / len(given)
    same = sum(answer.ids == full.ids for answer, full in zip(given, answers["full"], strict=True))
    print(f"{mode:<6} {speed:6.0f} tokens/s  {saved:6.1%} of FLOPs saved  {same} of {len(given)} answers are full depth's")
