"""The workers of the labelling job: plans to degraded audio, audio to labels."""

import os
import socket
import threading
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import pyarrow as pa

from speechdistill.data import components, degradation
from speechdistill.data.clips import Clip, Clips
from speechdistill.data.degradation import Neural, Step
from speechdistill.data.plan import DegradationRecipe, Plan, Plans
from speechdistill.engine.isolate import CannotWork, Row, cannot_work
from speechdistill.io import audio, file_cache, fingerprint, table
from speechdistill.io.errors import AudioError, UnreadableError, UserError
from speechdistill.io.version import __version__
from speechdistill.labelling.unchanged import unchanged
from speechdistill.models.label import Label, Unscorable
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions

SCHEMA = "pseudolabel.v1"
_LABELS = ("score", "logit", "disagreement", "teacher", "teacher_hash")
_FIELDS = [field for field in table.schema(SCHEMA) if field.name != "sample_id"]
WORK = pa.schema([("wave", pa.binary()), ("done", pa.int32())])
"""Of a sample between two stages: float32 samples, null where it is finished, and how many steps have made them."""
DEGRADED = pa.schema([*(field for field in _FIELDS if field.name not in _LABELS), *WORK])
TAUGHT = pa.schema([field for field in _FIELDS if field.name in _LABELS])
# To tell a file that cannot be read from a storage that is away.
_OTHERS, _ANSWERS_WITHIN_S = 3, 60.0


def libraries(recipe: DegradationRecipe) -> dict[str, str]:
    """Versions that decide the bits of a recipe's samples; part of a run's fingerprint."""
    names = components.library_versions(recipe.components)
    return {"speechdistill": __version__, **audio.codec_versions(), **names}


def make_sample(sample: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The degraded and the clean segment of a plan: int16 at 16 kHz, shape (num_samples,) each.

    Raises `AudioError` for a source that cannot be read, and `ArithmeticError` naming a step whose output is not
    finite.
    """
    clean = _source(sample)
    wave = clean
    for step in sample.steps:
        wave = check_step(step, wave, step.apply(wave))
    degraded = audio.quantise(_within_full_scale(wave))
    return degraded, degraded if sample.is_generated else audio.quantise(_within_full_scale(clean))


def _source(sample: Plan) -> np.ndarray:
    if sample.is_generated:
        return np.zeros(sample.num_samples, np.float32)  # its length is all that is wanted
    return audio.load(sample.uri, sample.start, sample.num_samples)


def check_step(step: Step, before: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """What a step made of `before`; raises `ArithmeticError` where it is not finite or not as long as it must be."""
    fits = 0 < len(wave) <= len(before) if degradation.generates(step) else wave.shape == before.shape
    if not fits:
        shapes = f"{wave.shape} samples of {before.shape}"
        raise ArithmeticError(f"{type(step).__name__} gave {shapes}; report it with the plan")
    if not np.isfinite(wave).all():
        raise ArithmeticError(f"{type(step).__name__} gave samples that are not finite; report it with the plan")
    return wave


class Degrade:
    """Worker of the CPU stages: sample ids, or samples on their way, to their next network step or their end.

    A finished sample has its `audio`, one on its way the `wave` (float32) that `done` steps have made. Raises
    `UserError` where this node has other versions of the deciding `libraries` than the driver, or lacks texts, and
    `LibraryError` where it lacks a library.
    """

    def __init__(
        self,
        clips: str,
        recipe: DegradationRecipe,
        seed: int,
        audio_format: str,
        reference: bool,
        expected: Mapping[str, str],
    ) -> None:
        import torch

        if different := fingerprint.differences(dict(expected), libraries(recipe)):
            raise UserError(
                f"this node makes other audio than the driver (driver -> {socket.gethostname()}): "
                f"{', '.join(different)}",
                "install requirements.lock on every node",
            )

        torch.set_num_threads(1)  # spectral gating; one thread per actor, as everywhere
        file_cache.bound_bytes()  # what all samples would fail for is told now
        for name in recipe.components:
            if components.network(name) is None:
                components.check(name)
        self._clips = Clips.read(clips)
        self._plans = Plans(recipe, self._clips, seed)
        self._format, self._reference = audio_format, reference

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Row | Exception:
        try:
            if "plan" not in row:
                return self._begun(self._plans[row["id"]])
            return {} if row["wave"] is None else self._gone_on(Plan.from_json(row["plan"]), row)
        except UnreadableError as error:
            check_storage(self._clips, error)
            return error
        except Exception as error:
            return error

    def _begun(self, sample: Plan) -> Row:
        with unchanged(self._used(sample)):
            return self._made(sample)

    def _used(self, sample: Plan) -> list[Clip]:
        """The clips that are checked: all but other people's speech in babble."""
        own = [] if sample.is_generated else [self._plans.clip(sample.sample_id)]
        ids = [identity for step in sample.steps for identity in step.clip_ids()]
        others = (pool.find(identity) for identity in ids for pool in (self._clips.noise, self._clips.rir))
        return [*own, *filter(None, others)]

    def _made(self, sample: Plan) -> Row:
        clean = _source(sample)
        keeps = self._reference and not sample.is_generated
        return {
            "plan": sample.to_json(),
            "speaker": None if sample.is_generated else sample.speaker,
            "clip_ids": sample.clip_ids,
            "segment_start_s": sample.start / audio.SAMPLE_RATE,
            "segment_duration_s": sample.num_samples / audio.SAMPLE_RATE,
            "reference": self._stored(clean) if keeps else None,
            **self._applied(sample, clean, 0),
        }

    def _gone_on(self, sample: Plan, row: Row) -> Row:
        return self._applied(sample, _wave(row), row["done"])

    def _applied(self, sample: Plan, wave: np.ndarray, done: int) -> Row:
        for step in sample.steps[done:]:
            if isinstance(step, Neural):
                return _on_its_way(wave, done)
            wave = check_step(step, wave, step.apply(wave))
            done += 1
        stored = self._stored(wave)
        reference = {"reference": stored} if self._reference and sample.is_generated else {}
        return {
            "audio": stored,
            "audio_format": self._format,
            "sample_rate": audio.SAMPLE_RATE,
            "num_samples": len(wave),
            "wave": None,
            "done": done,
            **reference,
        }

    def _stored(self, wave: np.ndarray) -> bytes:
        return audio.encode(audio.quantise(_within_full_scale(wave)), self._format)


def check_storage(clips: Clips, error: UnreadableError) -> None:
    """Raise `CannotWork` where other files of the storage cannot be read either: an outage rejects no sample."""
    others = clips.others(error.path, _OTHERS)
    threads = ThreadPoolExecutor(_OTHERS)
    try:
        tries = [threads.submit(_answers, uri) for uri in others]
        if tries and not any(done.result() for done in as_completed(tries, timeout=_ANSWERS_WITHIN_S)):
            raise TimeoutError
    except TimeoutError:
        raise CannotWork(f"{error}. {len(others)} other files of that storage cannot be read either") from None
    finally:
        threads.shutdown(wait=False)


def _answers(uri: str) -> bool:
    try:
        audio.probe(uri)
    except AudioError as error:  # no audio, or no such file, is an answer of the storage
        return not isinstance(error, UnreadableError)
    return True


class Enhance:
    """Worker of the network stages: the network steps that come next for samples on their way, in batches.

    Raises `UserError` where this node lacks weights of the recipe, or has others.
    """

    def __init__(self, recipe: DegradationRecipe) -> None:
        import torch

        torch.set_num_threads(1)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # which transformers heeds too: one bar an actor
        for kind in filter(None, map(components.network, recipe.components)):
            degradation.loaded(kind, recipe.assets[kind.need.name])

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        import torch

        steps = [Plan.from_json(row["plan"]).steps for row in rows]
        on_way = {i: row for i, row in enumerate(rows) if row["wave"] is not None}
        results: list[Row | Exception] = [{} for _ in rows]
        while on_way:
            turn = {i: step for i, row in on_way.items() if isinstance(step := _next(steps[i], row), Neural)}
            on_way = {i: on_way[i] for i in turn}
            waves = [_wave(row) for row in on_way.values()]
            last = [row["done"] + 1 == len(steps[i]) for i, row in on_way.items()]
            try:
                made = degradation.apply_together(list(turn.values()), waves, last)
            except Exception as error:  # the weights: no row's fault
                raise cannot_work(error) from error
            for (i, step), before, wave in zip(turn.items(), waves, made, strict=True):
                try:
                    if isinstance(wave, Exception):
                        raise wave
                    on_way[i] = results[i] = _on_its_way(check_step(step, before, wave), on_way[i]["done"] + 1)
                except torch.AcceleratorError:  # after which a GPU's process is of no use: `Isolated` starts another
                    traceback.print_exc()
                    os._exit(1)
                except Exception as error:
                    results[i] = error
                    del on_way[i]
        return results


def _next(steps: tuple[Step, ...], row: Row) -> Step | None:
    return steps[row["done"]] if row["done"] < len(steps) else None


def _on_its_way(wave: np.ndarray, done: int) -> Row:
    return {"wave": wave.astype(np.float32).tobytes(), "done": done}


def _wave(row: Row) -> np.ndarray:
    return np.frombuffer(row["wave"], np.float32).copy()  # PyTorch wants to be able to write


class Teach:
    """Worker of the last stage: the teacher scores exactly the stored int16 samples.

    An intrusive one hears the clean `reference` of each row too, which stays in the row only where the run keeps it.
    """

    def __init__(
        self,
        teacher: str,
        weights: str | None,
        head: str | None,
        dtype: str,
        batch_s: float | None,
        sha256: str,
        keep_reference: bool = True,
    ) -> None:
        import torch

        torch.set_num_threads(1)  # actors, not threads, fill the CPUs
        self._computing = threading.Lock()
        options = TeacherOptions(weights=weights, head=head, dtype=dtype, batch_s=batch_s)
        self._teacher = load_teacher(teacher, options)
        if self._teacher.weights_hash != sha256:
            reason = f"{teacher} has other weights on this node than on the driver"
            raise UserError(reason, "install the same everywhere")
        self._carried: Row = {} if keep_reference else {"reference": None}

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        """May be called from several threads: one computes while the others decode."""
        waves, references = _decoded(rows, "audio"), None
        if self._teacher.intrusive:
            references = _decoded(rows, "reference")
        with self._computing:
            return [self._row(label) for label in self._labels(waves, references)]

    def _labels(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None
    ) -> Sequence[Label | Unscorable]:
        import torch

        try:
            return self._teacher.label(waves, references)
        except torch.OutOfMemoryError as error:  # of one window, since a teacher makes its batches smaller
            reason = f"{self._teacher.name} does not fit the GPU's memory ({str(error).splitlines()[0]})"
            raise CannotWork(f"{reason}; give --dtype bfloat16, or fewer teachers a GPU by --teach-gpus 1") from error
        except torch.AcceleratorError:  # after which a GPU's process is of no use: `Isolated` starts another
            traceback.print_exc()
            os._exit(1)

    def _row(self, label: Label | Exception) -> Row | Exception:
        if isinstance(label, Exception):
            return label
        provenance = {"teacher": self._teacher.name, "teacher_hash": self._teacher.weights_hash}
        return {**label._asdict(), **provenance, **self._carried}


def _decoded(rows: list[Row], column: str) -> list[np.ndarray]:
    return [audio.decode(row[column], row["audio_format"]) for row in rows]


def _within_full_scale(wave: np.ndarray) -> np.ndarray:
    """Scaled down to a peak of 0.99 where noise or a room has pushed it over full scale."""
    peak = float(np.max(np.abs(wave), initial=0.0))
    return wave * np.float32(0.99 / peak) if peak > 1.0 else wave
