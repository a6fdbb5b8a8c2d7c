"""`speechdistill ...`: every command of the platform; the scripts in jobs/ are the same commands for a cluster."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Annotated, Any, Literal, ParamSpec

import tyro
from tqdm import tqdm

from speechdistill.commands import report
from speechdistill.commands.compare import Compare
from speechdistill.commands.doctor import Doctor
from speechdistill.commands.ingest import Ingest
from speechdistill.commands.promote import Promote
from speechdistill.commands.prune import Prune
from speechdistill.commands.pseudolabel import Pseudolabel
from speechdistill.commands.train_students import TrainStudents
from speechdistill.commands.train_teacher import TrainTeacher
from speechdistill.data.degradation_recipes import RecipeName

P = ParamSpec("P")


@dataclass(frozen=True)
class Score:
    """Score the quality of speech recordings: a MOS from 1 (bad) to 5 (excellent) per file.

    Exit code 1 if any file could not be scored; its row says why.
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders, globs or URLs."""
    out: str | None = None
    """Write .csv, .parquet or .json instead of printing CSV."""
    timeline: bool = False
    """A score for every second of audio instead of one per file."""
    model: str = "distillmos"
    """Which model scores: distillmos, xlsr, dnsmos_p808, dnsmos_p835, squim, nisqa, utmos, or one that was
    trained here: its checkpoint's folder or URL, models:/NAME@champion, models:/NAME/VERSION or runs:/RUN_ID/student;
    ensemble:NAME=0.7,NAME=0.3 is their weighted mean."""
    weights: str | None = None
    """The model's weights: a file; of xlsr, and of a head that was trained here, the encoder's folder or
    hf://OWNER/NAME. Default: the released ones; of a head, where its encoder was in training."""
    head: str | None = None
    """Of model xlsr, the file of the head above the encoder. Default: the original one from the wheel xls-r-sqa."""
    tracking: str | None = None
    """Output folder whose mlflow.db has the student, where MLFLOW_TRACKING_URI is not set."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network."""
    hop_s: float = 1.0
    """At most so many seconds from one 7.68 s window of a file to the next; 1 is the released model. 7.68 is a fast
    mode: 2 windows instead of 4 for 10 s, 8 instead of 54 for 60 s (up to 8.68 s nothing changes). It moved the scores
    of degraded clips of 10 to 20 s by 0.05 on average, 0.2 at most."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A recipe as the labelling job takes it."""

    name: Annotated[RecipeName, tyro.conf.Positional]
    """The recipe."""
    without: tuple[str, ...] = ()
    """A component to leave out; its probability goes to 'none'. May be repeated."""
    assets: dict[str, str] = field(default_factory=dict)
    """Weights or texts of its components, NAME and a path or URL (hf://OWNER/MODEL too). May be repeated."""
    lpcnet: bool = False
    """Recipe paper: half of the vocoders are libcodec2's LPCNet codec."""


@dataclass(frozen=True, kw_only=True)
class Show(Chosen):
    """Print what a recipe does, in order, with which probability, and what its components need."""


@dataclass(frozen=True, kw_only=True)
class Listen(Chosen):
    """Make one sample of a run, as the labelling job makes it, and print its plan.

    It is the same bit for bit, but for steps of networks on a GPU: those of a batch may differ by 0.0001.
    """

    clips: str
    """The manifest that the ingest job wrote (clips.parquet)."""
    out: str
    """The WAV file to write; its clean segment is written beside it, as NAME-clean.wav."""
    seed: int = 0
    """The run's seed."""
    index: int = 0
    """The sample's number in the run (sample_id)."""


@dataclass(frozen=True)
class Sync:
    """Send MLflow what it lacks of runs that were tracked while its server did not answer.

    Exit code 1 while something is left, of a job that still runs for example.
    """

    outs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Output folders of runs, local paths or URLs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 3 not promoted, 130 stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    command = tyro.extras.subcommand_cli_from_dict(
        {
            "compare": _compare,
            "doctor": _doctor,
            "ingest": _ingest,
            "promote": _promote,
            "prune": _prune,
            "pseudolabel": _pseudolabel,
            "recipe": _recipe,
            "train-students": _train_students,
            "train-teacher": _train_teacher,
            "score": _score,
            "sync": _sync,
        },
        prog="speechdistill",
        description="Label speech with a large teacher, distil it into small students, promote the winner.",
        args=arguments,
    )
    return int(command)


def entry() -> None:
    sys.exit(main())


def _guarded(resume: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """An error of a command as one line and exit code 1; `resume` says what Ctrl-C leaves."""

    def guard(command: Callable[P, int]) -> Callable[P, int]:
        @wraps(command)
        def guarded(*args: P.args, **options: P.kwargs) -> int:
            try:
                return command(*args, **options)
            except KeyboardInterrupt:
                print(f"\nstopped; {resume}", file=sys.stderr)
                return 130
            except (ValueError, RuntimeError, OSError, ImportError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 1

        return guarded

    return guard


@_guarded("nothing was changed")
def _doctor(config: Annotated[tyro.conf.UseAppendAction[Doctor], tyro.conf.arg(name="")]) -> int:
    from speechdistill.commands import doctor

    results = doctor.run(config)
    print(doctor.as_json(results) if config.json else doctor.report(config, results))
    return 1 if doctor.unmet(config, results) else 0


@_guarded("what is scored is kept, and the same command goes on from there")
def _compare(config: Annotated[tyro.conf.UseAppendAction[Compare], tyro.conf.arg(name="")]) -> int:
    from speechdistill.commands import compare
    from speechdistill.comparing import tables

    found = compare.run(config)
    print(tables.as_text(tables.table_one(found)))
    for line in tables.gaps(found):
        print(f"no figure of {line}")
    for line in tables.left_out(found):
        print(f"in no figure: {line}")
    if config.paper:
        beside = tables.beside_paper(found)
        none = "none of these models on these datasets is in it"
        print(f"\nbeside the paper's Table I:\n{tables.as_text(beside) if len(beside) > 1 else none}")
    print(f"the page: {config.out}/report.html (scores.parquet, table.md, metrics.csv and plots are beside it)")
    return 0


@_guarded("the same command goes on where it stopped")
def _ingest(config: Annotated[Ingest, tyro.conf.arg(name="")]) -> int:
    from speechdistill.commands import ingest

    summary = ingest.run(config)
    kinds = ", ".join(f"{n:,} {kind} ({summary['hours'][kind]:.2f} h)" for kind, n in summary["clips"].items())
    print(f"{kinds} in {summary['manifest']}")
    if summary["rejected"]:
        print(f"{summary['rejected']:,} files were rejected; the reasons are in {config.out}/rejects.parquet")
    if summary["ignored_extensions"]:
        print(f"ignored by extension: {report.counts(summary['ignored_extensions'])}")
    return 0


@_guarded("what is labelled is kept, and the same command goes on from there")
def _pseudolabel(config: Annotated[tyro.conf.UseAppendAction[Pseudolabel], tyro.conf.arg(name="")]) -> int:
    from speechdistill.commands import pseudolabel

    if config.dry_run:
        print(report.estimate(pseudolabel.dry_run(config), config.price))
    else:
        print(report.labels(pseudolabel.run(config), config.out))
    return 0


@_guarded("nothing was written")
def _recipe(
    command: Annotated[
        Annotated[tyro.conf.UseAppendAction[Show], tyro.conf.subcommand("show")]
        | Annotated[tyro.conf.UseAppendAction[Listen], tyro.conf.subcommand("listen")],
        tyro.conf.arg(name=""),
    ],
) -> int:
    """Degradation recipes: what they do, and how a sample sounds."""
    from speechdistill.data import degradation_recipes
    from speechdistill.labelling import preview

    recipe = degradation_recipes.chosen(command.name, command.without, command.assets, command.lpcnet)
    if isinstance(command, Show):
        print(preview.show(recipe))
        return 0
    sample = preview.listen(recipe, command.clips, command.seed, command.index, command.out)
    print(json.dumps(json.loads(sample.to_json()), indent=2, ensure_ascii=False))
    return 0


@_guarded("what is trained is kept, and the same command goes on from the last checkpoints")
def _train_students(config: Annotated[TrainStudents, tyro.conf.arg(name="")]) -> int:
    from speechdistill.commands import train_students

    rows = train_students.run(config)
    print(report.students(rows))
    return 0 if all(row["state"] == "done" for row in rows) else 1


@_guarded("what is computed and trained is kept, and the same command goes on from there")
def _train_teacher(config: Annotated[TrainTeacher, tyro.conf.arg(name="")]) -> int:
    from speechdistill.commands import train_teacher

    rows = train_teacher.run(config)
    print(report.students(rows))
    return 0 if all(row["state"] == "done" for row in rows) else 1


@_guarded("what is pruned and trained is kept, and the same command goes on from the last checkpoint")
def _prune(config: Annotated[Prune, tyro.conf.arg(name="")]) -> int:
    from speechdistill.commands import prune

    print(report.pruned(prune.run(config)))
    return 0


@_guarded("the same command goes on; the champion is moved last")
def _promote(config: Annotated[Promote, tyro.conf.arg(name="")]) -> int:
    from speechdistill.commands import promote

    decision = promote.run(config)
    print(json.dumps(decision, indent=2, ensure_ascii=False))
    return 3 if decision["decision"] == "kept" else 0


@_guarded("what is sent stays sent; the same command sends the rest")
def _sync(config: Annotated[Sync, tyro.conf.arg(name="")]) -> int:
    from speechdistill.tracking.run import sync

    left = 0
    for out in config.outs:
        result = sync(out)
        print(f"{out}: {result.sent:,} events sent, {result.left:,} left; MLflow run {result.run_id}")
        left += result.left
    return 1 if left or not config.outs else 0


@_guarded("nothing was written")
def _score(config: Annotated[Score, tyro.conf.arg(name="")]) -> int:
    from speechdistill.commands import score
    from speechdistill.models.load import load_teacher

    paths = score.expand(config.paths)
    score.writer(config.out)  # a wrong extension is told before the work
    with _local(config.model, config.tracking) as model:
        teacher = load_teacher(
            model, weights=config.weights, dtype=config.dtype, hop_s=config.hop_s, head=config.head
        ).teacher
    if teacher.intrusive:
        raise ValueError(f"model {config.model} compares with clean speech, which only the labelling job knows")
    scored = _Scored(len(paths))
    score.write(scored.watch(score.score_files(paths, teacher, config.timeline)), config.out)
    if scored.stopped:
        print(f"\nstopped after {scored.files} of {len(paths)} files; their rows are written", file=sys.stderr)
        return 130
    return 1 if scored.failed else 0


@contextmanager
def _local(model: str, out: str | None) -> Iterator[str]:
    """A model's name; with a folder of runs, what an address in MLflow stands for there."""
    from speechdistill.tracking import registry
    from speechdistill.tracking.run import MODEL_ADDRESSES, tracking_uri

    if out is None or not model.startswith(MODEL_ADDRESSES):
        yield model
        return
    with registry.student_folder(model, tracking_uri(out)) as folder:
        yield folder


class _Scored:
    """Passes rows on with a progress bar, and remembers whether any failed or the user stopped."""

    def __init__(self, total: int) -> None:
        self._total, self.files, self.failed, self.stopped = total, 0, False, False

    def watch(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        path = None
        with tqdm(total=self._total, unit="file", dynamic_ncols=True) as bar:
            try:
                for row in rows:
                    if row["path"] != path:
                        path = row["path"]
                        self.files += 1
                        bar.update()
                    silent_second = row.get("start_s") is not None
                    self.failed |= row["error"] is not None and not silent_second
                    yield row
            except KeyboardInterrupt:  # what is scored is not lost
                self.stopped = True
