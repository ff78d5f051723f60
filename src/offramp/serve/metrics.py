"""Metrics for Prometheus. A name is vLLM's, with `offramp:` before it, where the meaning is vLLM's."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from offramp.decode.request import drafts_of
from offramp.serve.choices import Choice
from offramp.serve.scheduler import Outcome, Scheduler

WORST_FIRST: tuple[Outcome, ...] = ("error", "abort", "length", "stop")

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of a server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        gauges = {
            "num_requests_running": ("Requests in the batch.", lambda: scheduler.running),
            "num_requests_waiting": ("Requests that wait for a row.", lambda: scheduler.waiting),
            "prompt_cache_bytes": ("Bytes of the prompt cache.", lambda: scheduler.cache.bytes),
            "engine_failures": ("Steps that failed.", lambda: scheduler.failures),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"offramp:{name}", text, registry=self._registry).set_function(value)
        self._finished = Counter(
            "offramp:request_success", "Finished requests.", ["finished_reason"], registry=self._registry
        )
        self._counters = {
            name: Counter(f"offramp:{name}", text, registry=self._registry)
            for name, text in (
                ("prompt_tokens", "Tokens of prompts."),
                ("prefix_cache_hits", "Tokens of prompts that the prompt cache had."),
                ("generation_tokens", "Tokens of answers."),
                ("blocks", "Blocks that ran for tokens of answers."),
                ("spec_decode_num_draft_tokens", "Drafts."),
                ("spec_decode_num_accepted_tokens", "Drafts that stood."),
            )
        }
        self._times = {
            name: Histogram(f"offramp:{name}", text, registry=self._registry, buckets=SECONDS)
            for name, text in (
                ("time_to_first_token_seconds", "From a request's arrival to its first token."),
                ("time_per_output_token_seconds", "Of an answer, after its first token."),
                ("e2e_request_latency_seconds", "From a request's arrival to its end."),
            )
        }

    def finished(self, chosen: list[Choice]) -> None:
        """Count a request with its answers as they are now. It ended as the worst of them did."""
        job, outcomes = chosen[0].job, {choice.job.outcome for choice in chosen}
        self._finished.labels(finished_reason=next(each for each in WORST_FIRST if each in outcomes)).inc()
        self._count("prompt_tokens", len(job.ids))
        self._count("prefix_cache_hits", job.cached)
        self._times["e2e_request_latency_seconds"].observe(time.monotonic() - job.asked)
        if begun := [choice for choice in chosen if choice.tokens]:
            self._times["time_to_first_token_seconds"].observe(min(choice.first for choice in begun) - job.asked)
        for choice in begun:
            self._answered(choice)

    def _answered(self, choice: Choice) -> None:
        """Count the tokens of an answer that have come."""
        tokens, engine = choice.tokens, choice.job.engine
        self._count("generation_tokens", len(tokens))
        self._count("blocks", sum(token.blocks for token in tokens))
        if engine.plan.fill.verifies:
            made, stood = drafts_of(tokens)
            self._count("spec_decode_num_draft_tokens", made)
            self._count("spec_decode_num_accepted_tokens", stood)
        if len(tokens) > 1:
            self._times["time_per_output_token_seconds"].observe((choice.last - choice.first) / (len(tokens) - 1))

    def _count(self, name: str, by: int) -> None:
        self._counters[name].inc(by)

    def text(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self._registry)
