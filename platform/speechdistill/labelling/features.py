# labelling/: from samples to shards: degrade, label, features.
"""Hidden states of a frozen speech encoder for scored clips, computed once by a resumable job on the engine.

A clip of 7.68 s or more has 384 frames of the encoder's width in float16: 1.5 MB with XLS-R 2B.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speechdistill.data.clips import Clips
from speechdistill.data.scored_clips import split
from speechdistill.engine import flow, pools, shards
from speechdistill.engine.isolate import Row
from speechdistill.engine.limits import Limits, Rejects
from speechdistill.engine.shards import Totals
from speechdistill.engine.stages import Stage
from speechdistill.io import audio, fingerprint, table
from speechdistill.io.errors import AudioError, TableError, UnreadableError, UserError
from speechdistill.labelling.samples import check_storage
from speechdistill.labelling.unchanged import Ingested, unchanged
from speechdistill.models.label import problem
from speechdistill.models.options import WHOLE_S

SCHEMA = "feature.v1"
_LONGEST = round(WHOLE_S * audio.SAMPLE_RATE)  # samples
"""Longer clips are cut to their middle. The encoder takes all of it as input, the head only the middle 7.68 s."""

_ABOUT = ("clip_id", "dataset", "split", "mos")
_FIELDS = {field.name: field for field in table.schema(SCHEMA)}
_LOADED = pa.schema([*(_FIELDS[name] for name in _ABOUT), pa.field("wave", pa.binary())])
_ENCODED = pa.schema([field for name, field in _FIELDS.items() if name not in ("number", *_ABOUT)])
_ROWS_PER_PART = 64


@dataclass(frozen=True, kw_only=True)
class Features:
    """Settings of the job. `clips` is a table of `scored_clips`, `encoder` an address for `speech_encoder.load`."""

    clips: str
    out: str
    encoder: str
    layer: int
    sha256: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    rejects: Rejects = Rejects()
    grow_to: tuple[float, float] = (0.0, 0.0)


def scored_clips(clips: pa.Table) -> pa.Table:
    """Return the clips for training and validation, with split and dataset filled in.

    Raises `TableError` if either split is empty.
    """
    parts = []
    for name, part in zip(("train", "validation"), split(clips), strict=True):
        if not len(part):
            splits = sorted({str(split_name) for split_name in clips["split"].to_pylist()})
            reason = f"of {len(clips)} scored clips none is of split {name} (there are: {splits})"
            raise TableError(reason, "give clips of both splits, or of none")
        dataset = pc.coalesce(part["dataset"], part["corpus"], pa.scalar("labeled"))
        for column, values in (("split", pa.array([name] * len(part), pa.string())), ("dataset", dataset)):
            part = part.set_column(part.schema.get_field_index(column), part.schema.field(column), values)
        parts.append(part)
    return table.validate(pa.concat_tables(parts), "clip.v1")


def compute(config: Features) -> Totals:
    """Compute the features, or resume computing them; raises `RunError` like `flow.run`."""
    num_clips = len(table.read(config.clips, "clip.v1", columns=["clip_id"]))
    layout = shards.Layout(
        out=config.out,
        schema=SCHEMA,
        id_column="number",
        num_ids=num_clips,
        rows_per_part=_ROWS_PER_PART,
        totals=_totals,
        row_group=1,
    )
    identity = {
        "job": "features",
        "clips_sha256": fingerprint.of_file(config.clips),
        "encoder": {"sha256": config.sha256, "layer": config.layer, "dtype": config.dtype},
        "libraries": audio.codec_versions(),
    }
    stages = partial(_stages, config)
    job = flow.Flow(
        layout=layout, identity=identity, stages=stages, limits=Limits(rejects=config.rejects), grow_to=config.grow_to
    )
    totals = flow.run(job)
    if totals.complete:
        shards.complete(config.out, {"clips": totals.labelled, "rejected": totals.rejected})
    return totals


def _stages(config: Features, cpus: float, gpus: float) -> tuple[Stage, ...]:
    sizes = pools.sized(pools.Pools(), 0, cpus, gpus)
    rows = 64 if sizes.teach.num_gpus else 8
    encode = partial(Encode, config.encoder, config.layer, config.dtype, config.sha256, rows * audio.SEGMENT_S)
    load = Stage(
        name="load",
        make=partial(Load, config.clips),
        adds=_LOADED,
        pool=sizes.degrade,
        batch_rows=16,
        isolated=True,
        memory_gb=4,
    )
    return load, Stage(name="encode", make=encode, adds=_ENCODED, pool=sizes.teach, batch_rows=rows, isolated=True)


class Load:
    """Worker of the first stage: load at most the middle 15 s of a clip."""

    def __init__(self, clips: str) -> None:
        self._source = clips
        self._clips = table.read(clips, "clip.v1", columns=["uri", "duration_s", "size_bytes", "etag", *_ABOUT])

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        return [self._loaded(row["id"]) for row in rows]

    def _loaded(self, number: int) -> Row | Exception:
        (clip,) = self._clips.slice(number, 1).to_pylist()
        try:
            with unchanged([Ingested(clip["uri"], clip["size_bytes"], clip["etag"])]):
                wave = audio.load_middle(clip["uri"], int(audio.num_samples(clip["duration_s"])), _LONGEST)
        except UnreadableError as error:
            check_storage(Clips.read(self._source), error)
            return error
        except AudioError as error:
            return error
        about = {name: clip[name] for name in _ABOUT}
        return problem(wave) or {**about, "wave": wave.astype(np.float32).tobytes()}


class Encode:
    """Worker of the second stage: compute the middle 384 hidden states of waves, in batches of `batch_s` seconds."""

    def __init__(self, encoder: str, layer: int, dtype: str, sha256: str, batch_s: float) -> None:
        import torch

        from speechdistill.models.device import torch_device
        from speechdistill.models.networks import speech_encoder
        from speechdistill.models.windowed import DTYPES

        torch.set_num_threads(1)  # actors, not threads, fill the CPUs
        network, digest = speech_encoder.load(encoder, layer)
        if digest != sha256:
            reason = f"{encoder} has other weights on this node than on the driver"
            raise UserError(reason, "install the same weights on all nodes")
        self._encoder = network.to_dtype(DTYPES[dtype]).to(torch_device(None)).eval()
        self._most = round(batch_s * audio.SAMPLE_RATE)

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        from speechdistill.models.networks.speech_encoder import by_length

        waves = [np.frombuffer(row["wave"], np.float32) for row in rows]
        results: dict[int, Row | Exception] = {}
        for batch in by_length([len(wave) for wave in waves], self._most):
            results.update(zip(batch, self._encoded([waves[i] for i in batch]), strict=True))
        return [results[i] for i in range(len(rows))]

    def _encoded(self, waves: list[np.ndarray]) -> Iterator[Row | Exception]:
        import torch

        from speechdistill.models.networks.conv_transformer import FRAMES
        from speechdistill.models.networks.speech_encoder import middle

        with torch.inference_mode():
            frames, counts = self._encoder(*self._encoder.prepared(waves))
            states = middle(frames, counts).to(torch.float16).cpu().numpy()
        for hidden, count in zip(states, counts.clamp(max=FRAMES).tolist(), strict=True):
            kept = hidden[:count]
            if not np.isfinite(kept).all():
                yield ArithmeticError("hidden states exceed the range of float16 (65504)")
                continue
            yield {"num_frames": count, "dim": kept.shape[1], "hidden": kept.astype("<f2").tobytes(), "wave": None}


def _totals(rows: pa.Table) -> dict[str, Any]:
    return {"frames": int(pc.sum(rows["num_frames"]).as_py() or 0)}
