"""More than one machine, on Ray: workers answer an evaluation's questions and a training's prompts, replicas serve.

A worker is a Ray Data actor. It loads the model by its name, once, and does one share of the work after the other. When a
worker is lost, Ray does its share again elsewhere; what was done before stays. Each share counts once. Everything that a
worker needs besides the model travels to it, and what it makes travels back, so nothing needs a folder that all machines
see.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray import serve
from ray.exceptions import ActorDiedError

from offramp.errors import BadInput, OfframpError, reason_of
from offramp.evaluation.evaluation import Condition, Evaluation, Kept, answered
from offramp.evaluation.tasks import Item, Task
from offramp.model.backbone import Backbone
from offramp.model.loading import load
from offramp.training.teacher import ROWS, TextGroup, made_shards

NAME = "offramp"  # of the application in Ray Serve
SHARE = 2 * ROWS  # texts of a training's share: twice as many as are answered side by side


@dataclass(frozen=True)
class Copy:
    """What a worker must know to load the model that the driver has: its name, weight format, and fingerprint."""

    name: str
    weights: str
    fingerprint: str

    @classmethod
    def of(cls, backbone: Backbone) -> Copy:
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

    copy: Copy
    make: Callable[[Backbone, Any], Any]


class _Worker:
    """An actor that does shares of work; it keeps the models that it has loaded."""

    def __init__(self, kinds: list[Kind]) -> None:
        self._kinds, self._loaded = kinds, dict[Copy, Backbone]()

    def __call__(self, shares: pa.Table) -> pa.Table:
        """The shares with what was made of each, or the `OfframpError` that it ended in."""
        made = [pickle.dumps(self._made(*pickle.loads(share.as_py()))) for share in shares["share"]]
        return pa.table({"number": shares["number"], "made": pa.array(made, pa.large_binary())})

    def _made(self, kind: int, share: Any) -> Any:
        copy, make = self._kinds[kind].copy, self._kinds[kind].make
        try:
            if copy not in self._loaded:
                self._loaded[copy] = copy.load()
            return make(self._loaded[copy], share)
        except OfframpError as error:
            return error


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
        kinds = [Kind(Copy.of(part.backbone), partial(_answers, part.condition, bare, run.batch)) for part in parts]
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
        """As `teacher.made_shards`, by the workers."""
        size = self._size(sum(len(group.ids) for group in groups), SHARE)
        shares: list[list[tuple[int, TextGroup]]] = []
        for index, group in enumerate(groups):
            if not shares or sum(len(each.ids) for _, each in shares[-1]) >= size:
                shares.append([])
            shares[-1].append((index, group))
        kind = Kind(Copy.of(backbone), partial(_shards, layers, shared))
        for _, made in self.make([kind], [(0, share) for share in shares]):
            yield from made

    def _size(self, pieces: int, most: int) -> int:
        """How many pieces a share has: at most `most`, and so that each worker gets as many shares as the others."""
        rounds = max(1, -(-pieces // (self.workers * most)))
        return max(1, -(-pieces // (self.workers * rounds)))

    def make(self, kinds: list[Kind], shares: Sequence[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Let workers do shares of work: each is the index of its kind, and what its function is given.

        Yields the index and what was made, in the order in which it comes. Raises the `OfframpError` of a worker.
        """
        tables = [
            pa.table({"number": [number], "share": pa.array([pickle.dumps(share)], pa.large_binary())})
            for number, share in enumerate(shares)
        ]
        if not tables:
            return
        pool = ray.data.ActorPoolStrategy(size=min(self.workers, len(tables)), max_tasks_in_flight_per_actor=1)
        made = ray.data.from_arrow(tables).map_batches(
            _Worker, fn_constructor_args=(kinds,), batch_size=None, batch_format="pyarrow", compute=pool, **self.takes
        )
        waited_for = set(range(len(shares)))
        try:
            for table in made.iter_batches(batch_size=None, batch_format="pyarrow"):
                for number, content in zip(table["number"].to_pylist(), table["made"], strict=True):
                    if number not in waited_for:
                        continue
                    waited_for.remove(number)
                    outcome = pickle.loads(content.as_py())
                    if isinstance(outcome, OfframpError):
                        raise outcome
                    yield shares[number][0], outcome
        except ActorDiedError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise OfframpError(
                f"A worker could not start: {reason}", "Install the same version of offramp on every machine."
            ) from error

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
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = settings.print_on_execution_start = False
    settings.execution_no_progress_timeout_s = -1  # a share may take long, and so may fetching a model
    try:
        yield _room()
    finally:
        ray.shutdown()


def _room() -> Cluster:
    """The workers that the cluster has room for: one for each GPU, or else as large as the node with the fewest CPUs."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus := int(sum(node.get("GPU", 0) for node in nodes)):
        return Cluster(gpus, {"num_gpus": 1})
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise BadInput("The cluster has no CPUs to work with.", "Add a machine: ray start --address ADDRESS")
    return Cluster(sum(each // min(cpus) for each in cpus), {"num_cpus": min(cpus)})
