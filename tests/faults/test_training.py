"""Training ends with the same student through kills of workers and drivers, and on nodes that come and go."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

import small_training
from faults.s3 import BUCKET, Proxy, Store, at_random
from label_runs import label_run
from speechdistill.models.student import load_student
from speechdistill.training.loop import Loop

HANGS_S = 400  # only bounds a hang
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return label_run(tmp_path_factory.mktemp("labels"), 24 * 20)


@pytest.fixture(scope="module")
def quiet(labels: str) -> dict[str, object]:
    """The end of the undisturbed run, made here in this process."""
    job = small_training.job(labels, "nowhere", most=1, marks="", step=small_training.STEPS + 1)
    loop = Loop(job.make(), job.training)
    for _ in loop.run(small_training.STEPS):
        pass
    return {"steps": small_training.STEPS, "best": loop.validate()["mse"]}


class Run:
    """A training run in a process of its own; with RAY_ADDRESS in `environment` it does not start a Ray."""

    def __init__(
        self, labels: str, folder: Path, most: int, step: int, out: str | None = None, **environment: str
    ) -> None:
        self._log = folder / "log"
        self._marks = folder / "marks"
        self._marks.mkdir(exist_ok=True)
        self._command = [
            sys.executable,
            small_training.__file__,
            labels,
            out or str(folder / "run"),
            str(most),
            str(self._marks),
            str(step),
        ]
        self._environment = {**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5", **environment}
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def waits(self) -> None:
        """Let the run wait at its step."""
        (self._marks / "waits").touch()

    def reached(self) -> None:
        end = time.monotonic() + HANGS_S
        while not (self._marks / "reached").exists():
            assert time.monotonic() < end and self.process.poll() is None, self._log.read_text()[-3000:]
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)

    def go(self) -> None:
        (self._marks / "go").touch()

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict[str, object]:
        out, _ = self.process.communicate(timeout=HANGS_S)
        assert self.process.returncode == 0, self._log.read_text()[-3000:]
        return dict(json.loads(out.splitlines()[-1]))


def assert_same(result: dict[str, object], quiet: dict[str, object]) -> None:
    assert result["steps"] == quiet["steps"]
    assert result["best"]["mse"] == pytest.approx(quiet["best"], abs=1e-6)  # two workers add in another order


def step() -> int:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return random.Random(seed).randrange(2, small_training.STEPS)


@pytest.mark.slow  # one of two workers is killed in test_ray_train.py
def test_a_killed_worker_costs_only_time(labels: str, quiet: dict[str, object], tmp_path: Path) -> None:
    run = Run(name=labels, size=tmp_path, most=1, step=step())
    result = run.result()
    assert (tmp_path / "marks" / "reached").exists()
    assert_same(result, quiet)


@pytest.mark.slow
def test_labels_and_run_may_be_on_s3_where_one_request_in_twenty_fails(
    labels: str, quiet: dict[str, object], tmp_path: Path
) -> None:
    with Store() as store, Proxy(store.url) as proxy:
        store.fs.put(labels, f"{BUCKET}/labels", recursive=True)
        proxy.fault = at_random(random.randrange(1 << 30))
        out = f"s3://{BUCKET}/run"
        run = Run(name=f"s3://{BUCKET}/labels", size=tmp_path, most=1, step=step(), out=out, **proxy.environment)
        assert_same(run.result(), quiet)
        assert (tmp_path / "marks" / "reached").exists()
        store.fs.get(f"{BUCKET}/run/best", str(tmp_path / "best"), recursive=True)
    load_student(str(tmp_path / "best"))


@pytest.mark.slow
def test_a_killed_driver_goes_on_from_its_last_checkpoint(
    labels: str, quiet: dict[str, object], tmp_path: Path
) -> None:
    run = Run(name=labels, size=tmp_path, most=1, step=30)
    run.waits()
    run.reached()
    run.kill()
    run.go()
    run.start()
    assert_same(run.result(), quiet)


def on_nodes(
    count: int, labels: str, folder: Path, change: Callable[[Cluster, list[object]], None]
) -> dict[str, object]:
    """A run of one or two workers on so many nodes, of which `change` makes others while it waits."""
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        others = [cluster.add_node(**NODE) for _ in range(count - 1)]
        cluster.wait_for_nodes()
        run = Run(name=labels, size=folder, most=2, step=10, RAY_ADDRESS=cluster.address)
        run.waits()
        run.reached()
        change(cluster, others)  # ends the workers that wait; those that follow do not
        return run.result()
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_lost_node_costs_only_time(labels: str, quiet: dict[str, object], tmp_path: Path) -> None:
    result = on_nodes(2, labels, tmp_path, lambda cluster, others: cluster.remove_node(others[0], allow_graceful=False))
    assert_same(result, quiet)
    assert result["workers"] == 1


@pytest.mark.slow
def test_a_node_that_joins_is_used(labels: str, quiet: dict[str, object], tmp_path: Path) -> None:
    def add(cluster: Cluster, _: list[object]) -> None:
        cluster.add_node(**NODE)
        cluster.wait_for_nodes()

    result = on_nodes(1, labels, tmp_path, add)
    assert_same(result, quiet)
    assert result["workers"] == 2
