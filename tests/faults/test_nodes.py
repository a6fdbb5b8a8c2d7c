"""A cluster of several nodes that share a disk, or do not."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from label_runs import rows_of
from manifests import corpus
from speechdistill.commands import ingest
from speechdistill.commands.ingest import Ingest
from speechdistill.engine import shards

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class TwoNodes:
    """A head and a worker with working folders of their own, and a folder that both see."""

    cluster: Cluster
    shared: Path

    def run(self, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs" / "pseudolabel.py"), *options]
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Iterator[TwoNodes]:
    size = {"num_cpus": 1, "object_store_memory": 100 << 20}
    here = Path.cwd()
    try:
        os.chdir(tmp_path_factory.mktemp("head"))
        cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
        os.chdir(tmp_path_factory.mktemp("worker"))
        cluster.add_node(**size)
    finally:
        os.chdir(here)
    cluster.wait_for_nodes()
    yield TwoNodes(cluster, tmp_path_factory.mktemp("shared"))
    cluster.shutdown()


@pytest.fixture(scope="module")
def clips(two_nodes: TwoNodes) -> str:
    root = corpus(two_nodes.shared / "corpus")
    summary = ingest.run(Ingest(out=str(two_nodes.shared / "manifest"), speech=(str(root / "speech"),)))
    return str(summary.manifest)


@pytest.fixture
def blind_node(two_nodes: TwoNodes) -> Iterator[Path]:
    """A third node, to which one folder is empty: it has a file system of its own there."""
    folder = Path(tempfile.mkdtemp(prefix="own-"))
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", str(folder)]).returncode:
        shutil.rmtree(folder)
        pytest.skip("this machine does not let a test mount a file system")
    start = f"mount -t tmpfs none {folder} && exec {sys.executable} -m ray.scripts.scripts start --block"
    start += f" --address={two_nodes.cluster.address} --num-cpus=1 --object-store-memory=100000000"
    node = subprocess.Popen([*unshare, "sh", "-c", start], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(two_nodes, 3)
        yield folder
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(timeout=60)
        wait_for(two_nodes, 2)
        shutil.rmtree(folder)


def wait_for(two_nodes: TwoNodes, count: int) -> None:
    """Until the cluster has so many live nodes, as a driver sees it."""
    code = (
        "import ray, time, sys\n"
        "ray.init('auto', logging_level='ERROR')\n"
        f"end = time.monotonic() + 90\n"
        f"while sum(n['Alive'] for n in ray.nodes()) != {count} and time.monotonic() < end: time.sleep(0.2)\n"
        f"sys.exit(sum(n['Alive'] for n in ray.nodes()) != {count})\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": two_nodes.cluster.address}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.slow  # a submitted job and a killed node are in test_submission.py and test_kills.py
def test_relative_paths_are_the_drivers_on_every_node(two_nodes: TwoNodes, clips: str) -> None:
    options = ["--clips", os.path.relpath(clips, two_nodes.shared), "--out", "run", "--num-samples", "6"]
    run = two_nodes.run(*options, "--rows-per-part", "2", cwd=two_nodes.shared)
    assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(rows_of(two_nodes.shared / "run")) == list(range(6))


@pytest.mark.slow  # a third node takes long to come
def test_an_output_that_a_node_does_not_see_is_refused(two_nodes: TwoNodes, clips: str, blind_node: Path) -> None:
    run = two_nodes.run("--clips", clips, "--out", str(blind_node / "run"), "--num-samples", "4", cwd=ROOT)
    assert run.returncode == 1
    assert "is not visible on 1 of the cluster's nodes" in run.stderr and "s3://bucket/labels" in run.stderr, run.stderr
    assert shards.listed(str(blind_node / "run")) == {}
    assert not list(blind_node.rglob(".probe-*"))
