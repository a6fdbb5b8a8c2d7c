"""A folder with `labels.csv`: the plain layout for your own scores, and for corpora that are not public.

Columns are `wav_path` (relative to the list) and `score` (1 to 5), and optionally `system_id`, `input_id`, `dataset`,
`split` (train, validation or test; `data/listed.py` has other spellings) and further columns of `clip.v1`, such as
`votes` or `language`.
"""

from collections.abc import Iterator

from speechdistill.data import corpus
from speechdistill.data.listed import Row

_RENAMED = {"score": "mos", "system_id": "system"}


def rows(root: str) -> Iterator[Row]:
    """Yield a row per line; `root` is the folder, or the CSV itself under any name."""
    is_file = root.lower().endswith((".csv", ".tsv"))
    file = root if is_file else f"{root}/labels.csv"
    for line in corpus.read(file, ["wav_path", "score"]):
        uri = corpus.under(file.rsplit("/", 1)[0], corpus.path_of(file, line, "wav_path"))
        renamed = {_RENAMED[key]: value for key, value in line.values.items() if key in _RENAMED}
        yield {"mos": None, **corpus.described(file, line, uri, {**line.values, **renamed})}


READERS = {"csv": corpus.Reader(rows)}
