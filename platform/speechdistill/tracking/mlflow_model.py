"""A student as an MLflow model: its two files, the code that loads it, its signature."""

import tempfile
from typing import Any

from speechdistill.io import checkpoint
from speechdistill.tracking import model_code

MODEL = "student"
"""Name of a run's logged model, and of the folder of its two files among the model's artifacts."""


def save_model(folder: str, path: str, **identity: Any) -> None:
    """Write the student in a checkpoint's folder as an MLflow model to the local folder `path`.

    `identity` goes to `mlflow.models.Model`: run_id, model_id, metadata.
    """
    import numpy as np
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, DataType, Schema

    # `served.py` checks each record: MLflow would refuse a whole batch because of one record.
    inputs = [ColSpec(AnyType(), name, required=False) for name in ("audio", "waveform", "sample_rate")]
    outputs = [ColSpec(DataType.double, "mos", required=False), ColSpec(DataType.string, "error", required=False)]
    tone = np.round(0.1 * np.sin(np.arange(2_000) / 4), 4)
    with tempfile.TemporaryDirectory(prefix="speechdistill-") as staged:
        checkpoint.copy(folder, f"{staged}/{MODEL}")
        has_encoder = checkpoint.read(folder).has_encoder
        requirements = (*model_code.REQUIREMENTS, *(model_code.ENCODER_REQUIREMENTS if has_encoder else ()))
        pyfunc.save_model(
            path,
            python_model=str(model_code.ENTRY),
            code_paths=[model_code.stage(staged, has_encoder)],
            artifacts={MODEL: f"{staged}/{MODEL}"},
            pip_requirements=list(requirements),
            signature=ModelSignature(Schema(inputs), Schema(outputs)),
            model_config={"encoder": ""} if has_encoder else None,  # options must be named here to be set later
            input_example=pd.DataFrame({"waveform": [tone.tolist()], "sample_rate": [8_000]}),
            mlflow_model=Model(**identity),
        )
