"""NISQA Corpus (Mittag et al., Interspeech 2021): simulated, live, FOR, LiveTalk and P.501.

`NISQA_Corpus.zip` (zenodo.org/record/4728081) unpacks to `NISQA_corpus_file.csv` and a folder per database, such as
`NISQA_TRAIN_SIM/deg/*.wav`. The list has, among others, `db, con, filename_ref, lang, votes, mos, filepath_deg`, the
last relative to the corpus. Confirmed by the authors' evaluation script (gabrielmittag/NISQA, `run_evaluate.py`: file
name, `con`, `filepath_deg`, `mos`) and by lcn-kul/conferencing-speech-2022 (all columns).
"""

from collections.abc import Iterator
from functools import partial

from speechdistill.data import corpus
from speechdistill.data.listed import Row


def rows(root: str, splits: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of the databases that are keys of `splits`. Condition numbers are unique within a database."""
    needed = ["db", "con", "filename_ref", "lang", "votes", "mos", "filepath_deg"]
    for line in corpus.lines(f"{root}/NISQA_corpus_file.csv", needed):
        if line["db"] not in splits:
            continue
        columns = {"system": f"{line['db']}-{line['con']}", "input_id": line["filename_ref"], "language": line["lang"]}
        yield {
            **corpus.given({**columns, "votes": line["votes"]}),
            "uri": corpus.under(root, line["filepath_deg"]),
            "corpus": "nisqa",
            "split": splits[line["db"]],
            "mos": line["mos"],
        }


def _reader(splits: dict[str, str], *paper: int) -> corpus.Reader:
    train, validation, test = paper
    return corpus.Reader(partial(rows, splits=splits), (train, validation, test))


READERS = {
    "nisqa_sim": _reader({"NISQA_TRAIN_SIM": "train", "NISQA_VAL_SIM": "validation"}, 10_000, 2_500, 0),
    "nisqa_live": _reader({"NISQA_TRAIN_LIVE": "train", "NISQA_VAL_LIVE": "validation"}, 1_020, 200, 0),
    "nisqa_for": _reader({"NISQA_TEST_FOR": "test"}, 0, 0, 240),
    "nisqa_livetalk": _reader({"NISQA_TEST_LIVETALK": "test"}, 0, 0, 232),
    "nisqa_p501": _reader({"NISQA_TEST_P501": "test"}, 0, 0, 240),
}
