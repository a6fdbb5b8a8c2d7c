"""Texts for generated speech: files of sentences, and drawing texts from them."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from speechdistill.io import assets, audio
from speechdistill.io.assets import Asset, Need
from speechdistill.io.errors import UserError

_LANGUAGES = ("en", "de", "fr", "es", "pt")
_CHARACTERS_PER_S = 18  # fast speech (average: 14), so that most texts last as long as the segment

TEXTS = Need(
    "texts",
    "a folder of sentences, one a line in UTF-8, in files en.txt, de.txt, fr.txt, es.txt, pt.txt (or MultiSubs' "
    "monolingual/en.sents.det); of a line with tabs, what follows the last one",
    "MultiSubs, https://doi.org/10.5281/zenodo.5034605, or any other sentences",
    "MultiSubs: Creative Commons, see its page; its sentences are from opensubtitles.org",
    files=tuple(
        pattern.format(lang)
        for lang in _LANGUAGES
        for pattern in ("{}.txt", "{}.sents.det", "monolingual/{}.sents.det")
    ),
)


def drawn_text(rng: np.random.Generator, texts: Asset, language: str, num_samples: int) -> str:
    """Draw sentences that take about `num_samples` at 16 kHz."""
    lines = sentences(texts)[language]
    length = max(1, round(_CHARACTERS_PER_S * num_samples / audio.SAMPLE_RATE))
    text = ""
    for _ in range(1000 + length):
        sentence = lines[int(rng.integers(len(lines)))]
        if any(map(str.isalpha, sentence)):  # otherwise the sentence has nothing to pronounce
            text = f"{text} {sentence}".lstrip()
        if len(text) >= length:
            return text if len(text) <= 2 * length else text[: 2 * length].rpartition(" ")[0] or text[: 2 * length]
    raise UserError(f"{lines.path} has hardly a word in its lines", "give texts with a sentence on each line")


@lru_cache(maxsize=4)
def sentences(texts: Asset) -> dict[str, "Sentences"]:
    """Open the sentences of each language; raises `UserError` if there are none."""
    folder = assets.local(TEXTS, texts)
    files = [path for file in TEXTS.files if (path := folder / file).is_file() and path.stat().st_size]
    if not files:
        raise UserError(f"{texts.source} has no sentences", f"give {TEXTS.what}")
    # The first file of a language wins.
    return {path.name.partition(".")[0]: Sentences(path) for path in reversed(files)}


class Sentences:
    """The lines of a file by number, memory-mapped, since MultiSubs has ten million."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = np.memmap(path, np.uint8, "r")
        block = 1 << 24
        starts = [
            begin + np.flatnonzero(self._bytes[begin : begin + block] == ord("\n"))
            for begin in range(0, len(self._bytes), block)
        ]
        self._ends = np.append(np.concatenate(starts), len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """Return the text after the last tab, without unprintable characters."""
        start = self._ends[index - 1] if index else 0
        line = self._bytes[start : self._ends[index]].tobytes().decode("utf-8", "replace")
        words = line.rpartition("\t")[2].split()
        return "".join(character for character in " ".join(words) if character.isprintable())
