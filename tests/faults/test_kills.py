"""Exactly once while actors, their children, nodes and drivers are killed, on a cluster of three real Ray nodes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

import milli
from label_runs import assert_exactly_once, contents, label_run
from speechdistill.engine import shards

NUM_PARTS = 40
NUM_IDS = 8 * NUM_PARTS
KINDS = ("degrade child", "degrade actor", "teach actor", "node", "driver")


class Nodes:
    """A head and two worker nodes of one CPU each; a killed one is replaced."""

    def __init__(self) -> None:
        size = {"num_cpus": 1, "object_store_memory": 100 << 20}
        self._size = size
        self.cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
        self.workers = [self.cluster.add_node(**size) for _ in range(2)]
        self.cluster.wait_for_nodes()

    def kill_one(self, choice: random.Random) -> None:
        node = choice.choice(self.workers)
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.workers.append(self.cluster.add_node(**self._size))

    def workers_of(self, kind: str) -> list[psutil.Process]:
        """Processes of this cluster's nodes: an actor that has a child degrades, one that has none teaches."""
        raylets = [psutil.Process(info.process.pid) for node in self._nodes() for info in node.all_processes["raylet"]]
        actors = [p for raylet in raylets for p in raylet.children() if "MapWorker" in _title(p)]
        with_child = [(actor, [c for c in _children(actor) if "isolate" in _title(c)]) for actor in actors]
        if kind == "degrade child":
            return [child for _, children in with_child for child in children]
        return [actor for actor, children in with_child if bool(children) == (kind == "degrade actor")]

    def _nodes(self) -> list:
        return [self.cluster.head_node, *self.workers]


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return process.children()
    return []


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The content hashes of the same run undisturbed."""
    out = tmp_path_factory.mktemp("quiet")
    label_run(out, NUM_IDS, rows_per_part=8)
    return contents(out)


def drive(out: Path, address: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, milli.__file__, str(out), str(NUM_IDS)]
    with (out.parent / "driver.log").open("ab") as log:
        environment = {**os.environ, "RAY_ADDRESS": address}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def wait_for_parts(out: Path, wanted: int, driver: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 180
    while len(shards.listed(str(out))) < wanted:
        assert time.monotonic() < end, f"{wanted} parts did not come"
        with suppress(subprocess.TimeoutExpired):
            driver.wait(timeout=0.02)
            assert driver.returncode == 0, (out.parent / "driver.log").read_text()[-3000:]
            return


def killed_run(nodes: Nodes, out: Path, kinds: list[str], choice: random.Random) -> list[str]:
    """Run to the end, with a kill of each kind at a random moment; returns what was really killed."""
    # Degrading runs ahead of the commits, and is over well before the last of them.
    early, late = round(0.4 * NUM_PARTS), round(0.85 * NUM_PARTS)
    moments = sorted((choice.randrange(1, early if kind.startswith("degrade") else late), kind) for kind in kinds)
    killed = []
    driver = drive(out, nodes.cluster.address)
    for moment, kind in moments:
        wait_for_parts(out, moment, driver)
        if driver.poll() is not None:
            break
        if kind == "driver":
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            driver = drive(out, nodes.cluster.address)
        elif kind == "node":
            nodes.kill_one(choice)
        else:
            victims = nodes.workers_of(kind)
            if not victims:
                continue
            with suppress(psutil.NoSuchProcess):
                choice.choice(victims).send_signal(signal.SIGKILL)
        print(f"killed: {kind} after {moment} parts")
        killed.append(kind)
    assert driver.wait(timeout=400) == 0, (out.parent / "driver.log").read_text()[-3000:]
    return killed


def assert_kills_change_nothing(nodes: Nodes, quiet: list[str], folder: Path, kinds: list[str], seed: int) -> None:
    """One run with all these kills; those that came too late, when nothing was left to kill, in another run."""
    choice = random.Random(seed)
    for attempt in range(4):
        out = folder / f"run{attempt}"
        killed = killed_run(nodes, out, kinds, choice)
        print(f"seed {seed}: killed {killed}")
        assert_exactly_once(out, NUM_IDS)
        assert contents(out) == quiet
        kinds = [kind for kind in kinds if kind not in killed]
        if not kinds:
            return
    pytest.fail(f"seed {seed}: never killed: {kinds}")


@pytest.mark.slow  # test_flow.py kills all but nodes, and test_training.py a node
@pytest.mark.parametrize("kind", KINDS)
def test_one_kill_of_each_kind_loses_and_doubles_nothing(
    kind: str, nodes: Nodes, quiet: list[str], tmp_path: Path
) -> None:
    assert_kills_change_nothing(nodes, quiet, tmp_path, [kind], random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.parametrize("run", range(30))
def test_chaos(run: int, nodes: Nodes, quiet: list[str], tmp_path: Path) -> None:
    seed = int(os.environ["CHAOS_SEED"]) + run if "CHAOS_SEED" in os.environ else random.randrange(1 << 30)
    kinds = random.Random(seed).choices(KINDS, k=1 + seed % 3)
    assert_kills_change_nothing(nodes, quiet, tmp_path, kinds, seed)
