"""Clips, label runs and comparisons for tests, made by the real workers without Ray."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from manifests import corpus, row, voice
from speechdistill.comparing import candidates, comparison, judged, scoring
from speechdistill.comparing.comparison import Comparison
from speechdistill.data.degradation_recipes import weights_free
from speechdistill.engine import flow, limits, shards
from speechdistill.engine.footers import Part
from speechdistill.engine.isolate import Row, Worker
from speechdistill.io import storage, table
from speechdistill.labelling.samples import DEGRADED, TAUGHT, Degrade, libraries
from speechdistill.labelling.teach import Teach

RATE = 16_000


def recordings(folder: Path, count: int = 24, datasets: Sequence[str] = ("pub", "tub"), seconds: float = 1.0) -> str:
    """A list of noisy voices, whose listeners heard the noise; systems are the levels of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with (folder / "list.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "mos", "dataset", "system"])
        for i in range(count):
            level = i // len(datasets) % 5
            noise = 0.02 * level * rng.standard_normal(round(RATE * seconds))
            soundfile.write(folder / f"{i}.wav", voice(seconds, seed=i) + noise, RATE)
            mos = np.clip(4.5 - 0.7 * level + 0.2 * rng.standard_normal(), 1, 5)
            lines.writerow([f"{i}.wav", f"{mos:.2f}", datasets[i % len(datasets)], f"noise {level}"])
    return str(folder / "list.csv")


def label_run(folder: Path, teacher: str, num_samples: int = 24) -> str:
    """A complete run of degraded voices, with the scores of the student in folder `teacher`; parts of 16 samples."""
    root = corpus(folder / "corpus", seconds=2.0)
    files = [(kind, str(file)) for kind in ("speech", "noise", "rir") for file in sorted((root / kind).iterdir())]
    seconds = [soundfile.info(uri).duration for _, uri in files]
    # Speakers: what is held out does not depend on where the test runs.
    rows = [{**row(uri, kind, s), "speaker": Path(uri).stem} for (kind, uri), s in zip(files, seconds, strict=True)]
    manifest = table.from_rows(rows, "clip.v1")
    storage.publish(table.parquet_bytes(manifest), f"{folder}/clips.parquet")
    recipe = weights_free()
    sha256 = candidates.load({"teacher": teacher}, str(folder / "pinned"), {})[0].sha256
    workers = (
        Degrade(f"{folder}/clips.parquet", recipe, 0, "flac", False, libraries(recipe)),
        Teach("student", teacher, None, "float32", None, sha256),
    )
    layout = shards.Layout(
        out=f"{folder}/labels",
        schema="pseudolabel.v1",
        id_column="sample_id",
        num_ids=num_samples,
        rows_per_part=16,
        totals=lambda rows: {},
    )
    shards.claim(layout.out, {"recipe": {"name": recipe.name}, "teacher": {"name": "student", "sha256": sha256}})
    for k in range(layout.num_parts):
        rows = [{"id": i} for i in layout.ids(k)]
        for worker in workers:
            rows = [{**known, **result} for known, result in zip(rows, worker(rows), strict=True)]
        schema = pa.schema([("id", pa.int64()), *DEGRADED, *TAUGHT, *shards.REJECT])
        shards.write_parts(pa.Table.from_pylist(rows, schema), layout)
    shards.finish(layout)
    shards.complete(layout.out, {})
    return layout.out


def without_ray(run: flow.Flow, stop_after: int | None = None) -> shards.Totals:
    """`flow.run` by the real workers, one part after another; with `stop_after` it is killed after so many of them."""
    layout = run.layout
    shards.claim(layout.out, run.identity)
    parts, _ = shards.survey(layout, run.limits.rejects.retry_rejected)
    if parts:
        shards.reopen(layout)
        stages = run.stages(2, 0)
        workers = [stage.make() for stage in stages]
        schema = pa.schema([("id", pa.int64()), *(field for stage in stages for field in stage.adds), *shards.REJECT])
        for k in parts[:stop_after]:
            rows = [_through(workers, {"id": i}) for i in layout.ids(k)]
            footers = shards.write_parts(pa.Table.from_pylist(rows, schema).drop_columns("wave"), layout)
            for footer in footers["part"].to_pylist():
                run.on_part(Part.from_json(footer))
    if stop_after is not None:
        raise KeyboardInterrupt
    totals = shards.survey(layout)[1]
    limits.judge(run.limits.rejects, run.layout, totals.rejected, totals.done, run.known)
    shards.finish(layout)
    return totals


def _through(workers: Sequence[Worker], row: Row) -> Row:
    for worker in workers:
        (result,) = worker([row])
        if isinstance(result, Exception):
            return row | dict(zip(shards.REJECT.names, ("decode", "AudioError", str(result)), strict=True))
        row = row | result
    return row


def asked(entries: Sequence[candidates.Candidate], clips: Sequence[judged.JudgedClip]) -> scoring.Scores:
    """What the two stages of the job say, one clip after another."""
    tasks = scoring.missing(entries, clips, {})
    decode, ask = scoring.Decode(tasks), scoring.Ask(list(entries))
    found, rejects = {}, {}
    for number, task in enumerate(tasks):
        (decoded,) = decode([{"id": number}])
        if isinstance(decoded, Exception):
            rejects[task.uri] = str(decoded)
            continue
        (answer,) = ask([decoded])
        found |= scoring.answers({**decoded, **answer})
    return scoring.Scores(found, rejects)


def compared(source: str, wanted: str, folder: Path, about: dict[str, object] | None = None) -> Comparison:
    """Models compared on the clips of `source`."""
    clips = judged.clips(source)
    entries = candidates.load(candidates.listed(wanted), str(folder), {})
    return comparison.compared(clips, entries, asked(entries, clips.clips), 100, 0, about or {})
