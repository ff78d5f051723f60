"""Compare full depth with verified drafts and with exits that decide: times, blocks, and whether the answer changes.

python examples/compare.py [MODEL]
"""

import sys

import offramp

model = offramp.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
engines = {
    "full depth": offramp.Engine(model),
    "verified drafts": offramp.Engine(model, offramp.shipped_for(model, draft=True), fill="verify"),
    "exits": offramp.Engine(model, offramp.shipped_for(model)),
}
questions = ["Why is the sky blue?", "What is the capital of France?", "How do you boil an egg?"]
for engine in engines.values():
    engine.generate(questions[0], max_tokens=8)  # the first answer also warms the processor's caches
answers = {name: [engine.generate(question, max_tokens=48) for question in questions] for name, engine in engines.items()}
for name, given in answers.items():
    speed = sum(answer.decode_tokens_per_second for answer in given) / len(given)
    blocks = sum(answer.mean_blocks for answer in given) / len(given)
    same = sum(answer.ids == full.ids for answer, full in zip(given, answers["full depth"], strict=True))
    print(
        f"{name:<16} {speed:6.0f} tokens/s  {blocks:5.1f} blocks a token  {same} of {len(given)} answers are full depth's"
    )
