"""Scored submissions to the challenges DNS 2 and 3 (and its full-band track), PLC 2022 and 2024, SIG 2023 and 2024.

These sets and their layout are internal to Microsoft (Distill-MOS, section III-A); the repositories of the challenges
have inputs without scores. So the reader takes a `labels.csv` in the plain layout: `wav_path` (relative to the list),
`score`, `system_id` (the submission), `input_id` (the input signal), and optionally `votes` and `language`.
"""

from collections.abc import Iterator
from functools import partial

from speechdistill.data import corpus
from speechdistill.data.listed import Row

_NEEDED = ["wav_path", "score", "system_id", "input_id"]
_EARLIER = "sig_2023.csv"


def rows(root: str, name: str, split: str | None = None) -> Iterator[Row]:
    """Yield a row per line. Without `split`, splits are made later by holding out systems and inputs."""
    for line in corpus.lines(f"{root}/labels.csv", _NEEDED):
        yield {
            **corpus.given({"votes": line.get("votes"), "language": line.get("language"), "split": split}),
            "uri": corpus.under(root, line["wav_path"]),
            "corpus": name,
            "system": line["system_id"],
            "input_id": line["input_id"],
            "mos": line["score"],
        }


def sig_2024(root: str) -> Iterator[Row]:
    """Yield SIG 2024 without the inputs of SIG 2023, which `sig_2023.csv` lists, a copy of that set's `labels.csv`."""
    earlier = {line["input_id"] for line in corpus.lines(f"{root}/{_EARLIER}", ["input_id"])}
    yield from (row for row in rows(root, "sig_2024", "test") if row["input_id"] not in earlier)


def _trained_on(name: str, train: int, validation: int) -> corpus.Reader:
    return corpus.Reader(partial(rows, name=name), (train, validation, 0), challenge=True)


def _tested_on(name: str, test: int) -> corpus.Reader:
    return corpus.Reader(partial(rows, name=name, split="test"), (0, 0, test))


READERS = {
    "dns_2": _trained_on("dns_2", 8_918, 1_041),
    "dns_3": _tested_on("dns_3", 16_800),
    "dns_3_fb": _tested_on("dns_3_fb", 4_500),  # by the paper's table; its text has 4,200
    "plc_2022": _trained_on("plc_2022", 9_412, 958),
    "plc_2024": _tested_on("plc_2024", 11_010),
    "sig_2023": _trained_on("sig_2023", 5_250, 625),
    "sig_2024": corpus.Reader(sig_2024, (0, 0, 5_100)),
}
