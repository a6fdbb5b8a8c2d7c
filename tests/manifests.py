"""Manifests and small corpora for tests."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from speechdistill.data.clips import Clips, clip_id
from speechdistill.io import audio, storage, table


def row(uri: str, kind: str = "speech", duration_s: float = 10.0, **more: object) -> dict[str, object]:
    known = {"sample_rate": 16000, "channels": 1}
    return {
        "clip_id": clip_id(kind, uri),
        "uri": uri,
        "kind": kind,
        "duration_s": duration_s,
        **known,
        **more,
    }


def manifest(speech: int = 50, noise: int = 5, rir: int = 3, seed: int = 0) -> pa.Table:
    """A manifest of files that do not exist: plans open none."""
    rng = np.random.default_rng(seed)
    rows = [row(f"/s/{i}.wav", "speech", rng.uniform(2, 20), speaker=f"s{i}") for i in range(speech)]
    rows += [row(f"/n/{i}.wav", "noise", rng.uniform(2, 60)) for i in range(noise)]
    rows += [row(f"/r/{i}.wav", "rir", 0.5) for i in range(rir)]
    return table.from_rows(rows, "clip.v1")


def clips(**counts: int) -> Clips:
    return Clips(manifest(**counts))


def voice(seconds: float, sample_rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A voice-like signal: harmonics of a gliding pitch in syllables, with pauses; float32."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * sample_rate)) / sample_rate
    pitch = 120 + 40 * rng.random() + 20 * np.sin(2 * np.pi * 0.6 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    tone = sum(np.sin(k * phase) / k for k in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * 3 * t + 6 * rng.random()), 0, 1) * (np.sin(2 * np.pi * 0.3 * t) > -0.7)
    return (0.2 * tone * syllables + 1e-4 * rng.standard_normal(len(t))).astype(np.float32)


def corpus(root: Path, speech: int = 6, seconds: float = 4.0) -> Path:
    """`speech`, `noise` and `rir` folders of real files below `root`."""
    for kind in ("speech", "noise", "rir"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for i in range(speech):
        soundfile.write(root / "speech" / f"v{i}.flac", voice(seconds + i % 3, seed=i), 16000)
    rng = np.random.default_rng(7)
    soundfile.write(root / "noise" / "white.wav", 0.1 * rng.standard_normal(5 * 44100), 44100)
    decay = rng.standard_normal(4800) * np.exp(-np.arange(4800) / 800)
    decay[0] = 4.0
    soundfile.write(root / "rir" / "room.wav", 0.2 * decay, 16000)
    return root


def corpus_manifest(root: Path) -> str:
    """The manifest of such a corpus in `root`, without an ingest job."""
    files = [(str(path), path.parent.name) for path in sorted(corpus(root).rglob("*.*"))]
    rows = [row(path, kind, audio.probe(path).duration_s) for path, kind in files]
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), f"{root}/clips.parquet")
    return f"{root}/clips.parquet"
