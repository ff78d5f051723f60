"""An OpenAI-compatible server: many requests side by side on one engine.

`scheduler` runs the engine in a thread of its own, `cache` keeps what was computed for prompts, `api` speaks HTTP.
"""
