"""Continuous batching: a thread runs the engine, and requests join and leave its batch between steps.

The thread owns the batch and the prompt cache, so nothing else touches them. Others hand it jobs, and hear what happens to
them through a function that each job brings (`Job.tell`), which is called in that thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from offramp.decode.batch import Batch
from offramp.decode.engine import Engine
from offramp.decode.request import Decided, Event, Finished, Limits, Prefilled, Reading, Request, Talk, Token
from offramp.decode.sampling import Choose
from offramp.errors import BadNumbers, OfframpError
from offramp.serve.cache import PromptCache

State = Literal["waiting", "running", "done"]
Outcome = Literal["stop", "length", "abort", "error"]
STUCK = 120.0  # seconds that no step takes


class Full(OfframpError):
    """As many requests wait as may wait. `seconds`: when to try again."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already.", f"Try again in {seconds} seconds.")
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """A request to the scheduler, for one of its engines.

    tell: hears each `Token`, and at the end None or the error that ended it. borders: numbers of the prompt's first ids
    after which other prompts may go on differently. twins: jobs with the same prompt, which is read once for all of them.

    What the scheduler notes: `cached`, the prompt's ids that were in the prompt cache; the time when the job was handed in,
    when its prompt had been read, and when it ended, in seconds of `time.monotonic`; the error that ended it; the engine's
    request.
    """

    engine: Engine
    ids: list[int]
    limits: Limits
    choose: Choose
    tell: Callable[[Token | Exception | None], None]
    borders: tuple[int, ...] = ()
    twins: list[Job] = field(default_factory=list)
    state: State = "waiting"
    cancelled: bool = False
    cached: int = 0
    asked: float = field(default_factory=time.monotonic)
    read: float = 0.0
    ended: float = 0.0
    error: Exception | None = None
    talk: Talk | None = None
    request: Request | None = None

    @property
    def outcome(self) -> Outcome:
        """Why the job ended, in vLLM's words. One that still runs, or that was cancelled, is given up."""
        reason = self.request.finish_reason if self.request else None
        return "error" if self.error else reason if reason == "stop" or reason == "length" else "abort"


class Scheduler:
    """Runs jobs, at most `rows` side by side; at most `waiting` more wait for their turn.

    Each engine has a batch of its own; where several have work, their steps take turns. cache: the bytes that the prompt
    cache may take.
    """

    def __init__(self, rows: int = 16, waiting: int = 64, cache: int = 1 << 30) -> None:
        self.rows, self.most_waiting, self.cache = rows, waiting, PromptCache(cache)
        self.failures = 0
        self._failing = False  # whether a step has failed, and no token was decided since
        self._began: float | None = None  # when the step that runs began
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[Request, Job] = {}
        self._closing = False
        self._batches: dict[Engine, Batch] = {}
        self._thread = threading.Thread(target=self._work, name="offramp-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """The number of jobs in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a row of the batch."""
        return len(self._waiting)

    @property
    def trouble(self) -> str | None:
        """What is wrong with the engine, or None."""
        began = self._began
        if not self._thread.is_alive():
            return "The engine's thread has ended."
        if self._failing:
            return "The engine's last step failed."
        if began is not None and time.monotonic() - began > STUCK:
            return f"The engine's step has taken more than {STUCK:.0f} seconds."
        return None

    def submit(self, job: Job) -> None:
        """Hand in a job. Raises `Full` where too many wait, and `BadInput` for a prompt that the engine cannot take."""
        job.engine.backbone.prompts.check(job.ids)
        with self._changed:
            if self._closing:
                raise Full(len(self._waiting), 5)
            if len(self._waiting) + len(job.twins) >= self.most_waiting + max(0, self.rows - len(self._running)):
                raise Full(len(self._waiting), 1 + len(self._waiting) // max(1, self.rows))
            self._waiting += [job]
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give a job up. One that waits is gone at once; one that runs frees its row before the next step."""
        with self._changed:
            for each in (job, *job.twins):
                each.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, None)
            self._changed.notify()

    def close(self) -> None:
        """Take no more jobs, end those that run, and wait for that."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        """The thread: step until closed. An error ends the jobs that run, and nothing else."""
        while True:
            with self._changed:
                self._began = None
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                self._began = time.monotonic()
                if self._closing and not (self._waiting or self._running):
                    return
                admitted = self._admit()
            try:
                for job in admitted:
                    self._start(job)
                self._drop_cancelled()
            except BaseException as error:  # a bug
                self._fail(error, [*self._running.values(), *admitted])
            for engine, batch in [*self._batches.items()]:
                try:
                    self._step(batch)
                except BaseException as error:  # whatever a step raises: NaN, memory, a bug
                    self._fail(error, [job for job in self._running.values() if job.engine is engine])

    def _admit(self) -> list[Job]:
        """The jobs that may start now, in the order in which they came."""
        admitted: list[Job] = []
        free = self.rows - len(self._running)
        while self._waiting and free > 0:
            job = self._waiting.popleft()
            admitted.append(job)
            free -= 1 + len(job.twins)
        return admitted

    def _start(self, job: Job, twin: Talk | None = None) -> None:
        """Put a job into the batch. `twin`: a talk that has read its prompt."""
        if job.cancelled:
            self._end(job, None)
            return
        try:
            talk, job.cached = (twin.fork(), len(job.ids) - 1) if twin else self.cache.talk(job.engine, job.ids)
            batch = self._batches.setdefault(job.engine, Batch(job.engine))
            request = batch.add(job.ids, talk, job.choose, **job.limits)
        except Exception as error:  # whatever it is, it is this job's own
            self._end(job, error)
            return
        request.pauses = [border for border in job.borders if job.cached < border < len(job.ids)]
        job.talk, job.request, job.state = talk, request, "running"
        self._running[request] = job

    def _step(self, batch: Batch) -> None:
        """Let a batch make a step, and tell what happened."""
        if not batch.requests:
            return
        events = batch.step()
        for event in events:
            job = self._running.get(event.request)
            if job is None:
                continue
            try:
                self._tell(job, event)
            except Exception as error:  # the job's own
                batch.cancel(event.request)
                self._end(job, error)
        broken = any(isinstance(event.request.error, BadNumbers) for event in events)
        self.failures += broken
        self._failing = (broken or self._failing) and not any(isinstance(event, Decided) for event in events)

    def _tell(self, job: Job, event: Event) -> None:
        """Do what an event of a job asks for."""
        if isinstance(event, Reading) and event.tokens in job.borders:
            self._remember(job)
        elif isinstance(event, Prefilled):
            job.read = time.monotonic()
            for twin in job.twins:
                self._start(twin, job.talk)
        elif isinstance(event, Decided):
            job.tell(event.token)
        elif isinstance(event, Finished):
            if not event.request.error:
                self._remember(job)
            self._end(job, event.request.error)

    def _remember(self, job: Job) -> None:
        assert job.talk
        self.cache.keep(job.engine, job.talk)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._running.values() if job.cancelled]:
            assert job.request
            self._batches[job.engine].cancel(job.request)
            self._end(job, None)

    def _fail(self, error: BaseException, jobs: list[Job]) -> None:
        """End jobs with an error; their engines begin anew."""
        self.failures += 1
        self._failing = True
        for job in jobs:
            self._batches.pop(job.engine, None)
            self._end(job, error)

    def _end(self, job: Job, error: BaseException | None) -> None:
        if job.state == "done":
            return
        # An exit, or an interrupt, would end the thread that hears of it.
        job.error = error if error is None or isinstance(error, Exception) else RuntimeError(repr(error))
        job.state, job.ended = "done", time.monotonic()
        if job.request is not None:
            self._running.pop(job.request, None)
        for twin in job.twins if job.request is None or not job.read else []:
            self._end(twin, error)  # they would have started when the prompt had been read
        with suppress(Exception):  # who cannot be told an end has no other way to hear of it
            job.tell(job.error)
