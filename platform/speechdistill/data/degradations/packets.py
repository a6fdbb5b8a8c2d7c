"""Speech over a network that loses packets, coded by Opus as in calls. Length and alignment stay the same."""

from dataclasses import dataclass

import numpy as np

from speechdistill.data import libopus
from speechdistill.data.degradation import Component, Scene
from speechdistill.io import audio

_LOSS = (0.01, 0.2)
_MEAN_BURST = (2.0, 6.0)  # packets
_BITRATES_BPS = (16_000, 32_000)  # below these, libopus leaves out the repair data


@dataclass(frozen=True)
class OpusLoss:
    """Opus in 20 ms packets, of which a share `loss` is lost and concealed by the decoder.

    Lost packets come in bursts of `mean_burst` packets on average (Gilbert's model: Gilbert-Elliott with a bad state
    that loses every packet). With a burst of `1 / (1 - loss)` losses are independent. With `fec` each packet repeats
    the previous one at a lower rate, which repairs a single loss. `seed` determines the lost packets. A wave above full
    scale is scaled down for coding and scaled back.
    """

    bitrate_bps: int
    loss: float
    mean_burst: float
    fec: bool
    seed: int
    complexity: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.loss < 1 or self.mean_burst < max(1.0, self.loss / (1 - self.loss)):
            raise ValueError(f"{self}: no such losses; give a mean_burst of at least 1 and loss / (1 - loss)")

    def apply(self, wave: np.ndarray) -> np.ndarray:
        scale = np.float32(max(1.0, np.abs(wave).max(initial=0.0)))
        packets, lookahead = self.encode(wave / scale)
        decoded = libopus.decoded(packets, self.arrives(len(packets)), self.fec)
        return audio.fit(decoded[lookahead:], len(wave)) * scale

    def arrives(self, num_packets: int) -> np.ndarray:
        """Return a mask of the packets that arrive, shape (num_packets,)."""
        draws = np.random.default_rng(self.seed).random(num_packets + 1)
        recovers = 1 / self.mean_burst
        fails = self.loss * recovers / (1 - self.loss)
        good = np.empty(num_packets, bool)
        state = draws[-1] >= self.loss
        for i in range(num_packets):
            good[i] = state
            state = draws[i] >= fails if state else draws[i] < recovers
        return good

    def encode(self, wave: np.ndarray) -> tuple[list[bytes], int]:
        """Return the packets of a wave within full scale, and the delay of the decoded wave in samples."""
        return libopus.encoded(wave, self.bitrate_bps, self.complexity, self.fec, self.loss)

    def clip_ids(self) -> tuple[str, ...]:
        return ()


def _draw_opus_loss(rng: np.random.Generator, scene: Scene) -> OpusLoss:
    """Draw a loss of 1 to 20% and 16 to 32 kb/s, both log-uniform.

    With equal probability losses are independent or in bursts of 2 to 6 packets on average; likewise with or without
    FEC.
    """
    loss = float(np.exp(rng.uniform(*np.log(_LOSS))))
    burst = float(rng.uniform(*_MEAN_BURST)) if rng.random() < 0.5 else 1 / (1 - loss)
    bitrate = round(float(np.exp(rng.uniform(*np.log(_BITRATES_BPS)))))
    return OpusLoss(bitrate, loss, burst, bool(rng.random() < 0.5), int(rng.integers(1 << 32)))


opus_loss = Component(_draw_opus_loss, OpusLoss)
