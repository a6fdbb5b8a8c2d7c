"""Corpora that listeners scored, by their command-line names."""

from typing import Literal

from speechdistill.data import corpus
from speechdistill.data.corpora import (
    blizzard2023,
    challenges,
    conferencing_speech,
    genspeech,
    nisqa,
    scored_csv,
    tcd_voip,
    voicemos,
)
from speechdistill.data.listed import Row
from speechdistill.io.errors import TableError

CorpusName = Literal[
    "blizzard2023_sa",
    "blizzard2023_tts",
    "csv",
    "dns_2",
    "dns_3",
    "dns_3_fb",
    "genspeech",
    "nisqa_for",
    "nisqa_live",
    "nisqa_livetalk",
    "nisqa_p501",
    "nisqa_sim",
    "plc_2022",
    "plc_2024",
    "pstn",
    "sig_2023",
    "sig_2024",
    "tcd_voip",
    "tencent",
    "tub",
    "voicemos2022_cn",
    "voicemos2022_en",
]
READERS: dict[str, corpus.Reader] = {
    **blizzard2023.READERS,
    **challenges.READERS,
    **conferencing_speech.READERS,
    **genspeech.READERS,
    **nisqa.READERS,
    **scored_csv.READERS,
    **tcd_voip.READERS,
    **voicemos.READERS,
}


def rows(name: str, root: str, held_out: corpus.HeldOut = "both") -> list[Row]:
    """Return the checked rows of a corpus in folder `root`; raises `TableError` for faults and unknown names."""
    if name not in READERS:
        raise TableError(f"corpus {name!r} is unknown", f"choose from {', '.join(sorted(READERS))}")
    return corpus.checked(name, READERS[name], root, held_out)
