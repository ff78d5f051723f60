"""More than one machine: on a cluster of several nodes, results are the single machine's, even when a node dies."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # before ray is imported: then 127.0.0.1 stays this address
ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from helpers import exits_for, modest_exits, run_cli, some_prompts, task  # noqa: E402
from models import saved, tiny  # noqa: E402
from offramp import Engine, Policy, load  # noqa: E402
from offramp.cli.options import DecodingOptions, cluster_at  # noqa: E402
from offramp.cli.serving import ServeOptions, application  # noqa: E402
from offramp.errors import BadInput, OfframpError  # noqa: E402
from offramp.evaluation.evaluation import Condition, Evaluation, answered  # noqa: E402
from offramp.evaluation.results import Result  # noqa: E402
from offramp.extras.cluster import Kind, ModelCopy, Replicas, _room, _Worker, connected  # noqa: E402
from offramp.model.backbone import Backbone  # noqa: E402
from offramp.training.answering import made_shards, write_shards  # noqa: E402
from offramp.training.teacher import group_texts  # noqa: E402
from watched import Missing, Watched, crash, wait  # noqa: E402

NODE = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
TIMES = {"prefill_seconds", "decode_seconds", "tokens_per_second"}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model's folder, with a cache for this module and its workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRAMP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split()]))
        yield saved(tiny("llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load(str(folder), "float32").backbone


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """A head node without processors, and two nodes of one processor."""
    head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": SOON}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            made.add_node(**NODE, num_cpus=1)
        yield made
    finally:
        made.shutdown()


def kill_in_third_share(cluster: Cluster, marks: Path) -> None:
    """Wait until both nodes are in their third share, then kill one, and let the other go on."""
    nodes = list(cluster.worker_nodes)
    until = time.monotonic() + 100  # a busy machine starts workers slowly
    while time.monotonic() < until and any(len([*marks.glob(f"{node.node_id}-*")]) < 3 for node in nodes):
        time.sleep(0.02)
    cluster.remove_node(nodes[0], allow_graceful=False)
    (marks / f"dead_{nodes[0].node_id}").touch()


def without_times(result: Result) -> dict[str, Any]:
    record = result.to_json()
    del record["peak_memory_bytes"]
    for measures in (record["summary"], *(item["measures"] for item in record["items"])):
        for name in TIMES & set(measures):
            del measures[name]
    return record


def test_an_evaluation_that_loses_a_node_is_the_single_machines(
    cluster: Cluster, backbone: Backbone, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    policy, exits = Policy((0.5,) * 3), exits_for("llama")
    alone = Evaluation(backbone, task(12), tmp_path / "alone", batch=1).run(Condition("project", policy, exits))
    run = Evaluation(backbone, task(12), tmp_path / "many", batch=1)
    watched = Watched("project", policy, exits, marks=marks)
    with connected(cluster.address) as found, ThreadPoolExecutor(1) as thread:
        assert found.workers == 2
        killed = thread.submit(kill_in_third_share, cluster, marks)
        found.answer(run, [watched])
        killed.result()
    cluster.add_node(**NODE, num_cpus=1)
    assert not any(part.missing for part in run.answers([watched]))
    assert without_times(run.run(watched)) == without_times(alone)
    for file in run.files:
        ids = [json.loads(line)["id"] for line in file.read_text().splitlines()]
        assert sorted(ids, key=int) == [item.id for item in run.task.items]  # nothing lost, nothing twice
    assert len([*marks.glob("*-*")]) == 12 + 1  # only the share that was lost was done again


def test_a_job_whose_machines_are_all_lost_says_so(cluster: Cluster, backbone: Backbone, tmp_path: Path) -> None:
    nodes = list(cluster.worker_nodes)

    def kill() -> None:
        while len([*tmp_path.iterdir()]) < len(nodes):
            time.sleep(0.02)
        for node in nodes:
            cluster.remove_node(node, allow_graceful=False)

    with connected(cluster.address) as found, ThreadPoolExecutor(1) as thread:
        thread.submit(kill)
        with pytest.raises(OfframpError, match="no machine left") as caught:
            [*found.make([Kind(ModelCopy.of(backbone), wait)], [(0, tmp_path)] * 3)]
    assert "ray start" in caught.value.hint
    for _ in nodes:
        cluster.add_node(**NODE, num_cpus=1)


@pytest.mark.parametrize(
    ("make", "words"), [(crash, "Worker after worker was lost"), (Missing(), "could not start: .*offramp.missing")]
)
def test_a_job_that_ends_each_worker_says_so(cluster: Cluster, backbone: Backbone, make: Any, words: str) -> None:
    with connected(cluster.address) as found, pytest.raises(OfframpError, match=words) as caught:
        [*found.make([Kind(ModelCopy.of(backbone), make)], [(0, "share")])]
    assert caught.value.hint


def test_a_trainings_shards_are_the_single_machines(cluster: Cluster, backbone: Backbone, tmp_path: Path) -> None:
    prompts, texts = some_prompts(20, seed=1), some_prompts(3, seed=2)
    groups = group_texts(prompts, texts, 9, 4, [0.0, 0.7] * 10)
    write_shards(backbone, groups, (2, 4), tmp_path / "alone")
    written = write_shards(backbone, groups[:1], (2, 4), tmp_path / "many")  # as an interrupted run leaves it
    seen = []
    with connected(cluster.address) as found:
        shards = write_shards(backbone, groups, (2, 4), tmp_path / "many", seen.append, make=found.made_shards)
    assert len(seen) == len(groups)
    assert shards[0] == written[0]
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "many").iterdir()) == [shard.name for shard in shards]
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_a_served_application_answers_as_the_engine(
    cluster: Cluster, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    exits = modest_exits("llama")
    exits.policy = Policy((0.3,) * 3)
    exits.save(tmp_path)
    options = ServeOptions(api_key="secret")
    decoding = DecodingOptions(exits=str(tmp_path), mode="exact", dtype="float32")
    wanted = Engine(backbone).generate(backbone.prompts.encode("Once upon", raw=True), max_tokens=12).text
    port = free_port()
    with (
        connected(cluster.address) as found,
        found.serving(partial(application, str(folder), decoding, options), Replicas(1, 2, 4, 16), "127.0.0.1", port),
    ):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
        (model,) = client.models.list()
        asked = {"model": model.id, "prompt": "Once upon", "max_tokens": 12, "temperature": 0}
        whole = client.completions.create(**asked)
        assert whole.choices[0].text == wanted
        assert whole.choices[0].model_extra["offramp"]["mode"] == "exact"
        parts = [*client.completions.create(**asked, stream=True)]
        assert "".join(part.choices[0].text for part in parts) == wanted
        assert len(parts) > 3
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.completions.create(**{**asked, "max_tokens": 0})


def test_a_worker_with_other_weights_says_so(backbone: Backbone) -> None:
    ours = ModelCopy.of(backbone)
    worker = _Worker([Kind(ModelCopy(ours.name, ours.weights, "other"), lambda backbone, share: share)])
    error = worker.do(0, "share")
    assert isinstance(error, BadInput)
    assert "are not those of the machine that began the work" in str(error)
    assert "same files" in error.hint


@pytest.mark.parametrize(
    ("nodes", "workers", "takes"),
    [
        ([{}, {"CPU": 4.0}, {"CPU": 9.0}], 3, {"num_cpus": 4}),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}], 2, {"num_gpus": 1}),
    ],
)
def test_workers_are_as_large_as_the_smallest_node(monkeypatch, nodes: Any, workers: int, takes: Any) -> None:
    found = [{"Alive": True, "Resources": each} for each in nodes] + [{"Alive": False, "Resources": {"CPU": 1.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    assert (_room().workers, _room().takes) == (workers, takes)


def test_a_cluster_without_processors_and_no_cluster_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {}}])
    with pytest.raises(BadInput, match="no CPUs"):
        _room()

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Nobody answers")

    monkeypatch.setattr(ray, "init", fail)
    with (
        pytest.raises(BadInput, match="no Ray cluster to work with at 'auto': Nobody answers") as caught,
        connected("auto"),
    ):
        pass
    assert "ray start --head" in caught.value.hint


class Stand:
    """Stands for a cluster, and notes what the command line asks of it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    @contextmanager
    def at(self, address: str | None) -> Iterator[Stand]:
        self.asked.append(address)
        yield self

    def answer(self, run: Evaluation, conditions: list[Condition]) -> None:
        parts = list(dict.fromkeys(run.answers(conditions)))
        self.asked.append([part.condition.name for part in parts])
        for part in parts:
            part.add(answered(part.condition, run.task, run.batch, run.backbone, part.missing))

    def made_shards(self, *arguments: Any) -> Iterator[tuple[int, bytes]]:
        self.asked.append("shards")
        return made_shards(*arguments)

    @contextmanager
    def serving(self, make: Any, *how: Any) -> Iterator[None]:
        self.asked.append(how)
        yield


def test_the_commands_let_the_cluster_work(folder: Path, tmp_path: Path, monkeypatch) -> None:
    stand = Stand()
    for module in ("evaluating", "training", "serving"):
        monkeypatch.setattr(f"offramp.cli.{module}.cluster_at", stand.at)
    monkeypatch.setattr("offramp.cli.serving._wait_for_the_end", lambda: None)
    lines = [{"question_id": n, "question": f"Who {n}?", "answer": {"value": "Me", "aliases": []}} for n in range(9)]
    (tmp_path / "trivia.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "prompts.txt").write_text("".join(f"Say {n}\n" for n in range(9)))
    quick = ["--layers", "1,3", "--epochs", "1", "--gate-epochs", "1", "--readout-width", "32"]
    train = ["train", str(folder), "-o", "exits", "--own-prompts", "prompts.txt", *quick, "--gate-width", "16"]
    asked = ["--task", "triviaqa", "--data", "trivia.jsonl"]
    evaluate = ["eval", str(folder), *asked, "--exits", "exits", "--threshold", "0.5"]
    serve = ["serve", str(folder), "--replicas", "1,2", "--port", "8123"]
    for command in (train, evaluate, serve):
        ran = run_cli(*command, "--ray", "auto", folder=tmp_path)
        assert ran.code == 0, ran.stderr
    assert "http://127.0.0.1:8123" in ran.stderr
    assert [each for each in stand.asked if each != "auto"] == [
        "shards", ["full depth", "project, mamba, 0.5 0.5"], (Replicas(1, 2, 16, 160), "127.0.0.1", 8123),
    ]  # fmt: skip
    refused = run_cli("serve", str(folder), "--replicas", "2,1", "--ray", "auto", folder=tmp_path)
    assert refused.code == 1
    assert "the least and the most" in refused.stderr


def test_without_ray_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "offramp.extras.cluster")
    with pytest.raises(BadInput, match="needs the package ray") as caught, cluster_at("auto"):
        pass
    assert "'.[ray]'" in caught.value.hint
