"""Genspeech (Jassim, Skoglund, Chinen and Hines, ICASSP 2021): neural and classical codecs at low rates, MUSHRA scores.

Its public layout could not be confirmed. So the reader takes a `labels.csv` that the user makes: `wav_path` (relative
to the list), `score` (the mean MUSHRA score, 0 to 100), and optionally `system_id` (the codec) and `input_id`.
"""

from collections.abc import Iterator

from speechdistill.data import corpus
from speechdistill.data.listed import Row


def rows(root: str) -> Iterator[Row]:
    """Yield a row per line; MUSHRA scores of 0 to 100 become 1 to 5 (Distill-MOS, section III-B)."""
    for line in corpus.lines(f"{root}/labels.csv", ["wav_path", "score"]):
        columns = {"system": line.get("system_id"), "input_id": line.get("input_id")}
        uri = corpus.under(root, line["wav_path"])
        yield {**corpus.given(columns), "uri": uri, "corpus": "genspeech", "split": "test", "mos": _mos(line["score"])}


def _mos(mushra: str) -> float | str:
    try:
        return 1 + float(mushra) / 25
    except ValueError:
        return mushra  # refused later, with all invalid scores


READERS = {"genspeech": corpus.Reader(rows, (0, 0, 160))}
