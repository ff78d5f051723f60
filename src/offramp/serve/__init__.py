"""An OpenAI-compatible server: many requests side by side on one engine.

`scheduler` runs the engine in a thread of its own, `cache` keeps the memories of prompts, `api` speaks HTTP.
"""
