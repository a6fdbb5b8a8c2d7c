"""Scoring clips with models on the engine: decode once, score with every model that has not scored the clip, commit.

The committed parts are the cache: `OUT/scores/*/shards` has every score so far, by model and content of the clip. Each
call makes a run of the missing pairs, in a folder named after them, whatever models and clips earlier calls had.
Rejected clips are not cached: the next call tries them again.

Workers of a killed call may outlive it and commit one more part. The next call therefore resumes that run first: it
replaces such a part by an equal one, where a new run would score those clips a second time.
"""

import glob
import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from speechdistill.comparing import judged
from speechdistill.comparing.candidates import Candidate
from speechdistill.engine import flow, pools, shards
from speechdistill.engine.isolate import Row
from speechdistill.engine.limits import Limits, Rejects
from speechdistill.engine.monitor import Report
from speechdistill.engine.stages import Stage
from speechdistill.io import audio, fingerprint, storage, table
from speechdistill.io.errors import RunError
from speechdistill.models.label import Label, Teacher, Unscorable
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions

SCHEMA = "clip_scores.v1"
_ROWS_PER_PART = 16  # XLS-R takes minutes for a part on a CPU
_BATCH_ROWS = 8
_WARM_UP_S = 1.0
_ENDLESS = Limits(rejects=Rejects(max_reject_share=1.0))
_THREADS = 32
_TASKS = "tasks.json"
_ABOUT = [field for field in table.schema(SCHEMA) if field.name not in ("number", "scores")]
DECODED = pa.schema([*_ABOUT, ("models", pa.list_(pa.string())), ("wave", pa.binary())])
SCORED = pa.schema([table.schema(SCHEMA).field("scores")])


class Score(NamedTuple):
    """A model's score of a clip, or the reason of a missing one; `cpu_s` is None on a GPU."""

    score: float | None
    error: str | None
    duration_s: float
    cpu_s: float | None


class Task(NamedTuple):
    """A file, and the keys of the models that have not scored it."""

    sha256: str
    uri: str
    models: tuple[str, ...]


class Scores(NamedTuple):
    """Scores by key of the model and sha256 of the clip, and the reasons of rejected files by their address."""

    scores: dict[tuple[str, str], Score]
    rejects: dict[str, str]


def score(
    models: Sequence[Candidate],
    clips: Sequence[judged.JudgedClip],
    out: str,
    max_reject_share: float = 0.05,
    report: Report = lambda figures: None,
) -> Scores:
    """Return every model's score of every clip; only scores that `out` lacks are computed.

    Files with the same bytes are one file. Raises `RunError` as `flow.run` does; scores so far are kept.
    """
    _resume(models, clips, out, report)
    known = committed(out)
    tasks = missing(models, clips, known)
    if not tasks:
        return Scores(known, {})
    run = _flow(models, tasks, out, report)
    storage.publish_json(tasks, f"{run.layout.out}/{_TASKS}")
    others = len(missing(models, clips, {})) - len(tasks)
    rejects = Rejects(max_reject_share=max_reject_share, retry_rejected=True)
    flow.run(replace(run, limits=Limits(rejects=rejects), known=others))
    rows = table.read(f"{run.layout.out}/rejects/rejects.parquet", "reject.v1").to_pylist()
    return Scores(committed(out), {tasks[int(row["id"])].uri: row["message"] for row in rows})


def missing(
    models: Sequence[Candidate], clips: Sequence[judged.JudgedClip], known: Mapping[tuple[str, str], Score]
) -> list[Task]:
    """Return a task for each file that some model has not scored; files that could not be read are tried again."""
    files = {clip.sha256 or clip.uri: clip for clip in clips}
    tasks = (
        Task(clip.sha256, clip.uri, tuple(m.key for m in models if (m.key, clip.sha256) not in known))
        for clip in files.values()
    )
    return [task for task in tasks if task.models]


def committed(out: str) -> dict[tuple[str, str], Score]:
    """Return all scores in `out`, by key of the model and sha256 of the clip."""
    files = _files(out, "*/shards/part-*.parquet")
    scores: dict[tuple[str, str], Score] = {}
    with ThreadPoolExecutor(_THREADS) as threads:
        for rows in threads.map(lambda file: table.read(file, SCHEMA).to_pylist(), files):
            for row in rows:
                scores |= answers(row)
    return scores


def answers(row: Mapping[str, Any]) -> dict[tuple[str, str], Score]:
    """Return the scores in a row of a shard; none for a file whose bytes are unknown."""
    if not row["clip_sha256"]:
        return {}
    return {
        (key, row["clip_sha256"]): Score(one["score"], one["error"], row["duration_s"], one["cpu_s"])
        for key, one in json.loads(row["scores"]).items()
    }


def _resume(models: Sequence[Candidate], clips: Sequence[judged.JudgedClip], out: str, report: Report) -> None:
    """Finish stopped runs of which every missing score is still wanted."""
    wanted = {(key, task.sha256) for task in missing(models, clips, {}) for key in task.models}
    for folder in _stopped(out):
        tasks = [Task(sha256, uri, tuple(keys)) for sha256, uri, keys in storage.read_json(f"{folder}/{_TASKS}") or ()]
        run = _flow(models, tasks, out, report)
        if run.layout.out != folder:  # of other models, or versions of libraries
            continue
        parts, _ = shards.survey(run.layout)
        left = {(key, tasks[i].sha256) for k in parts for i in run.layout.ids(k) for key in tasks[i].models}
        if left <= wanted - committed(out).keys():
            flow.run(run)


def _stopped(out: str) -> list[str]:
    """Return the folders of runs that have begun and not ended."""
    begun, ended = ({file.split("/")[-2] for file in _files(out, f"*/{name}")} for name in (_TASKS, "manifest.parquet"))
    return [f"{out}/scores/{name}" for name in sorted(begun - ended)]


def _files(out: str, pattern: str) -> list[str]:
    fs, path = storage.file_system(f"{out}/scores")
    fs.invalidate_cache()
    with storage.access(out):
        files = sorted(fs.glob(f"{glob.escape(path)}/{pattern}")) if fs.exists(path) else []
    return [str(fs.unstrip_protocol(file)).removeprefix("file://") for file in files]  # a local path is never parsed


def _flow(models: Sequence[Candidate], tasks: list[Task], out: str, report: Report) -> flow.Flow:
    """Return a run that rejects do not stop."""
    wanted = {key for task in tasks for key in task.models}
    asked = [model for model in models if model.key in wanted]
    identity = {
        "job": "compare",
        "models": {model.key: model.sha256 for model in asked},
        "libraries": audio.codec_versions(),
        "tasks": fingerprint.of(tasks),
    }
    rows = max(1, min(_ROWS_PER_PART, len(tasks) // 8))  # so that a few clips also spread over the pool
    folder = f"{out}/scores/{fingerprint.of(identity)[:16]}"
    layout = shards.Layout(
        out=folder, schema=SCHEMA, id_column="number", num_ids=len(tasks), rows_per_part=rows, totals=_totals
    )
    stages = partial(_stages, asked, tasks)
    return flow.Flow(
        layout=layout,
        identity=identity,
        stages=stages,
        limits=_ENDLESS,
        report=report,
    )


def _stages(models: list[Candidate], tasks: list[Task], cpus: float, gpus: float) -> tuple[Stage, ...]:
    """Return the stages; each actor of the second pool holds all models, so that a wave is passed on once."""
    sizes = pools.sized(pools.Pools(), 0, cpus, gpus)
    decode = Stage(name="decode", make=partial(Decode, tasks), adds=DECODED, pool=sizes.degrade, isolated=True)
    ask = partial(Ask, models)
    score = Stage(name="score", make=ask, adds=SCORED, pool=sizes.teach, batch_rows=_BATCH_ROWS, isolated=True)
    return decode, score


class Decode:
    """Worker of the first stage: numbers of tasks to waves."""

    def __init__(self, tasks: list[Task]) -> None:
        self._tasks = tasks

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        return [self._one(self._tasks[row["id"]]) for row in rows]

    def _one(self, task: Task) -> Row | Exception:
        try:
            wave = judged.read_if_same(task.uri, task.sha256)
        except Exception as error:
            return error
        return {
            "clip_sha256": task.sha256,
            "uri": task.uri,
            "duration_s": len(wave) / audio.SAMPLE_RATE,
            "models": list(task.models),
            "wave": wave.astype(np.float32).tobytes(),
        }


class Ask:
    """Worker of the second stage: each model's score of each wave that the model has not scored.

    The reason why a model cannot score a wave is cached like a score. Raises `RunError` if a model has other weights on
    this node than on the driver.
    """

    def __init__(self, models: list[Candidate]) -> None:
        import torch

        torch.set_num_threads(1)  # actors, not threads, fill the CPUs; the cost is CPU time on one thread
        self._on_gpu = torch.cuda.is_available()
        self._teachers = {model.key: _loaded(model) for model in models}

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        waves = [np.frombuffer(row["wave"], np.float32).copy() for row in rows]
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for key, teacher in self._teachers.items():
            asked = [i for i, row in enumerate(rows) if key in row["models"]]
            for group in [asked] if self._on_gpu else [[i] for i in asked]:
                for i, answer in zip(group, self._answers(teacher, [waves[i] for i in group]), strict=True):
                    answers[i][key] = answer
        return [{"scores": json.dumps(answer), "wave": None} for answer in answers]

    def _answers(self, teacher: Teacher, waves: list[np.ndarray]) -> list[dict[str, Any]]:
        started = time.process_time()
        labels = teacher.label(waves)
        cpu_s = None if self._on_gpu else time.process_time() - started
        return [{**_answer(label), "cpu_s": cpu_s} for label in labels]


def _answer(label: Label | Unscorable) -> dict[str, Any]:
    if isinstance(label, Unscorable):
        return {"score": None, "error": str(label)}
    if not math.isfinite(label.score):
        return {"score": None, "error": "the model's score is NaN or infinite"}
    return {"score": label.score, "error": None}


def _loaded(model: Candidate) -> Teacher:
    teacher = load_teacher(model.teacher, TeacherOptions(weights=model.weights, head=model.head))
    if teacher.weights_hash != model.sha256:
        reason = f"{model.name} has other weights on this node than on the driver"
        raise RunError(reason, "install the same weights on all nodes")
    noise = 0.1 * np.random.default_rng(0).standard_normal(round(_WARM_UP_S * audio.SAMPLE_RATE))
    teacher.label([noise.astype(np.float32)])  # the first call is slower; no clip is charged for it
    return teacher


def _totals(rows: pa.Table) -> dict[str, Any]:
    return {"audio_s": float(np.sum(rows["duration_s"].to_numpy()))}
