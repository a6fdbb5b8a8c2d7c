"""Batches of cached features: like those of audio (`batches.py`) a pure function of seed and step."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechdistill.data.scored_clips import Datasets
from speechdistill.io import fingerprint, storage, table
from speechdistill.io.errors import TableError, UserError
from speechdistill.models.networks.conv_transformer import FRAMES
from speechdistill.training.lanes import Batch, read_ahead, rng, share

_ABOUT = ["clip_id", "dataset", "split", "mos", "dim"]
_THREADS = 32
_AHEAD_BYTES = 1 << 16  # of storage, beyond a clip's own


class FeatureClip(NamedTuple):
    """A clip to validate on: its dataset's name, the listeners' score, its features (384, dim) float16."""

    dataset: str
    mos: float
    features: np.ndarray


class FeatureBatches:
    """Batches of features (batch, 384, dim) float16, zeros after a shorter clip's, and scores as they were given.

    Each lane draws a dataset with p in proportion to min(clips, 7000), then one of its clips. `out` is the folder that
    `features.compute` filled. Raises `TableError` where it is not complete or has no clips to train or validate on.
    """

    def __init__(self, out: str, batch_size: int = 12, seed: int = 0) -> None:
        if seed < 0:
            raise UserError(f"seed {seed}", "give at least 0")
        if storage.read_json(f"{out}/summary.json") is None:
            raise TableError(f"{out}: features are not complete", "rerun the command")
        self.batch_size, self._seed = batch_size, seed
        files = table.read(f"{out}/manifest.parquet", "shard.v1")
        self._paths = [f"{out}/{path}" for path in files["path"].to_pylist()]
        self.fingerprint = fingerprint.of(files["content_sha256"].to_pylist())
        with ThreadPoolExecutor(_THREADS) as threads:
            about = list(threads.map(_about, self._paths))
        counts = [len(part) for part in about]
        self._file = np.repeat(np.arange(len(counts)), counts)
        self._in_file = np.concatenate([np.arange(count) for count in counts])
        clips = pa.concat_tables(about)
        self._ids, self._mos = clips["clip_id"].to_pylist(), clips["mos"].to_numpy()
        self.dim = int(clips["dim"][0].as_py()) if len(clips) else 0
        self._readers = ThreadPoolExecutor(_THREADS)
        is_train = np.array(clips["split"].to_pylist()) == "train"
        self._train, self._validation = np.flatnonzero(is_train), np.flatnonzero(~is_train)
        if not len(self._train) or not len(self._validation):
            raise TableError(f"{out}: {len(self._train)} clips train, {len(self._validation)} validate", "give both")
        self._names: list[str] = clips["dataset"].to_pylist()
        self.datasets = Datasets([self._names[i] for i in self._train])

    def stream(self, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        """A worker's share of batches `start` to `stop - 1`, read ahead on other threads."""
        lanes = share(self.batch_size, rank, world)
        return read_ahead(lambda t: self.read(t, [self.draw(t, lane) for lane in lanes]), range(start, stop))

    def draw(self, t: int, lane: int) -> int:
        """Which of the clips to train on lane `lane` of batch t has."""
        return self.datasets.draw(rng(self._seed, t, lane))

    def read(self, t: int, numbers: list[int]) -> Batch:
        """The clips `numbers` to train on, as batch t."""
        clips = self._train[numbers]
        features = np.zeros((len(clips), FRAMES, self.dim), np.float16)
        list(self._readers.map(self._read_into, features, clips))
        return Batch(t, features, self._mos[clips], [self._ids[i] for i in clips], self.datasets.of[numbers])

    def validation_numbers(self, rank: int, world: int) -> list[int]:
        """A worker's share of the clips to validate on."""
        return [int(number) for number in self._validation[rank::world]]

    def clip(self, number: int) -> FeatureClip:
        """One of the clips to validate on."""
        features = np.zeros((FRAMES, self.dim), np.float16)
        self._read_into(features, number)
        return FeatureClip(self._names[number], float(self._mos[number]), features)

    def _read_into(self, features: np.ndarray, clip: int) -> None:
        path = self._paths[self._file[clip]]
        try:
            with table.open_parquet(path, _AHEAD_BYTES) as file:
                reader = pq.ParquetFile(file, metadata=_metadata(path))
                data = reader.read_row_group(int(self._in_file[clip]), ["hidden"])["hidden"][0].as_buffer()
        except (FileNotFoundError, pa.ArrowException) as error:
            reason = f"{path} was lost or damaged since it was computed: {error}"
            raise TableError(reason, "delete it and rerun the command, which computes it again") from error
        hidden = np.frombuffer(data, "<f2").reshape(-1, self.dim)
        features[: len(hidden)] = hidden


def _about(path: str) -> pa.Table:
    with table.open_parquet(path) as file:
        return pq.read_table(file, columns=_ABOUT)


@lru_cache(maxsize=4096)
def _metadata(path: str) -> pq.FileMetaData:
    """A file's footer: for each clip it would be read again."""
    with table.open_parquet(path) as file:
        return pq.read_metadata(file)
