"""Continuous batching: a thread runs the engine, and requests join and leave its batch between steps.

The thread owns the batch and the prompt cache, so nothing else touches them. Other threads hand it jobs. Each job brings a
function (`Job.tell`), which the thread calls to say what happens to the job.
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
from offramp.decode.request import Decided, Event, Finished, Generation, Limits, Prefilled, Reading, Request, Talk, Token
from offramp.decode.sampling import Choose
from offramp.errors import BadNumbers, OfframpError, TooLarge
from offramp.serve.cache import PromptCache

State = Literal["waiting", "running", "done"]
Outcome = Literal["stop", "length", "abort", "error"]
STUCK = 120.0  # seconds that no step takes

MOST_CHOICES = 16  # answers to one prompt
LAST_STEP = 5.0  # seconds that closing waits for the step that runs


class Full(OfframpError):
    """No more requests may wait. `seconds`: when to try again."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already.", f"Try again in {seconds} seconds.")
        self.seconds = seconds


@dataclass(eq=False)
class Place:
    """Room for a request, taken before any work is done for it. `answers`: how many it is to get; 0 once it is used."""

    answers: int
    asked: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Job:
    """A request to the scheduler, for one of its engines.

    tell: called with each `Token`, and at the end with None or the error that ended it. borders: numbers of the prompt's
    first ids after which other prompts may go on differently. twins: jobs with the same prompt, which start together.
    bytes: the memory of its prompt and its longest answer.

    The scheduler fills in: `cached`, the number of the prompt's ids that were in the prompt cache; the times when the
    request came and when its prompt had been read, in seconds of `time.monotonic`; the error that ended it;
    its talk and the engine's request while it runs, as they hold its memory; after that, the answer that was `made`.
    """

    engine: Engine
    ids: list[int]
    limits: Limits
    choose: Choose
    tell: Callable[[Token | Exception | None], None]
    borders: tuple[int, ...] = ()
    twins: list[Job] = field(default_factory=list)
    bytes: int = 0
    state: State = "waiting"
    cancelled: bool = False
    cached: int = 0
    asked: float = field(default_factory=time.monotonic)
    read: float = 0.0
    error: Exception | None = None
    talk: Talk | None = None
    request: Request | None = None
    made: Generation | None = None

    @property
    def outcome(self) -> Outcome:
        """Why the job ended, in vLLM's words. One that still runs, or that was cancelled, is given up."""
        if self.error:
            return "error"
        return "abort" if self.made is None else "length" if self.made.finish_reason == "length" else "stop"

    @property
    def all(self) -> list[Job]:
        """The job and its twins."""
        return [self, *self.twins]


class Scheduler:
    """Runs at most `rows` jobs side by side. At most `waiting` more wait for their turn, or for their prompt's ids.

    Each engine has a batch of its own; where several have work, their steps take turns. cache: the bytes that the prompt
    cache may take. memory: the bytes that all running jobs may take; None: any number.
    """

    def __init__(self, rows: int = 16, waiting: int = 64, cache: int = 1 << 30, memory: int | None = None) -> None:
        self.rows, self.most_waiting, self.cache, self.memory = rows, waiting, PromptCache(cache), memory
        self.after: Callable[[], None] = lambda: None  # called after jobs have been told something
        self.failures = 0
        self._failing = False  # whether a step has failed, and no token was decided since
        self._began: float | None = None  # when the step that runs began
        self._changed = threading.Condition()
        self._preparing = 0  # answers of requests that have a place, and no ids yet
        self._waiting: deque[Job] = deque()
        self._admitted: set[Job] = set()  # those that run, or are about to
        self._running: dict[Request, Job] = {}
        self._closing = False
        self._batches: dict[Engine, Batch] = {}
        self._thread = threading.Thread(target=self._work, name="offramp-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """The number of rows that are taken."""
        return len(self._admitted)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a row of the batch."""
        return len(self._waiting)

    @property
    def trouble(self) -> str | None:
        """The error of the engine in words, or None."""
        began = self._began
        if not self._thread.is_alive():
            return "The engine's thread has ended."
        if self._failing:
            return "The engine's last step failed."
        if began is not None and time.monotonic() - began > STUCK:
            return f"The engine's step has taken more than {STUCK:.0f} seconds."
        return None

    def take(self, answers: int = 1) -> Place:
        """Take a place for a request. Raises `Full` if there is none now, and `TooLarge` if there can never be one."""
        most = min(self.rows, MOST_CHOICES)
        if answers > most:
            raise TooLarge(f"{answers} answers at once are more than the {most} of this server.", "Ask for fewer (n).")
        with self._changed:
            waiting = self._preparing + sum(len(job.all) for job in self._waiting)
            if self._closing or waiting + len(self._admitted) + answers > self.most_waiting + self.rows:
                raise Full(waiting, 1 + waiting // self.rows)
            self._preparing += answers
        return Place(answers)

    def give_back(self, place: Place) -> None:
        """Give a place back. Does nothing for a place that a job has used."""
        with self._changed:
            self._preparing -= place.answers
            place.answers = 0

    def submit(self, job: Job, place: Place | None = None) -> None:
        """Hand in a job, in the place that was taken for it. Without one, it takes a place, and raises as `take` does.

        Raises `BadInput` for a prompt that the engine cannot take, and for a job that needs more memory than there is.
        """
        job.engine.backbone.prompts.check(job.ids)
        needed = sum(each.bytes for each in job.all)
        if self.memory is not None and needed > self.memory:
            raise TooLarge(
                f"The prompt with its longest answer needs {needed / 2**20:,.1f} MiB of memory (for all n answers); "
                f"this server has {self.memory / 2**20:,.1f} (--memory).",
                "Ask for a shorter answer (max_tokens) or for fewer (n), or shorten the prompt.",
            )
        with self._changed:
            place = place or self.take(len(job.all))
            self.give_back(place)
            if self._closing:
                raise Full(0, 5)
            for each in job.all:
                each.asked = place.asked
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Cancel a job. A waiting job is gone at once; a running job frees its row before the next step."""
        with self._changed:
            for each in job.all:
                each.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                for each in job.all:
                    self._end(each, None)
            self._changed.notify()
        self.after()

    def close(self) -> None:
        """Take no more jobs, cancel all jobs, and wait a little for the step that runs."""
        with self._changed:
            self._closing = True
            for job in [*self._waiting, *self._admitted]:
                for each in job.all:
                    each.cancelled = True
            self._changed.notify()
        self._thread.join(LAST_STEP)

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
            except BaseException as error:  # a bug
                self._fail(error, [*self._running.values(), *admitted])
            self.after()
            for engine, batch in [*self._batches.items()]:
                try:
                    self._drop_cancelled()
                    self._step(batch)
                except BaseException as error:  # whatever a step raises: NaN, memory, a bug
                    self._fail(error, [job for job in self._running.values() if job.engine is engine])
                self.after()

    def _admit(self) -> list[Job]:
        """The jobs that may start now, in the order in which they came."""
        admitted: list[Job] = []
        while self._waiting and self._fits(self._waiting[0]):
            admitted += self._waiting.popleft().all
            self._admitted.update(admitted)
        return admitted

    def _fits(self, job: Job) -> bool:
        """Whether there are rows and memory for a job and its twins, beside those that have been admitted."""
        together = [*self._admitted, *job.all]
        return len(together) <= self.rows and (self.memory is None or sum(each.bytes for each in together) <= self.memory)

    def _start(self, job: Job) -> None:
        """Put a job into the batch."""
        if job.cancelled:
            self._end(job, None)
            return
        try:
            talk, job.cached = self.cache.talk(job.engine, job.ids, job.choose)
            batch = self._batches.setdefault(job.engine, job.engine.batch())
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
        """Handle an event of a job."""
        if isinstance(event, Reading) and event.tokens in job.borders:
            self._remember(job)
        elif isinstance(event, Prefilled):
            job.read = time.monotonic()
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
        """End jobs with an error, and restart their engines."""
        self.failures += 1
        self._failing = True
        for job in jobs:
            self._batches.pop(job.engine, None)
            self._end(job, error)

    def _end(self, job: Job, error: BaseException | None) -> None:
        if job.state == "done":
            return
        request = job.request
        if error is None and request is not None and request.finish_reason and request.tokens:
            decoding = max(1e-9, time.monotonic() - job.read)
            job.made = job.engine.summarise(request, job.read - job.asked, decoding)
        # An exit, or an interrupt, would end the thread that hears of it.
        job.error = error if error is None or isinstance(error, Exception) else RuntimeError(repr(error))
        job.state = "done"
        self._admitted.discard(job)
        if request is not None:
            self._running.pop(request, None)
        job.talk = job.request = None  # a client that reads slowly keeps the job, and must not keep this memory
        with suppress(Exception):  # who cannot be told an end has no other way to hear of it
            job.tell(job.error)
