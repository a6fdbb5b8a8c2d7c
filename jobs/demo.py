#!/usr/bin/env python3
"""The main job on this machine: a corpus, 200 labelled samples, a student trained on them, a page that compares it.

See `--help`.
"""

import csv
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import pyarrow.parquet as pq
import soundfile
import tyro

from speechdistill import cli
from speechdistill.data.degradation_recipes import weights_free
from speechdistill.data.plan import Plan
from speechdistill.engine.finished_run import LabelRun
from speechdistill.engine.held_out import held_out
from speechdistill.io import audio, fingerprint, storage
from speechdistill.labelling.samples import libraries, make_sample
from speechdistill.tracking.run import run_id

NOT_PROMOTED = 3  # the exit code of `promote`


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Label speech with local Ray and the released Distill-MOS weights, train a student on it, promote it, compare it.

    Without --speech a small corpus in five languages is synthesised first.
    """

    out: str = "demo-out"
    """Folder of all output."""
    speech: tuple[str, ...] = ()
    """Your own folders of speech."""
    noise: tuple[str, ...] = ()
    """Your own folders of noise. Default: coloured noise and babble."""
    rir: tuple[str, ...] = ()
    """Your own folders of room impulse responses. Default: simulated rooms."""
    num_samples: int = 200
    """Samples to label."""
    steps: int = 100
    """Updates of the student: far too few for a good one, but enough to see progress."""


def main(demo: Demo) -> int:
    own = _own(demo)
    if own and not demo.speech:
        print("error: --noise and --rir without --speech; add --speech DIR (make demo SPEECH=DIR)", file=sys.stderr)
        return 2
    # Each set of recordings and library versions is a run in a folder of its own.
    out = Path(demo.out) / (f"own-{fingerprint.of(own)[:8]}" if own else "synthetic")
    if code := _step(["ingest", *(own or _synthetic(out / "corpus")), "--out", f"{out}/manifest"]):
        return code
    clips = f"{out}/manifest/clips.parquet"
    versions = libraries(weights_free())
    run = out / f"pseudolabels-{fingerprint.of([fingerprint.of_file(clips), versions])[:8]}"
    number, labels = str(demo.num_samples), ["--seed", "1", "--rows-per-part", "16", "--out", str(run)]
    if code := _step(["pseudolabel", "--clips", clips, "--num-samples", number, *labels]):
        return code
    sample = _listen(run, out)
    if code := _step(["score", f"{out}/clean.wav", f"{out}/degraded.wav", "--out", f"{out}/scores.json"]):
        return code
    clean, degraded = (row["mos"] for row in storage.read_json(f"{out}/scores.json"))
    print(f"clean {clean:.2f} MOS, degraded {degraded:.2f} MOS, by")
    print("\n".join(f"  {step}" for step in sample.steps))
    students = Path(f"{run}-students")
    if code := _student(demo, run, students):
        return code
    comparison = Path(f"{run}-comparison")
    if code := _step(["compare", "--clips", str(run), "--models", _models(), "--out", str(comparison)]):
        return code
    _next(out, clips, run, students, comparison)
    return 0


def _own(demo: Demo) -> list[str]:
    kinds = (("--speech", demo.speech), ("--noise", demo.noise), ("--rir", demo.rir))
    return [word for flag, folders in kinds if folders for word in (flag, *folders)]


def _synthetic(root: Path) -> list[str]:
    from speechdistill.data.corpora import espeak

    print(f"synthesising speech in five languages, noise and rooms below {root}", flush=True)
    return ["--list", str(espeak.write(root, num_clips=60))]


def _step(arguments: list[str]) -> int:
    print(f"\n$ speechdistill {' '.join(arguments)}", flush=True)
    return cli.main(arguments)


def _listen(run: Path, out: Path) -> Plan:
    """Write the worst degraded sample and its clean segment as files, made again from the plan alone."""
    rows = pq.read_table(run / "shards", columns=["score", "plan"]).sort_by("score")
    plans = [Plan.from_json(text) for text in rows["plan"].to_pylist()]
    worst = next((plan for plan in plans if plan.steps), plans[0])
    for name, wave in zip(("degraded", "clean"), make_sample(worst), strict=True):
        soundfile.write(out / f"{name}.wav", wave, audio.SAMPLE_RATE)
    return worst


def _student(demo: Demo, run: Path, students: Path) -> int:
    """Train the smallest student on the shards, promote it by held-out samples, and score with it."""
    quick = ["--crop-s", "0.96", "--learning-rate", "1e-3", "--workers", "2"]
    steps = ["--variants", "v0", "--steps", str(demo.steps), "--validate-every", "50", *quick]
    if code := _step(["train-students", "--shards", str(run), *steps, "--out", str(students)]):
        return code
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{students.resolve()}/mlflow.db")
    unseen = _held_out(run, students)
    promote = ["promote", "--run", f"best-of:{run_id(str(students))}", "--model-name", "speech-quality-v0"]
    # Forced: so few steps make no good student. In a second call the student is the champion.
    if (code := _step([*promote, "--eval", unseen, "--force"])) not in (0, NOT_PROMOTED):
        return code
    champion = ["--model", "models:/speech-quality-v0@champion", "--out", f"{students}/scores.json"]
    if code := _step(["score", f"{run.parent}/clean.wav", f"{run.parent}/degraded.wav", *champion]):
        return code
    clean, degraded = (row["mos"] for row in storage.read_json(f"{students}/scores.json"))
    print(f"the student's scores: clean {clean:.2f} MOS, degraded {degraded:.2f} MOS")
    return 0


def _held_out(run: Path, students: Path) -> str:
    """Write the samples that no student is trained or selected on, and a list of them with the teacher's scores."""
    labels, folder = LabelRun(str(run)), students / "held-out"
    folder.mkdir(exist_ok=True)
    rows = [row for _, row in labels.read(held_out([labels])[0].test)]
    with (folder / "scores.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "mos"])
        for row in rows:
            name = f"{row['sample_id']}.wav"
            soundfile.write(folder / name, audio.decode(row["audio"], row["audio_format"]), audio.SAMPLE_RATE)
            lines.writerow([name, row["score"]])
    return f"{folder}/scores.csv"


def _models() -> str:
    """Return the student, its teacher, and a baseline if its weights are installed (P.835 is ten times slower)."""
    baseline = ["dnsmos_p808"] if find_spec("speechmos") else []
    return ",".join(["student=models:/speech-quality-v0@champion", "distillmos", *baseline])


def _next(out: Path, clips: str, run: Path, students: Path, comparison: Path) -> None:
    print(f"""
Results are below {out}:
  {run.name}/shards/*.parquet  audio, score, logit and the full plan of every sample
  {run.name}/summary.json      counts, hours, histogram, throughput
  clean.wav, degraded.wav                 the worst sample, before and after
  {students.name}/v0/best/   the student
The page to open in a browser: {(comparison / "report.html").resolve()}
What to type next (after `source .venv/bin/activate`):
  speechdistill score YOUR_RECORDINGS --out scores.csv
  speechdistill pseudolabel --clips {clips} --recipe as_is --out {out}/as-is
  mlflow ui --backend-store-uri sqlite:///{students.resolve()}/mlflow.db      (training, the registry)
  mlflow ui --backend-store-uri sqlite:///{run.resolve()}/mlflow.db      (labelling)
  ray job submit --working-dir . -- python jobs/pseudolabel.py --help      (on a cluster)""")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Demo)))
