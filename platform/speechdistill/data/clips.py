# data/: which clips there are (corpora/), and what sample i is (degradations/, recipes, plan).
"""The clip manifest as plans see it: three pools of clips, in manifest order."""

import hashlib
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speechdistill.io import table
from speechdistill.io.audio import SAMPLE_RATE


def clip_id(kind: str, uri: str) -> str:
    """16 hexadecimal digits that depend on the kind and the address alone."""
    return hashlib.blake2b(f"{kind}\0{uri}".encode(errors="surrogatepass"), digest_size=8).hexdigest()


class Clip(NamedTuple):
    """One file; `num_samples` is its length at 16 kHz, `size_bytes` and `etag` its version when it was ingested."""

    clip_id: str
    uri: str
    num_samples: int
    speaker: str | None
    size_bytes: int | None
    etag: str | None


class Pool:
    """The clips of one kind, in manifest order; rows stay in Arrow memory until asked for."""

    def __init__(self, rows: pa.Table) -> None:
        self._rows = rows.combine_chunks()
        seconds = self._rows["duration_s"].to_numpy()
        self.num_samples: np.ndarray = np.floor(seconds * SAMPLE_RATE + 1e-6).astype(np.int64)

    def __len__(self) -> int:
        return len(self.num_samples)

    def __getitem__(self, index: int) -> Clip:
        row = self._rows
        return Clip(
            row["clip_id"][index].as_py(),
            row["uri"][index].as_py(),
            int(self.num_samples[index]),
            row["speaker"][index].as_py(),
            row["size_bytes"][index].as_py(),
            row["etag"][index].as_py(),
        )

    def find(self, clip_id: str) -> Clip | None:
        """The clip of that id, if it is here."""
        ids, order = self._by_id
        place = int(np.searchsorted(ids, wanted := np.uint64(int(clip_id, 16)), sorter=order))
        return self[int(order[place])] if place < len(ids) and ids[order[place]] == wanted else None

    @cached_property
    def _by_id(self) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([int(clip_id, 16) for clip_id in self._rows["clip_id"].to_pylist()], np.uint64)
        return ids, np.argsort(ids)

    def uris(self, prefix: str) -> list[pa.Array]:
        """The addresses that start so, as chunks."""
        uris = self._rows["uri"]
        return list(uris.filter(pc.starts_with(uris, prefix)).chunks)


class Clips:
    """A `clip.v1` manifest split by kind: `speech`, `noise` and `rir`."""

    def __init__(self, manifest: pa.Table) -> None:
        self.speech, self.noise, self.rir = (
            Pool(manifest.filter(pc.equal(manifest["kind"], kind))) for kind in ("speech", "noise", "rir")
        )

    def others(self, uri: str, most: int) -> list[str]:
        """At most `most` other files of the storage (bucket, server, local disks) that has `uri`, far apart."""
        storage = "".join(part + "/" for part in uri.split("/")[:3]) if "://" in uri else "/"
        chunks = [chunk for pool in (self.speech, self.noise, self.rir) for chunk in pool.uris(storage)]
        found = pa.chunked_array(chunks, pa.string())
        found = found.filter(pc.not_equal(found, uri))
        places = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).astype(np.int64))
        return [found[place].as_py() for place in places.tolist()]

    @classmethod
    def read(cls, uri: str) -> "Clips":
        columns = ["clip_id", "uri", "kind", "duration_s", "speaker", "size_bytes", "etag"]
        return cls(table.read(uri, "clip.v1", columns))
