"""Ask a server (`offramp serve smollm2`) with OpenAI's client, and show which tokens were drafts.

python examples/ask_server.py [ADDRESS] [QUESTION]
"""

import sys

from openai import OpenAI

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{address}/v1", api_key="none")
model = client.models.list().data[0].id
question = sys.argv[2] if len(sys.argv) > 2 else "Why is the sky blue?"
messages = [{"role": "user", "content": question}]
for part in client.chat.completions.create(model=model, messages=messages, max_tokens=64, temperature=0, stream=True):
    choice = part.choices[0]
    if choice.finish_reason is None:
        print(f"[{choice.delta.content}]" if choice.offramp["drafted"] else choice.delta.content, end="", flush=True)
    else:
        print(f"\n{choice.offramp['tokens_per_pass']:.2f} tokens a pass; in brackets: drafts that full depth confirmed")
