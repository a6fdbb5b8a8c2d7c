"""The Ray cluster of a job: join it, call functions on every node, check its folders."""

import logging
import os
import secrets
import socket
import subprocess
import tempfile
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from speechdistill.io import import_path
from speechdistill.io.errors import RunError, UserError

A = TypeVar("A")
T = TypeVar("T")
Use = tuple[float, list[float]]

# A store that refuses one request in twenty, or is away for a minute, must not cost a sample: ten tries, 110 s.
_PATIENCE = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "10"}
_ALONE = "SPEECHDISTILL_LOCAL_RAY"  # in the environment of a local Ray that `connect` started
_ANSWERS_WITHIN_S = 20.0


def connect() -> None:
    """Join the cluster at `RAY_ADDRESS`, which submitted jobs have, or start a local Ray for this process.

    Raises `RunError` if no cluster answers there, or the temporary folder is unusable.
    """
    # Read when ray.data is first imported: its warnings are about its own progress bars; ours are tqdm's.
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")  # logged for every small run
    if ray.is_initialized():
        return
    package = Path(__file__).parents[1]
    if address := os.environ.get("RAY_ADDRESS"):
        _join(address, str(package))
        return
    # Workers of a local Ray inherit this environment. Ray listens on the network, so it requires a token by default.
    # A variable holds the token: later clusters would use a token file in the home folder.
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(package.parent), *import_path.in_environment()]))
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # One process for each run of Ray Train, useless on one node.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ[_ALONE] = "1"
    cpus = max(2, os.cpu_count() or 2)  # one logical CPU is for Ray Data's own tasks, one for the actors
    try:
        # No runtime_env: workers take twice as long to start with one.
        quiet = {"include_dashboard": False, "logging_level": logging.ERROR}
        ray.init(address="local", num_cpus=cpus, job_config=_Job(), **quiet)
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        reason = f"the path of the temporary folder {tempfile.gettempdir()} is too long for Ray's sockets ({error})"
        raise RunError(reason, "set TMPDIR to a shorter folder, such as /tmp") from error


class _Job(JobConfig):  # type: ignore[misc]
    """Job whose workers do not import files of the driver's current folder, which Ray puts first in `sys.path`."""

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def _join(address: str, package: str) -> None:
    fix = "start that cluster, correct RAY_ADDRESS (and RAY_AUTH_TOKEN), or unset it to use this machine alone"
    options = {} if "://" in address else {"job_config": _Job()}  # Ray Client does not add that folder
    try:
        _reach(address)
        ray.init(runtime_env={"py_modules": [package]}, **options)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"RAY_ADDRESS={address}: no Ray cluster can be joined there ({reason})", fix) from error


def _reach(address: str) -> None:
    """Raise `OSError` or `ValueError` if no Ray answers at an address. Ray itself would try for 14 minutes."""
    import grpc
    from ray._private.services import canonicalize_bootstrap_address

    scheme, _, place = address.rpartition("://")
    if scheme not in ("", "ray"):
        raise ValueError(f"{scheme}:// is for `ray job submit`; give HOST:PORT or auto")
    place = place.partition("/")[0] if scheme else canonicalize_bootstrap_address(address)
    if not place:  # "local"
        return
    host, _, port = place.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _ANSWERS_WITHIN_S).close()
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    with grpc.insecure_channel(place) as channel:
        try:
            grpc.channel_ready_future(channel).result(_ANSWERS_WITHIN_S)
        except grpc.FutureTimeoutError:
            raise ConnectionError(f"{place} is open, but does not answer as Ray") from None


def is_alone() -> bool:
    """Whether this process belongs to a local Ray that `connect` started, which ends with its driver."""
    return _ALONE in os.environ


def in_order(function: Callable[[A], T], arguments: Iterable[A]) -> Iterator[T]:
    """Yield `function(argument)` for each argument in order. Ray tasks compute a bounded number of results ahead."""
    task = ray.remote(_called)
    cpus = max(16, int(ray.cluster_resources().get("CPU", 1)))  # a cluster may have none yet
    waiting: deque[Any] = deque()
    for argument in arguments:
        waiting.append(task.remote(partial(function, argument)))
        if len(waiting) >= 2 * cpus:
            yield _got(waiting.popleft())
    while waiting:
        yield _got(waiting.popleft())


def be_patient() -> None:
    """Make S3 clients retry failed requests. Call it before a process's first request: clients keep their settings."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy that keeps a task or actor on this process's node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def cause(error: Exception) -> Exception:
    """Return the error that a task raised: a `UserError` as it is, any other with Ray's traceback."""
    if not isinstance(error, ray.exceptions.RayTaskError):
        return error
    raised: Exception = error.cause if isinstance(error.cause, UserError) else error.as_instanceof_cause()
    return raised


def on_every_node(function: Callable[[], T], timeout_s: float = 60.0) -> dict[str, T | Exception]:
    """Call `function` once on each live node and return the result or the exception by node, "address (id)".

    A node without an answer after `timeout_s` seconds has an exception.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(_called)
    answers = {}
    for node in _live_nodes():
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
        answers[name] = task.options(scheduling_strategy=here).remote(function)
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=timeout_s)
    return {name: _answer(reference) for name, reference in answers.items()}


def check_shared(folder: str) -> None:
    """Raise `RunError` if a local folder is not shared: a file written here must be visible on all nodes."""
    if "://" in folder or len(_live_nodes()) < 2:
        return
    probe = Path(folder) / f".probe-{uuid.uuid4().hex}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()
    try:
        blind = _blind(probe)
    finally:
        probe.unlink()
    if blind:
        raise RunError(
            f"a file in {folder} is not visible on {len(blind)} of the cluster's nodes ({', '.join(blind[:3])})",
            "--out must be storage that all nodes share: a URL such as s3://bucket/labels, or a network folder",
        )


def check_seen(path: str) -> None:
    """Raise `RunError` if a local file is not visible on all nodes."""
    if "://" not in path and len(_live_nodes()) > 1 and (blind := _blind(Path(path))):
        raise RunError(
            f"{path} is not visible on {len(blind)} of the cluster's nodes ({', '.join(blind[:3])})",
            "copy it to storage that all nodes share",
        )


def use(uses: Sequence[Use]) -> dict[str, float]:
    """Return the number of live nodes, and the mean use of CPUs and GPUs, 0 to 1, over the nodes that reported."""
    cpus, gpus = [cpu for cpu, _ in uses], [gpu for _, of_node in uses for gpu in of_node]
    means = {name: sum(values) / len(values) for name, values in (("cpu_use", cpus), ("gpu_use", gpus)) if values}
    return {"nodes": float(len(_live_nodes())), **means}


def node_use() -> Use:
    """Return the use, 0 to 1, of this node's CPUs since the last call in this process, and of each GPU now."""
    import psutil

    return psutil.cpu_percent() / 100, _gpu_use()


def _gpu_use() -> list[float]:
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.split()
        return [float(line) / 100 for line in lines]
    except (OSError, ValueError, subprocess.SubprocessError):  # no GPU, or one that reports nothing
        return []


def _blind(path: Path) -> list[str]:
    """Return the nodes on which a file is not visible. A node that does not answer is left out: that proves nothing."""
    return [name for name, seen in on_every_node(partial(os.path.exists, path)).items() if seen is False]


def _called(function: Callable[[], T]) -> T:
    return function()


def _live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _got(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise cause(error) from None  # the text of other errors has Ray's traceback


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=0)
    except Exception as error:
        return cause(error)
