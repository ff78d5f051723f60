"""Answer a question, and mark the tokens that an exit drafted.

python examples/answer.py [MODEL] [QUESTION]
"""

import sys

import offramp

model = offramp.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
for token in model.stream(sys.argv[2] if len(sys.argv) > 2 else "Why is the sky blue?", mode="exact", max_tokens=40):
    print(f"[{token.text}]" if token.drafted else token.text, end="", flush=True)
print("\nIn brackets: drafts. Full depth chose the other tokens, and confirmed these.")
