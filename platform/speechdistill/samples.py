"""The workers of the labelling job: plans to degraded audio, audio to labels."""

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import pyarrow as pa

from speechdistill import __version__, audio, degradations, table, teachers
from speechdistill.clips import Clips
from speechdistill.isolate import CannotWork, Row
from speechdistill.plan import Plan, Plans, Recipe

SCHEMA = "pseudolabel.v1"
_LABELS = ("score", "logit", "disagreement", "teacher", "teacher_hash")
_FIELDS = [field for field in table.schema(SCHEMA) if field.name != "sample_id"]
DEGRADED = pa.schema([field for field in _FIELDS if field.name not in _LABELS])
TAUGHT = pa.schema([field for field in _FIELDS if field.name in _LABELS])
# To tell a file that cannot be read from a storage that is away.
_OTHERS, _ANSWERS_WITHIN_S = 3, 60.0


def libraries() -> dict[str, str]:
    """Versions that decide the bits of a sample; part of a run's fingerprint."""
    return {"speechdistill": __version__, **audio.codec_versions(), **degradations.library_versions()}


def make_sample(sample: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The degraded and the clean segment of a plan: int16 at 16 kHz, shape (num_samples,) each.

    Raises `AudioError` for a source that cannot be read, and `ArithmeticError` naming a step whose output is not
    finite.
    """
    clean = audio.load(sample.uri, sample.start, sample.num_samples)
    wave = clean
    for step in sample.steps:
        wave = step.apply(wave)
        if wave.shape != clean.shape or not np.isfinite(wave).all():
            raise ArithmeticError(f"{step} gave {wave.shape} samples, not all finite; report it with this plan")
    return audio.quantise(_within_full_scale(wave)), audio.quantise(_within_full_scale(clean))


class Degrade:
    """Worker of the first stage: sample ids to stored audio and its plan.

    Raises `ValueError` where this node has other versions of the deciding `libraries` than the driver.
    """

    def __init__(
        self, clips: str, recipe: Recipe, seed: int, audio_format: str, reference: bool, expected: Mapping[str, str]
    ) -> None:
        import torch

        if different := table.differences(dict(expected), libraries()):
            raise ValueError(
                f"this node makes other audio than the driver (driver -> {socket.gethostname()}): "
                f"{', '.join(different)}; install requirements.lock on every node"
            )

        torch.set_num_threads(1)  # spectral gating; one thread per actor, as everywhere
        self._clips = Clips.read(clips)
        self._plans = Plans(recipe, self._clips, seed)
        self._format, self._reference = audio_format, reference

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        return [self._one(row["id"]) for row in rows]

    def _one(self, sample_id: int) -> Row | Exception:
        sample = self._plans[sample_id]
        try:
            degraded, clean = make_sample(sample)
        except audio.UnreadableError as error:
            self._check_storage(error)
            return error
        except Exception as error:
            return error
        return {
            "audio": audio.encode(degraded, self._format),
            "audio_format": self._format,
            "sample_rate": audio.SAMPLE_RATE,
            "num_samples": len(degraded),
            "plan": sample.to_json(),
            "speaker": sample.speaker,
            "clip_ids": sample.clip_ids,
            "segment_start_s": sample.start / audio.SAMPLE_RATE,
            "segment_duration_s": sample.num_samples / audio.SAMPLE_RATE,
            "reference": audio.encode(clean, self._format) if self._reference else None,
        }

    def _check_storage(self, error: audio.UnreadableError) -> None:
        """Raise `CannotWork` where other files of the storage cannot be read either: an outage rejects no sample."""
        others = self._clips.others(error.path, _OTHERS)
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
    except audio.AudioError as error:  # no audio, or no such file, is an answer of the storage
        return not isinstance(error, audio.UnreadableError)
    return True


class Teach:
    """Worker of the second stage: the teacher scores exactly the stored int16 samples."""

    def __init__(self, teacher: str, weights: str | None, dtype: str, batch_s: float | None, sha256: str) -> None:
        import torch

        torch.set_num_threads(1)  # actors, not threads, fill the CPUs
        self._teacher = teachers.load(teacher, weights=weights, dtype=dtype, batch_s=batch_s).teacher
        if self._teacher.weights_hash != sha256:
            raise ValueError(
                f"{teacher} has other weights on this node than on the driver; install the same everywhere"
            )

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        waves = [audio.decode(row["audio"], row["audio_format"]) for row in rows]
        return [self._row(label) for label in self._teacher.label(waves)]

    def _row(self, label: teachers.Label | Exception) -> Row | Exception:
        if isinstance(label, Exception):
            return label
        return {**label._asdict(), "teacher": self._teacher.name, "teacher_hash": self._teacher.weights_hash}


def _within_full_scale(wave: np.ndarray) -> np.ndarray:
    """Scaled down to a peak of 0.99 where noise or a room has pushed it over full scale."""
    peak = float(np.max(np.abs(wave), initial=0.0))
    return wave * np.float32(0.99 / peak) if peak > 1.0 else wave
