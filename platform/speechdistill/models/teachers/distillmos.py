"""Distill-MOS v7, the released student, as a teacher: 4.1 M parameters, MOS of speech at 16 kHz.

The weights come from the `distillmos` wheel (MIT), which is not imported: it needs torchaudio for its command
line only. Scores equal that package's, with memory that does not grow with the length of the audio.
"""

from speechdistill.io import weights_file
from speechdistill.models.networks.conv_transformer import ConvTransformer
from speechdistill.models.student_scorer import Scorer
from speechdistill.models.windowed import HOP_S

_MISSING = "no such weights file", "`pip install --no-deps distillmos==0.9.1` brings it, or give its path"


class Teacher(Scorer):
    """The released model; its options are those of `Scorer`.

    `weights` is the path or URL of a file like the released one (default: from the installed wheel). Raises
    `WeightsError` if there are no weights and `UserError` for a wrong file, device, dtype, batch or hop.
    """

    def __init__(
        self,
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = HOP_S,
    ) -> None:
        path = weights or _released_weights()
        data, digest = weights_file.read(path, *_MISSING)
        super().__init__(_network(data, path), "distillmos", digest, device, dtype, batch_s, hop_s)


def _released_weights() -> str:
    return weights_file.of_package("distillmos", "weights/distill_mos_v7.pt")


def _network(data: bytes, path: str) -> ConvTransformer:
    network = ConvTransformer()
    with weights_file.fitting(path, "Distill-MOS v7 weights"):
        network.load_state_dict(weights_file.state(data, "model"))
    return network.eval()
