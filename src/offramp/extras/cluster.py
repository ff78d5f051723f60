"""More than one machine, on Ray: workers answer an evaluation's questions and a training's prompts, replicas serve.

A worker is a Ray actor. It loads the model by its name, once, and does one share of the work after the other. When a
worker is lost, another one does its share again; what was done before stays. Each share counts once. Everything that a
worker needs besides the model travels to it, and what it makes travels back, so nothing needs a folder that all machines
see.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError

from offramp.errors import BadInput, OfframpError, reason_of
from offramp.evaluation.evaluation import Condition, Evaluation, Kept, answered
from offramp.evaluation.task import Item, Task
from offramp.model.backbone import Backbone
from offramp.model.loading import load
from offramp.training.answering import SIDE_BY_SIDE, made_shards
from offramp.training.teacher import TextGroup

NAME = "offramp"  # of the application in Ray Serve
SHARE = 2 * SIDE_BY_SIDE  # texts of a training's share: twice as many as are answered side by side
LOOK = 5.0  # seconds without news after which the driver looks whether machines are left
RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU"}  # what an actor asks for, and what a node calls it
TRIES = 3  # how often a share may lose its worker


@dataclass(frozen=True)
class ModelCopy:
    """What a worker must know to load the model that the driver has: its name, weight format, and fingerprint."""

    name: str
    weights: str
    fingerprint: str

    @classmethod
    def of(cls, backbone: Backbone) -> ModelCopy:
        """That of the driver's model."""
        return cls(backbone.name, backbone.weight_format, backbone.source.fingerprint)

    def load(self) -> Backbone:
        """The model on this machine. Raises `BadInput` where its weights are others, and as `loading.load` does."""
        backbone = load(self.name, self.weights)
        if backbone.source.fingerprint != self.fingerprint:
            raise BadInput(
                f"The weights of {self.name} on {os.uname().nodename} are not those of the machine that began the work.",
                "Put the same files on every machine, or name one revision of a hub repository: org/name@revision.",
            )
        return backbone


@dataclass(frozen=True)
class Kind:
    """A kind of work: a model, and a function from that model and a share to what is made of the share."""

    copy: ModelCopy
    make: Callable[[Backbone, Any], Any]


class _Worker:
    """An actor that does shares of work; it keeps the models that it has loaded."""

    def __init__(self, kinds: list[Kind]) -> None:
        self._kinds, self._loaded = kinds, dict[ModelCopy, Backbone]()

    def start(self) -> None:
        """Do nothing: the call ends when the worker has started."""

    def do(self, kind: int, share: Any) -> Any:
        """What is made of a share, or the `OfframpError` that it ended in."""
        copy, make = self._kinds[kind].copy, self._kinds[kind].make
        try:
            if copy not in self._loaded:
                self._loaded[copy] = copy.load()
            return make(self._loaded[copy], share)
        except OfframpError as error:
            return error


class _Crew:
    """The workers of a job, and its shares. A worker that is lost is replaced as soon as a machine has room for another."""

    def __init__(self, cluster: Cluster, kinds: list[Kind], shares: Sequence[tuple[int, Any]]) -> None:
        self._takes, self._size, self._shares = cluster.takes, min(cluster.workers, len(shares)), shares
        self._kinds = ray.put(kinds)
        self._waiting = deque(range(len(shares)))  # numbers of shares that no worker does
        self._calls: dict[Any, tuple[Any, int | None]] = {}  # what will come, from whom, of which share; None for a start
        self._lost = Counter[int | None]()  # how often a share, or a start, has lost its worker

    def made(self) -> Iterator[tuple[int, Any]]:
        """The kind of each share and what was made of it, in the order in which it comes. Raises as `Cluster.make` does."""
        for _ in range(self._size):
            self._hire()
        left = len(self._shares)
        while left:
            ended, _ = ray.wait([*self._calls], timeout=LOOK)
            if not ended:
                _check_room(self._takes)
                continue
            worker, number = self._calls.pop(ended[0])
            try:
                outcome = ray.get(ended[0])
            except RayError as error:
                self._replace(worker, number, error)
                continue
            if self._waiting:
                following = self._waiting.popleft()
                self._calls[worker.do.remote(*self._shares[following])] = worker, following
            else:
                ray.kill(worker)  # a worker that takes the place of a lost one may need its room
            if number is None:
                self._lost[None] = 0
                continue
            if isinstance(outcome, OfframpError):
                raise outcome
            left -= 1
            yield self._shares[number][0], outcome

    def _hire(self) -> None:
        worker = ray.remote(**self._takes)(_Worker).remote(self._kinds)
        self._calls[worker.start.remote()] = worker, None

    def _replace(self, worker: Any, number: int | None, error: RayError) -> None:
        """Hire another worker, and let the next free one do the share. Raises what is more than the loss of a worker."""
        if isinstance(error, RayTaskError):  # the work itself failed
            raise error
        reason = str(error).strip().splitlines()[-1].strip()
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise OfframpError(
                f"A worker could not start: {reason}", "Install the same version of offramp on every machine."
            ) from error
        self._lost[number] += 1
        if self._lost[number] == TRIES * (self._size if number is None else 1):
            raise OfframpError(
                f"Worker after worker was lost: {reason}", "Perhaps their memory is too small: see Ray's logs."
            ) from error
        ray.kill(worker)  # it may only be cut off
        if number is not None:
            self._waiting.appendleft(number)
        self._hire()


@dataclass(frozen=True)
class Replicas:
    """How an application is served. `least` and `most` replicas; one more is started when more than `requests` run on each.

    A replica takes at most `taken` requests.
    """

    least: int
    most: int
    requests: int
    taken: int


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster. `workers`: how many it has room for; `takes`: what each of them takes, as Ray names it."""

    workers: int
    takes: dict[str, int]

    def answer(self, run: Evaluation, conditions: Sequence[Condition]) -> None:
        """Answer a run's questions at full depth and under the conditions, where no answer is kept yet."""
        parts = list(dict.fromkeys(run.answers(conditions)))
        bare = replace(run.task, items=[])  # a share names its own
        model = ModelCopy.of(run.backbone)
        kinds = [Kind(model, partial(_answers, part.condition, bare, run.batch)) for part in parts]
        shares = []
        for index, part in enumerate(parts):
            items = part.missing
            size = self._size(len(items), run.batch)
            shares += [(index, items[start : start + size]) for start in range(0, len(items), size)]
        for index, made in self.make(kinds, shares):
            parts[index].add(made, run.progress)

    def made_shards(
        self, backbone: Backbone, groups: list[TextGroup], layers: tuple[int, ...], shared: int
    ) -> Iterator[tuple[int, bytes]]:
        """As `answering.made_shards`, by the workers."""
        size = self._size(sum(len(group.ids) for group in groups), SHARE)
        shares: list[list[tuple[int, TextGroup]]] = []
        for index, group in enumerate(groups):
            if not shares or sum(len(each.ids) for _, each in shares[-1]) >= size:
                shares.append([])
            shares[-1].append((index, group))
        kind = Kind(ModelCopy.of(backbone), partial(_shards, layers, shared))
        for _, made in self.make([kind], [(0, share) for share in shares]):
            yield from made

    def _size(self, pieces: int, most: int) -> int:
        """How many pieces a share has: at most `most`, and so that each worker gets as many shares as the others."""
        rounds = max(1, -(-pieces // (self.workers * most)))
        return max(1, -(-pieces // (self.workers * rounds)))

    def make(self, kinds: list[Kind], shares: Sequence[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Let workers do shares of work: each is the index of its kind, and what its function is given.

        Yields the index and what was made, in the order in which it comes. Raises the `OfframpError` of a worker, and one
        where workers cannot start, are lost again and again, or have no machine left.
        """
        if shares:
            yield from _Crew(self, kinds, shares).made()

    @contextmanager
    def serving(self, make: Callable[[], Any], replicas: Replicas, host: str, port: int) -> Iterator[None]:
        """Serve an ASGI application at the cluster's head node while the context is open; `make` makes it in each replica.

        Raises `OfframpError` where the application cannot be made.
        """

        def application() -> Any:  # Ray takes a function and no other callable, and sends this one as a whole
            return make()

        scaled = {
            "min_replicas": replicas.least, "max_replicas": replicas.most, "target_ongoing_requests": replicas.requests,
        }  # fmt: skip
        deployment = serve.deployment(serve.ingress(application)()).options(
            name=NAME,
            autoscaling_config=scaled,
            max_ongoing_requests=replicas.taken,
            ray_actor_options=self.takes,
        )
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        try:
            try:
                serve.run(deployment.bind(), name=NAME, route_prefix="/")
            except RuntimeError as error:
                said = serve.status().applications[NAME].deployments[NAME].message.strip()
                reason = said.splitlines()[-1] if said else reason_of(error)
                raise OfframpError(
                    f"No replica could start: {reason}",
                    "Each machine needs offramp and the model, as `offramp serve` does.",
                ) from error
            yield
        finally:
            serve.delete(NAME)


def _answers(condition: Condition, task: Task, batch: int, backbone: Backbone, items: list[Item]) -> list[tuple[str, Kept]]:
    return list(answered(condition, task, batch, backbone, items))


def _shards(
    layers: tuple[int, ...], shared: int, backbone: Backbone, groups: list[tuple[int, TextGroup]]
) -> list[tuple[int, bytes]]:
    made = made_shards(backbone, [group for _, group in groups], layers, shared)
    return [(groups[place][0], shard) for place, shard in made]


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """The cluster at an address, while the context is open.

    `auto` is the cluster that this machine belongs to; `local` is a new one that has this machine alone. Raises `BadInput`
    where there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that begins here reports nothing to Ray's authors
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the rest is in Ray's own folder of logs
    alone: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **alone)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and its own
        raise BadInput(
            f"There is no Ray cluster to work with at '{address}': {reason_of(error)}",
            "Start one with 'ray start --head', and name its address; or give --ray local.",
        ) from error
    try:
        yield _room()
    finally:
        ray.shutdown()


def _nodes() -> list[dict[str, Any]]:
    """What each node of the cluster has that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room() -> Cluster:
    """The workers that the cluster has room for: one for each GPU, or else as large as the node with the fewest CPUs."""
    nodes = _nodes()
    if gpus := int(sum(node.get("GPU", 0) for node in nodes)):
        return Cluster(gpus, {"num_gpus": 1})
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise BadInput("The cluster has no CPUs to work with.", "Add a machine: ray start --address ADDRESS")
    return Cluster(sum(each // min(cpus) for each in cpus), {"num_cpus": min(cpus)})


def _check_room(takes: dict[str, int]) -> None:
    """Raises `OfframpError` where no node is left that has what a worker takes."""
    ((name, least),) = takes.items()
    if not any(node.get(RESOURCES[name], 0) >= least for node in _nodes()):
        raise OfframpError(
            "The cluster has no machine left to do the work.",
            "Add one: ray start --address ADDRESS. Then the same command goes on where it stopped.",
        )
