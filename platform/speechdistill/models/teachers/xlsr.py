"""XLS-R 2B up to its tenth block, with the original head of Distill-MOS' teacher: 477.4 M parameters.

The encoder (Apache 2.0) is a folder in the format of transformers or a model of the hub, the head a file of the
`xls-r-sqa` wheel (MIT), which is not imported: it needs torchaudio and librosa.
"""

import hashlib

from speechdistill.io import weights_file
from speechdistill.models import encoder_scorer
from speechdistill.models.encoder_scorer import HEAD, Network
from speechdistill.models.networks import speech_encoder
from speechdistill.models.networks.conv_transformer import QualityHead
from speechdistill.models.networks.speech_encoder import XLSR_2B
from speechdistill.models.options import TeacherOptions
from speechdistill.models.windowed import WindowScorer

LAYER = 10
"""Block whose output feeds the original head."""

_DEFAULTS = TeacherOptions()
_NO_HEAD = "no such head", "`pip install --no-deps xls-r-sqa==0.1.0` (15 MB, MIT) brings it, or give its path"


def load(options: TeacherOptions = _DEFAULTS, layer: int = LAYER) -> WindowScorer:
    """Load the original XLS-R-SQA, scored as by `encoder_scorer.scorer`.

    `weights` is the encoder's folder, or hf://OWNER/NAME to download (default: XLS-R 2B in the hub's cache), `head` the
    head's file (default: from the installed wheel), `layer` the hidden state that feeds the head; later blocks are not
    read. Raises `WeightsError` if weights are missing, and `UserError` for wrong weights or options.
    """
    options.only("xlsr", "head", "compile")
    options.hop()  # refuses a wrong one before the large file is read
    head, head_digest = _head(options.head or _released_head())
    # By default nothing is downloaded: 8.7 GB.
    place = options.weights or str(speech_encoder.located(XLSR_2B, only_here=True))
    encoder, digest = speech_encoder.load(place, layer)
    both = hashlib.sha256(f"{head_digest}{digest}".encode()).hexdigest()
    return encoder_scorer.scorer(Network(encoder, head), "xlsr", both, options=options)


def _released_head() -> str:
    # Version 2: by the wheel's own account, the files of version 1 are the wrong checkpoint.
    return weights_file.of_package("xls_r_sqa", "models/sqa-v2/xls-r-2b/model_2b_lay10_full.pt")


def _head(path: str) -> tuple[QualityHead, str]:
    """Return the head in a file, and the file's sha256."""
    data, digest = weights_file.read(path, *_NO_HEAD)
    with weights_file.fitting(path, "a head of XLS-R"):
        state = weights_file.state(data)
        head = QualityHead(len(state["norm_input.weight"]), *HEAD)
        head.load_state_dict(state)
    return head.eval(), digest
