"""Answer a question, and show after which block each token left.

python examples/answer.py [MODEL] [QUESTION]
"""

import sys

import offramp

model = offramp.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
engine = offramp.Engine(model, offramp.shipped_for(model))
for token in engine.stream(sys.argv[2] if len(sys.argv) > 2 else "Why is the sky blue?", max_tokens=40):
    early = token.exit_block < model.n_blocks
    print(f"{token.text!r:<16} after block {token.exit_block} of {model.n_blocks}{', early' if early else ''}")
