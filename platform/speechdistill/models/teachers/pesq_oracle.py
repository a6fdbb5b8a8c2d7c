"""PESQ wideband (ITU-T P.862.2) of a degraded wave against its clean original, by the library `pesq` (MIT).

An oracle: only the labelling job, which degrades clean speech, has the original.
"""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.io.errors import LibraryError, UserError
from speechdistill.models.label import Label, Unscorable, logits, problem
from speechdistill.models.options import TeacherOptions

LONGEST_S = 20.0
"""The library has room for 50 utterances, each of 0.2 s or more and 0.2 s apart; it crashes on more."""

_SHORTEST_S = 0.25
_DEFAULTS = TeacherOptions()
_MISSING = "teacher pesq_oracle lacks the library pesq", "`pip install pesq==0.0.4` (MIT) builds it with a C compiler"
_NO_CLEAN = "teacher pesq_oracle compares with clean speech; give each wave's reference"


def load(options: TeacherOptions = _DEFAULTS) -> "PesqOracle":
    """Load the library; options for networks are ignored.

    Raises `LibraryError` if the library is missing, and `UserError` for weights.
    """
    options.only(PesqOracle.name)
    if options.weights:
        raise UserError(f"teacher {PesqOracle.name!r} has no weights", f"leave {options.weights} out")
    return PesqOracle()


class PesqOracle:
    """A teacher whose score is P.862.2's MOS-LQO, unchanged: 4.64 for a copy, above 1 for the worst; no listener's MOS.

    `weights_hash` is that of the library's version.
    """

    name = "pesq_oracle"
    intrusive = True

    def __init__(self) -> None:
        try:
            import pesq
        except ImportError as error:
            raise LibraryError(*_MISSING) from error
        self._pesq = pesq
        self.weights_hash = hashlib.sha256(f"pesq {version('pesq')} wb".encode()).hexdigest()

    def label(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
    ) -> list[Label | Unscorable]:
        """Return one result per wave and reference, both mono float32 at 16 kHz; `ValueError` without references."""
        if references is None:
            raise ValueError(_NO_CLEAN)
        return [self._one(wave, reference) for wave, reference in zip(waves, references, strict=True)]

    def timeline(self, wave: np.ndarray) -> list[tuple[float, float | None]]:
        """Raise `ValueError`: there is no reference."""
        raise ValueError(_NO_CLEAN)

    def parameters(self) -> None:
        """Return None: there is no network."""

    def _one(self, wave: np.ndarray, reference: np.ndarray) -> Label | Unscorable:
        if why := problem(wave):
            return why
        if why := problem(reference):
            return Unscorable(f"clean original: {why}")
        shortest, longest = sorted((len(wave) / SAMPLE_RATE, len(reference) / SAMPLE_RATE))
        if not _SHORTEST_S <= shortest <= longest <= LONGEST_S:
            return Unscorable(f"{longest:.3f} s; PESQ takes {_SHORTEST_S} to {LONGEST_S:g} s")
        try:
            score = self._pesq.pesq(SAMPLE_RATE, reference, wave, "wb")
        except self._pesq.NoUtterancesError:
            return Unscorable("PESQ finds no utterance")
        return Label.from_logits(logits(np.array([score])))
