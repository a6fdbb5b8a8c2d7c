"""Workers of the labelling job that make samples: from plans to degraded audio."""

import os
import socket
import traceback
from collections.abc import Mapping
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

SCHEMA = "pseudolabel.v1"
_LABELS = ("score", "logit", "disagreement", "teacher", "teacher_hash")
_FIELDS = [field for field in table.schema(SCHEMA) if field.name != "sample_id"]
WORK = pa.schema([("wave", pa.binary()), ("done", pa.int32())])
"""Working columns between stages: the float32 waveform (null once finished) and the number of steps applied so far."""
DEGRADED = pa.schema([*(field for field in _FIELDS if field.name not in _LABELS), *WORK])
TAUGHT = pa.schema([field for field in _FIELDS if field.name in _LABELS])
# Tries that distinguish an unreadable file from an outage of its storage.
_OTHERS, _ANSWERS_WITHIN_S = 3, 60.0


def libraries(recipe: DegradationRecipe) -> dict[str, str]:
    """Return the versions that affect the bits of a recipe's samples; they are part of a run's identity."""
    versions = components.library_versions(recipe.components)
    return {"speechdistill": __version__, **audio.codec_versions(), **versions}


def make_sample(sample: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return the degraded and the clean segment of a plan: int16 at 16 kHz, shape (num_samples,) each.

    Raises `AudioError` for an unreadable source, and `ArithmeticError` naming a step with an invalid output.
    """
    clean = _source(sample)
    wave = clean
    for step in sample.steps:
        wave = check_step(step, wave, step.apply(wave))
    degraded = audio.quantise(_within_full_scale(wave))
    return degraded, degraded if sample.is_generated else audio.quantise(_within_full_scale(clean))


def _source(sample: Plan) -> np.ndarray:
    if sample.is_generated:
        return np.zeros(sample.num_samples, np.float32)  # only the length matters
    return audio.load(sample.uri, sample.start, sample.num_samples)


def check_step(step: Step, before: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """Return `wave`, the output of a step for `before`; raises `ArithmeticError` if not finite or of wrong length."""
    fits = 0 < len(wave) <= len(before) if degradation.generates(step) else wave.shape == before.shape
    if not fits:
        shapes = f"shape {wave.shape} for an input of {before.shape}"
        raise ArithmeticError(f"{type(step).__name__} returned {shapes}; report this with the plan")
    if not np.isfinite(wave).all():
        raise ArithmeticError(f"{type(step).__name__} gave samples that are not finite; report this with the plan")
    return wave


class Degrade:
    """Worker of the CPU stages: apply the steps of samples up to the next network step, or to the end.

    Input rows are sample ids or unfinished samples. A finished sample has `audio`, an unfinished one the `wave`
    (float32) after `done` steps. Raises `UserError` if this node has other versions of `libraries` than the driver or
    lacks texts, and `LibraryError` if it lacks a library.
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

        torch.set_num_threads(1)  # one thread per actor, for spectral gating
        file_cache.bound_bytes()  # raises now instead of for every sample
        for component in map(components.component, recipe.components):
            if component.network is None:
                component.check()
        self._clips = Clips.read(clips)
        self._plans = Plans(recipe, self._clips, seed)
        self._format, self._reference = audio_format, reference

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Row | Exception:
        try:
            if "plan" not in row:
                return self._started(self._plans[row["id"]])
            return {} if row["wave"] is None else self._continued(Plan.from_json(row["plan"]), row)
        except UnreadableError as error:
            check_storage(self._clips, error)
            return error
        except Exception as error:
            return error

    def _started(self, sample: Plan) -> Row:
        with unchanged(self._used(sample)):
            return self._made(sample)

    def _used(self, sample: Plan) -> list[Clip]:
        """Return the clips to check: all but the other talkers in babble."""
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

    def _continued(self, sample: Plan, row: Row) -> Row:
        return self._applied(sample, _wave(row), row["done"])

    def _applied(self, sample: Plan, wave: np.ndarray, done: int) -> Row:
        for step in sample.steps[done:]:
            if isinstance(step, Neural):
                return _unfinished(wave, done)
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
    """Raise `CannotWork` if other files of the storage are unreadable too, so that an outage rejects no sample."""
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
    except AudioError as error:  # the storage answers, even if the file is missing or no audio
        return not isinstance(error, UnreadableError)
    return True


class Enhance:
    """Worker of the network stages: apply the next network steps of unfinished samples, in batches.

    Raises `UserError` if this node lacks weights of the recipe or has other weights.
    """

    def __init__(self, recipe: DegradationRecipe) -> None:
        import torch

        torch.set_num_threads(1)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers too would show a bar per actor
        for kind in filter(None, (components.component(name).network for name in recipe.components)):
            degradation.loaded(kind, recipe.assets[kind.need.name])

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        import torch

        steps = [Plan.from_json(row["plan"]).steps for row in rows]
        unfinished = {i: row for i, row in enumerate(rows) if row["wave"] is not None}
        results: list[Row | Exception] = [{} for _ in rows]
        while unfinished:
            turn = {i: step for i, row in unfinished.items() if isinstance(step := _next(steps[i], row), Neural)}
            unfinished = {i: unfinished[i] for i in turn}
            waves = [_wave(row) for row in unfinished.values()]
            last = [row["done"] + 1 == len(steps[i]) for i, row in unfinished.items()]
            try:
                outputs = degradation.apply_together(list(turn.values()), waves, last)
            except Exception as error:  # raised for the weights only, which are no fault of a row
                raise cannot_work(error) from error
            for (i, step), before, wave in zip(turn.items(), waves, outputs, strict=True):
                try:
                    if isinstance(wave, Exception):
                        raise wave
                    done = unfinished[i]["done"] + 1
                    unfinished[i] = results[i] = _unfinished(check_step(step, before, wave), done)
                except torch.AcceleratorError:  # leaves the process unusable; `Isolated` starts another
                    traceback.print_exc()
                    os._exit(1)
                except Exception as error:
                    results[i] = error
                    del unfinished[i]
        return results


def _next(steps: tuple[Step, ...], row: Row) -> Step | None:
    return steps[row["done"]] if row["done"] < len(steps) else None


def _unfinished(wave: np.ndarray, done: int) -> Row:
    return {"wave": wave.astype(np.float32).tobytes(), "done": done}


def _wave(row: Row) -> np.ndarray:
    return np.frombuffer(row["wave"], np.float32).copy()  # writable, as PyTorch requires


def _within_full_scale(wave: np.ndarray) -> np.ndarray:
    """Scale a wave above full scale down to a peak of 0.99."""
    peak = float(np.max(np.abs(wave), initial=0.0))
    return wave * np.float32(0.99 / peak) if peak > 1.0 else wave
