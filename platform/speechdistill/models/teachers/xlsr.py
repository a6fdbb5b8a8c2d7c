"""XLS-R 2B to its tenth block, and the original head of Distill-MOS' teacher: 477.4 M parameters.

The encoder (Apache 2.0) is a folder in the format of transformers or a model of the hub, the head a file of the
`xls-r-sqa` wheel (MIT), which is not imported: it needs torchaudio and librosa.
"""

import hashlib

from speechdistill.io import weights_file
from speechdistill.models.encoder_scorer import HEAD, EncoderScorer
from speechdistill.models.networks import speech_encoder
from speechdistill.models.networks.conv_transformer import QualityHead
from speechdistill.models.networks.speech_encoder import XLSR_2B
from speechdistill.models.windowed import HOP_S, check

LAYER = 10

_NO_HEAD = "no such head", "`pip install --no-deps xls-r-sqa==0.1.0` (15 MB, MIT) brings it, or give its path"


class Teacher(EncoderScorer):
    """The original XLS-R-SQA; how waves are judged is `EncoderScorer`'s.

    `weights` is the encoder's folder, or hf://OWNER/NAME to download (default: XLS-R 2B in the hub's cache), `head`
    the head's file (default: from the installed wheel), `layer` whose hidden states it wants: no later block is read.
    Raises `WeightsError` if weights are missing, and `UserError` for wrong ones or wrong options.
    """

    def __init__(
        self,
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = HOP_S,
        head: str | None = None,
        layer: int = LAYER,
        compile: bool = False,
    ) -> None:
        check(dtype, batch_s, hop_s)  # before the large file is read
        top, head_digest = _head(head or _released_head())
        # What nobody asked for is not downloaded: 8.7 GB.
        place = weights or str(speech_encoder.located(XLSR_2B, only_here=True))
        encoder, digest = speech_encoder.load(place, layer)
        both = hashlib.sha256(f"{head_digest}{digest}".encode()).hexdigest()
        super().__init__(encoder, top, "xlsr", both, device, dtype, batch_s, hop_s, compile=compile)


def _released_head() -> str:
    # Version 2: the files of the first are the wrong checkpoint, says the wheel.
    return weights_file.of_package("xls_r_sqa", "models/sqa-v2/xls-r-2b/model_2b_lay10_full.pt")


def _head(path: str) -> tuple[QualityHead, str]:
    """The head in a file, and the file's sha256."""
    data, digest = weights_file.read(path, *_NO_HEAD)
    with weights_file.fitting(path, "a head of XLS-R"):
        state = weights_file.state(data)
        head = QualityHead(len(state["norm_input.weight"]), *HEAD)
        head.load_state_dict(state)
    return head.eval(), digest
