"""Distill-MOS v7, the released student, as a teacher: MOS of speech at 16 kHz, 4.1 M parameters.

The weights come from the `distillmos` wheel (MIT), which is not imported: it needs torchaudio for its command
line only. Scores equal that package's, with memory that does not grow with the length of the audio.
"""

from speechdistill.io import weights_file
from speechdistill.models import student_scorer
from speechdistill.models.networks.conv_transformer import ConvTransformer
from speechdistill.models.options import TeacherOptions
from speechdistill.models.windowed import WindowScorer

_MISSING = "no such weights file", "`pip install --no-deps distillmos==0.9.1` brings it, or give its path"
_DEFAULTS = TeacherOptions()


def load(options: TeacherOptions = _DEFAULTS) -> WindowScorer:
    """Load the released model, or a file like it: the path or URL in `weights` (default: from the installed wheel).

    Raises `WeightsError` if there are no weights and `UserError` for a wrong file, device or hop.
    """
    options.only("distillmos")
    path = options.weights or _released_weights()
    data, digest = weights_file.read(path, *_MISSING)
    return student_scorer.scorer(_network(data, path), "distillmos", digest, options)


def _released_weights() -> str:
    return weights_file.of_package("distillmos", "weights/distill_mos_v7.pt")


def _network(data: bytes, path: str) -> ConvTransformer:
    network = ConvTransformer()
    with weights_file.fitting(path, "Distill-MOS v7 weights"):
        network.load_state_dict(weights_file.state(data, "model"))
    return network.eval()
