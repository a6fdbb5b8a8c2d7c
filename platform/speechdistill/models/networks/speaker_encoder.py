"""Embeddings of speakers ("d-vectors", Wan et al. 2018): an LSTM over mel spectra, with the weights of `resemblyzer`.

The wheel `resemblyzer` 0.1.4 (Apache-2.0) is not imported: it needs librosa and webrtcvad. Without its trimming of
silence, embeddings are equal to its own.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechdistill.io import weights_file
from speechdistill.io.audio import SAMPLE_RATE

DIM = 256
"""Size of an embedding, which is a unit vector of components of at least 0."""

_MELS, _LAYERS = 40, 3
_WINDOW, _HOP = 400, 160  # samples: 25 ms and 10 ms
_FRAMES, _STEP = 160, 77  # of a window that is embedded: 1.6 s, 1.3 windows a second
_COVERED = 0.75  # of the last window, or it is left out
_LEVEL_DBFS = -30.0  # quieter waves are raised to it, louder ones are not lowered
_FILE = "pretrained.pt"
_MISSING = "no such weights file", "`pip install --no-deps resemblyzer==0.1.4` (16 MB, Apache-2.0) brings it"


class SpeakerEncoder(nn.Module):
    """Mel spectra (batch, frames, 40) to embeddings (batch, 256) of unit length."""

    filters: Tensor
    window: Tensor

    def __init__(self) -> None:
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        self.lstm = nn.LSTM(_MELS, DIM, _LAYERS, batch_first=True)
        self.linear = nn.Linear(DIM, DIM)
        sizes = (_WINDOW // 2 + 1, _MELS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE)
        filters = torch.from_numpy(mel_filter_bank(*sizes, norm="slaney", mel_scale="slaney")).float()
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(_WINDOW), persistent=False)

    def forward(self, mels: Tensor) -> Tensor:
        last = self.lstm(mels)[1][0][-1]
        return F.normalize(torch.relu(self.linear(last)))

    def mels(self, wave: Tensor) -> Tensor:
        """Power mel spectra, (frames, 40), of a wave (num_samples,), one for each hop."""
        spectra = torch.stft(
            wave, _WINDOW, _HOP, window=self.window, center=True, pad_mode="constant", return_complex=True
        )
        return spectra.abs().square().T @ self.filters

    @torch.inference_mode()
    def embed(self, waves: Sequence[np.ndarray]) -> np.ndarray:
        """One embedding for each wave, (waves, 256) float32; waves are mono float32 at 16 kHz of any lengths.

        It is the mean of windows of 1.6 s, of unit length again. A digitally silent wave gives zeros or one direction
        for all: leave it out.
        """
        return np.stack([self._embedded(raised(wave)) for wave in waves])

    def _embedded(self, wave: np.ndarray) -> np.ndarray:
        starts = window_starts(len(wave))
        padded = np.pad(wave, (0, max(0, (starts[-1] + _FRAMES) * _HOP - len(wave))))
        mels = self.mels(torch.from_numpy(padded).to(self.window.device))
        windows = torch.stack([mels[start : start + _FRAMES] for start in starts])
        return np.asarray(F.normalize(self(windows).mean(0), dim=0).cpu().numpy())


def load(path: str | None = None) -> tuple[SpeakerEncoder, str]:
    """The encoder with the weights of a file, by default of the installed wheel; and their sha256.

    Raises `WeightsError` if the file is missing and `UserError` if it holds another network.
    """
    from io import BytesIO

    path = path or weights_file.of_package("resemblyzer", _FILE)
    data, digest = weights_file.read(path, *_MISSING)
    encoder = SpeakerEncoder()
    with weights_file.fitting(path, "the weights of a speaker encoder"):
        state = torch.load(BytesIO(data), weights_only=True, map_location="cpu")["model_state"]
        # Two more scalars belong to the loss that trained it.
        encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    return encoder.eval(), digest


def window_starts(num_samples: int) -> list[int]:
    """First frames of the windows over a wave; a last one that the wave covers to less than 75% is left out."""
    frames = num_samples // _HOP + 1
    starts = list(range(0, max(1, frames - _FRAMES + _STEP + 1), _STEP))
    covered = (num_samples - starts[-1] * _HOP) / (_FRAMES * _HOP)
    return starts[:-1] if covered < _COVERED and len(starts) > 1 else starts


def raised(wave: np.ndarray) -> np.ndarray:
    """Scaled up to -30 dBFS RMS, if it is quieter and not silent."""
    rms = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) if len(wave) else 0.0
    gain = 10 ** (_LEVEL_DBFS / 20) / rms if rms else 1.0
    return (wave * np.float32(max(1.0, gain))).astype(np.float32)
