"""Trials of everything that the commands need, here and on the nodes of a cluster, with reason and fix of failures.

Trials run in a child process: one that crashes (a library built for another CPU) fails alone.
"""

import json
import os
import platform
import re
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Annotated, Literal, NamedTuple

import fsspec
import tyro
from tqdm import tqdm

from speechdistill.commands import doctor_trials
from speechdistill.commands.doctor_audio import Missing
from speechdistill.commands.doctor_trials import Places
from speechdistill.commands.guarded import guarded
from speechdistill.data import components
from speechdistill.data.degradation_recipes import COMPONENTS
from speechdistill.engine.isolate import ChildDied, Isolated, Row
from speechdistill.io import audio, storage
from speechdistill.io.errors import AudioError, RunError, UserError
from speechdistill.io.version import __version__

_ON_NODES = ("teacher", "degradation", "recipe", "format", "storage", "clips")
_TIMEOUT_S = 120.0
_NODES_TIMEOUT_S = 600.0
_SAME = "`pip freeze > here.txt` on this machine, `pip install -r here.txt` there, with the same Python"
_SECRET = re.compile("SECRET|PASSWORD|PASSWD|TOKEN|KEY|CREDENTIAL")
_LONGEST_LINE = 1000
_REINSTALL = "install the dependencies of pyproject.toml again; if that does not help, report it with this line"
_FIXES = {
    "machine": "free some disk space, or set TMPDIR to another disk",
    "gpu": "`nvidia-smi` must list the GPU, and torch must be a CUDA build for its driver",
    "storage": "check the address, the credentials and the rights to write, read, list and delete there",
    "clips": "check that the files are at the manifest's addresses, and that this machine may read them",
    "tracking": "start that MLflow server, or unset MLFLOW_TRACKING_URI to track in each run's folder",
    "cluster": "`ray status` must answer here, with this RAY_ADDRESS and the cluster's RAY_AUTH_TOKEN, Ray and Python",
    "node": "install the dependencies of pyproject.toml on that node, and read its Ray logs",
}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Try everything that speechdistill needs, on this machine and on the nodes of the cluster at RAY_ADDRESS.

    Exit code 1 if something that --require names does not work.
    """

    require: tuple[str, ...] = ()
    """A name of the table, or its part after the colon, that must work; may be repeated."""
    out: str | None = None
    """Folder or URL for results: a small file is written there, read, listed and deleted."""
    clips: str | None = None
    """A manifest (clips.parquet): some of its recordings are read."""
    assets: dict[str, str] = field(default_factory=dict)
    """Weights and texts of the recipes' components, by name, as in the labelling job."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Result:
    """One line of the report, without the secrets of the environment; `fix` is empty if nothing is wrong."""

    name: str
    state: Literal["ok", "missing", "failed"]
    detail: str
    fix: str = ""

    def __post_init__(self) -> None:
        for name in ("detail", "fix"):
            object.__setattr__(self, name, _line(getattr(self, name)))


class Node(NamedTuple):
    """A node's answer: its versions, and the results of its trials."""

    versions: dict[str, str]
    results: list[Result]


@guarded("nothing was changed")
def command(config: Annotated[tyro.conf.UseAppendAction[Doctor], tyro.conf.arg(name="")]) -> int:
    results = run(config)
    print(as_json(results) if config.json else report(config, results))
    return 1 if unmet(config, results) else 0


def run(config: Doctor) -> list[Result]:
    """Try everything, with a progress bar on stderr; raises `UserError` for an unknown name in `require` or
    `assets`."""
    required(config.require)
    out, clips = (place and storage.absolute(place) for place in (config.out, config.clips))
    known = sorted({need.name for name in COMPONENTS for need in components.component(name).needs})
    if unknown := sorted(set(config.assets) - set(known)):
        raise UserError(f"--assets {' '.join(unknown)} is unknown", f"choose from {', '.join(known)}")
    places = Places(out, clips, tuple((name, storage.absolute(place)) for name, place in config.assets.items()))
    local = Isolated(partial(_Trials, places), timeout_s=_TIMEOUT_S)
    results = []
    with tqdm(total=len(names()), unit="trial", dynamic_ncols=True, leave=False) as bar:
        for name in doctor_trials.names():
            bar.set_description(name)
            results.append(_tried(local, name))
            bar.update()
        bar.set_description("cluster")
        works = [result.name for result in results if result.state == "ok" and result.name.startswith(_ON_NODES)]
        return [*results, *_cluster(places, works)]


def names() -> list[str]:
    """Return the names that `require` takes, whole or their part after the colon."""
    return [*doctor_trials.names(), "cluster"]


def required(words: tuple[str, ...]) -> list[str]:
    """Return the names that `words` stand for; raises `UserError` with the choices."""
    chosen = []
    for word in words:
        matches = [name for name in names() if word and word in (name, name.partition(":")[2])]
        if len(matches) != 1:
            what = f"may be {' or '.join(matches)}" if matches else "is unknown"
            raise UserError(f"--require {word} {what}", f"choose from {', '.join(matches or names())}")
        chosen += matches
    return chosen


def unmet(config: Doctor, results: list[Result]) -> list[str]:
    """Return the required names that do not work."""
    works = {result.name for result in results if result.state == "ok"}
    return [name for name in required(config.require) if name not in works]


def report(config: Doctor, results: list[Result]) -> str:
    """Return the results as a table; the last line counts them."""
    mark = {"ok": "ok", "missing": "--", "failed": "FAILED"}
    width = max(len(result.name) for result in results)
    lines = [f"speechdistill {__version__}"]
    for result in results:
        lines.append(f"{mark[result.state]:6}  {result.name:{width}}  {result.detail}")
        lines += [f"{'':6}  {'':{width}}  fix: {result.fix}"] if result.fix else []
    lines += [f"required, but does not work: {name}" for name in unmet(config, results)]
    counts = Counter(result.state for result in results)
    return "\n".join([*lines, f"{counts['ok']} work, {counts['missing']} are not here, {counts['failed']} failed"])


def as_json(results: list[Result]) -> str:
    """Return the results as a JSON list of {name, state, detail, fix}."""
    return json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False)


def compared(here: Mapping[str, str], works: list[str], answers: Mapping[str, Node | Exception]) -> list[Result]:
    """Return a result per node: failed if a version differs from `here`, or a trial that `works` here fails there."""
    return [
        _failure(f"node:{name}", node)
        if isinstance(node, Exception)
        else _node_result(f"node:{name}", here, works, node)
        for name, node in answers.items()
    ]


def _node_result(name: str, here: Mapping[str, str], works: list[str], node: Node) -> Result:
    wrong, fixes = [], []
    for library in sorted(here.keys() | node.versions.keys()):
        ours, theirs = here.get(library, "none"), node.versions.get(library, "none")
        if ours != theirs:
            wrong.append(f"{library} {theirs}, here {ours}")
            fixes = [_SAME]
    for result in node.results:
        if result.state == "failed" or (result.name in works and result.state != "ok"):
            wrong.append(f"{result.name}: {result.detail}")
            fixes.append(result.fix)
    machine = [result.detail for result in node.results if result.name in ("machine", "gpu") and result.state == "ok"]
    state: Literal["ok", "failed"] = "failed" if wrong else "ok"
    return Result(name, state, "; ".join(wrong or machine), "; ".join(dict.fromkeys(fixes)))


def _failure(name: str, error: Exception) -> Result:
    """Turn a trial's exception into a result."""
    kind = name.partition(":")[0]
    if isinstance(error, Missing):
        return Result(name, "missing", *error.args)
    if isinstance(error, ChildDied):
        return Result(name, "failed", error.reason, _FIXES.get(kind, _REINSTALL))
    reason, fix = f"{type(error).__name__}: {error}", ""
    if isinstance(error, UserError):
        reason, fix = error.reason, error.fix
    if isinstance(error, AudioError):
        reason = f"{error.path!r}: {reason}"
    absent = isinstance(error, FileNotFoundError | ImportError) and kind in ("teacher", "degradation", "recipe", "demo")
    return Result(name, "missing" if absent else "failed", reason, fix or _FIXES.get(kind, _REINSTALL))


def _line(text: str) -> str:
    """Return one line without the environment's secrets: an error may quote a URL or a header."""
    for name, value in os.environ.items():
        if _SECRET.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, f"${name}")
    return " ".join(re.sub("//[^/@ ]*@", "//", text).split())[:_LONGEST_LINE]


class _Trials:
    """Worker of a child process: `{"name": ...}` to `{"result": Result}`."""

    def __init__(self, places: Places, on_node: bool = False) -> None:
        os.dup2(2, 1)  # keeps stdout for the report, whatever a library prints
        if on_node:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides GPUs from tasks that ask for none
        # A store that does not answer is reported within seconds.
        brief = {"connect_timeout": 5, "read_timeout": 10, "retries": {"max_attempts": 1}}
        fsspec.config.conf["s3"] = {"config_kwargs": brief, **fsspec.config.conf.get("s3", {})}
        self._places = places

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        return [{"result": self._tried(row["name"])} for row in rows]

    def _tried(self, name: str) -> Result:
        kind, _, member = name.partition(":")
        try:
            return Result(name, "ok", doctor_trials.TRIALS[kind](member, self._places))
        except Exception as error:
            return _failure(name, error)


def _tried(child: Isolated, name: str) -> Result:
    (answer,) = child([{"name": name}])
    if isinstance(answer, Exception):
        return _failure(name, answer)
    result: Result = answer["result"]
    return result


def _cluster(places: Places, works: list[str]) -> list[Result]:
    """Return one result for the cluster and one for each node."""
    if not os.environ.get("RAY_ADDRESS"):
        reason = f"RAY_ADDRESS is not set: jobs started here use this machine alone, with ray {version('ray')}"
        fix = "on a machine of a cluster `RAY_ADDRESS=auto speechdistill doctor` asks all its nodes"
        return [_failure("cluster", Missing(reason, fix))]
    # In a child as well: Ray ends a process that asks for a cluster which does not exist.
    child = Isolated(partial(_Cluster, places, works), timeout_s=_NODES_TIMEOUT_S + _TIMEOUT_S)
    (answer,) = child([{"name": "cluster"}])
    if isinstance(answer, Exception):
        return [_failure("cluster", answer)]
    nodes: list[Result] = answer["results"]
    bad = [node.name for node in nodes if node.state != "ok"]
    if bad:
        return [Result("cluster", "failed", f"{len(bad)} of the lines below failed", f"fix {', '.join(bad)}"), *nodes]
    return [Result("cluster", "ok", f"{len(nodes)} node(s) with the versions of this machine"), *nodes]


class _Cluster:
    """Worker of a child process that asks the nodes of the cluster."""

    def __init__(self, places: Places, works: list[str]) -> None:
        os.dup2(2, 1)
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # else Ray tries a wrong address for minutes
        self._places, self._works = places, works

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        try:
            return [{"results": self._asked()}]
        except Exception as error:
            return [error]

    def _asked(self) -> list[Result]:
        from speechdistill.engine import cluster

        cluster.connect()
        answers = cluster.on_every_node(partial(_node, self._places, self._works), _NODES_TIMEOUT_S)
        nodes = compared(_versions(), self._works, answers)
        if self._places.out and "storage:out" in self._works:
            try:
                with doctor_trials.published(self._places.out, f"doctor-{uuid.uuid4().hex}"):  # leaves no folder behind
                    cluster.check_shared(self._places.out)
            except RunError as error:
                nodes.append(_failure("storage:shared", error))
        return nodes


def _node(places: Places, wanted: list[str]) -> Node:
    """Try a node, in a task on it."""
    child = Isolated(partial(_Trials, places, on_node=True), timeout_s=_TIMEOUT_S)
    return Node(_versions(), [_tried(child, name) for name in ("machine", "gpu", *wanted)])


def _versions() -> dict[str, str]:
    """Return the versions that must be equal everywhere: of Python and Ray to connect, of the rest for equal labels."""
    ours = {"python": platform.python_version(), "ray": version("ray"), "speechdistill": __version__}
    return {**ours, **audio.codec_versions(), **components.library_versions(COMPONENTS)}
