"""A trained network in MLflow's serving (models from code): MLflow stores this file and part of the package in a model.

Only MLflow imports this file. A row of the input is a recording: `audio`, the bytes of a file (base64 in JSON), or
`waveform`, samples in [-1, 1], with their `sample_rate` in Hz. A row of the output has the `mos`, 1 to 5, or an `error`
with the reason: one bad recording does not lose the others of a request.
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
from speechdistill.models import architectures
from speechdistill.models.model import Model
from speechdistill.models.options import TeacherOptions


class QualityModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Scores as `speechdistill score` does: long recordings by their 7.68 s windows, at most 1 s apart."""

    def load_context(self, context: Any) -> None:
        # load_model(uri, model_config={"encoder": FOLDER}), or MLFLOW_PYFUNC_INFERENCE_CONFIG of a server
        encoder = (context.model_config or {}).get("encoder") or None
        options = TeacherOptions(weights=encoder)
        self._score = Model(architectures.scorer(context.artifacts["student"], options))

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """Return a row (mos, error) for each row (audio, waveform, sample_rate); faults of the audio are not raised."""
        rows = [self._row(row) for row in model_input.to_dict("records")]
        # Objects keep None: MLflow would write NaN, which is not JSON.
        return pd.DataFrame(rows, columns=["mos", "error"], index=model_input.index, dtype=object)

    def _row(self, row: Mapping[str, Any]) -> tuple[float | None, str | None]:
        data, samples = row.get("audio"), row.get("waveform")
        has_data, has_samples = isinstance(data, (bytes, bytearray, str)), isinstance(samples, (list, np.ndarray))
        if has_data == has_samples:
            return None, "give either audio (the bytes of a file, base64 in JSON) or waveform with its sample_rate"
        try:
            wave, rate = (_decoded(data), audio.SAMPLE_RATE) if has_data else (_samples(samples), _rate(row))
            return self._score(wave, rate), None
        except AudioError as error:  # the path is temporary
            return None, f"{error.reason}; {error.fix}"
        except ValueError as error:
            return None, str(error)


def _decoded(data: Any) -> np.ndarray:
    if isinstance(data, str):
        try:
            data = base64.b64decode("".join(data.split()), validate=True)  # `base64` breaks lines
        except ValueError as error:  # binascii's, and the one for characters beyond ASCII
            raise ValueError(f"audio is not base64 ({error}); encode the bytes of a file with base64") from None
    with tempfile.NamedTemporaryFile(prefix="speechdistill-") as file:
        file.write(data)
        file.flush()
        return audio.load(file.name)


def _samples(samples: Any) -> np.ndarray:
    try:
        return np.asarray(samples, np.float64)
    except (TypeError, ValueError):
        raise ValueError("waveform is not a list of numbers; give samples in [-1, 1]") from None


def _rate(row: Mapping[str, Any]) -> int:
    rate = row.get("sample_rate")
    if rate is None or rate != rate:  # NaN if only other records have one
        raise ValueError("waveform without sample_rate; give its sample_rate in Hz")
    try:
        return int(rate)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"sample_rate {rate!r} is not a number; give Hz") from None


mlflow.models.set_model(QualityModel())
