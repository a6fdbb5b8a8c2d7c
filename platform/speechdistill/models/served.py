"""A trained network as MLflow serves it (models from code): MLflow copies this file and a part of the package into it.

Imported by MLflow alone. A row of the input is a recording: `audio`, the bytes of a file (base64 in JSON), or
`waveform`, its samples in [-1, 1], with their `sample_rate` in Hz. A row of the output has its `mos`, 1 to 5, or the
`error` that says why it has none: one bad recording does not lose the others of a request.
"""

import base64
import tempfile
from collections.abc import Mapping
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from speechdistill.io import audio
from speechdistill.io.errors import AudioError
from speechdistill.models import trained
from speechdistill.models.load import Model


class QualityModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Scores as `speechdistill score` does: long recordings by their 7.68 s windows, at most 1 s apart."""

    def load_context(self, context: Any) -> None:
        # load_model(uri, model_config={"encoder": FOLDER}), or MLFLOW_PYFUNC_INFERENCE_CONFIG of a server
        encoder = (context.model_config or {}).get("encoder") or None
        self._score = Model(trained.scorer(context.artifacts["student"], encoder))

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """A row (mos, error) for each row (audio, waveform, sample_rate); raises only what is not the audio's fault."""
        rows = [self._row(row) for row in model_input.to_dict("records")]
        # Objects, since what lacks is None: MLflow would write NaN, which is no JSON.
        return pd.DataFrame(rows, columns=["mos", "error"], index=model_input.index, dtype=object)

    def _row(self, row: Mapping[str, Any]) -> tuple[float | None, str | None]:
        data, samples = row.get("audio"), row.get("waveform")
        has_data, has_samples = isinstance(data, (bytes, bytearray, str)), isinstance(samples, (list, np.ndarray))
        if has_data == has_samples:
            return None, "give either audio (the bytes of a file, base64 in JSON) or waveform with its sample_rate"
        try:
            wave, rate = (_decoded(data), audio.SAMPLE_RATE) if has_data else (_samples(samples), _rate(row))
            return self._score(wave, rate), None
        except AudioError as error:  # its path is a temporary one
            return None, f"{error.reason}; {error.fix}"
        except ValueError as error:
            return None, str(error)


def _decoded(data: Any) -> np.ndarray:
    if isinstance(data, str):
        try:
            data = base64.b64decode("".join(data.split()), validate=True)  # `base64` breaks lines
        except ValueError as error:  # binascii's, and the one for characters beyond ASCII
            raise ValueError(f"audio is no base64 ({error}); encode the bytes of a file with base64") from None
    with tempfile.NamedTemporaryFile(prefix="speechdistill-") as file:
        file.write(data)
        file.flush()
        return audio.load(file.name)


def _samples(samples: Any) -> np.ndarray:
    try:
        return np.asarray(samples, np.float64)
    except (TypeError, ValueError):
        raise ValueError("waveform is no list of numbers; give its samples in [-1, 1]") from None


def _rate(row: Mapping[str, Any]) -> int:
    rate = row.get("sample_rate")
    if rate is None or rate != rate:  # NaN where only other records have one
        raise ValueError("waveform without sample_rate; give its sample_rate in Hz")
    try:
        return int(rate)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"sample_rate {rate!r} is no number; give it in Hz") from None


mlflow.models.set_model(QualityModel())
