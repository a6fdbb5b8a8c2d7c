"""Rooms: reverberation by measured impulse responses, or by simulated ones if the manifest has none.

Responses begin with their direct path, so the reverberant wave stays aligned with the dry one. The level (RMS) stays
the same.
"""

from dataclasses import dataclass

import numpy as np
from scipy.signal import butter, fftconvolve, sosfilt

from speechdistill.data.degradation import Component, Scene
from speechdistill.io import audio, file_cache
from speechdistill.io.errors import AudioError

MAX_RESPONSE_S = 4.0  # beyond this, a recording is noise after the decay
_SILENT_PEAK = 1e-6  # -120 dB re full scale, below the resolution of 16 bits
_SMALLEST_M, _LARGEST_M = (3.0, 3.0, 2.5), (10.0, 8.0, 4.0)
_RT60_S = (0.2, 0.8)
_MARGIN_M = 0.5  # distance from the walls, and between talker and microphone
_SPEED_M_S = 343.0
# 2,625 images: every reflection until 38 ms or more after the direct path. Rooms of this size sound diffuse
# before that (mixing time by Lindau, Kosanke and Weinzierl, J. Audio Eng. Soc. 60, 2012).
_IMAGE_ORDER = 12
_SPLICE = audio.SAMPLE_RATE // 50


@dataclass(frozen=True)
class MeasuredRoom:
    """Convolution with channel `channel` of a recorded impulse response.

    Channels are not averaged, since that makes comb filter notches. At most `MAX_RESPONSE_S` are read. The direct path
    is the largest sample; scale and polarity of the response have no effect. `apply` raises `AudioError` for a silent
    or unusable file.
    """

    clip_id: str
    uri: str
    channel: int = 0

    def apply(self, wave: np.ndarray) -> np.ndarray:
        return _reverberated(wave, _measured(self.uri, self.channel))

    def clip_ids(self) -> tuple[str, ...]:
        return (self.clip_id,)


@dataclass(frozen=True)
class SimulatedRoom:
    """A shoebox room: reflections by the image method, followed by a diffuse tail.

    Positions are in metres from one corner. `seed` determines the noise of the tail.
    """

    size_m: tuple[float, float, float]
    rt60_s: float
    source_m: tuple[float, float, float]
    microphone_m: tuple[float, float, float]
    seed: int

    def apply(self, wave: np.ndarray) -> np.ndarray:
        return _reverberated(wave, self.response())

    def response(self) -> np.ndarray:
        """Return the impulse response at 16 kHz from the direct path (about 1) to 60 dB of decay; shape (n,)."""
        return _with_tail(_reflections(self), self._complete_samples(), self.rt60_s, self.seed)

    def _complete_samples(self) -> int:
        """Return the number of samples after the direct path for which the images are complete.

        Images up to order n fill an octahedron of rooms; the limit is the sphere inscribed in it, less one room per
        axis.
        """
        direct_m = np.linalg.norm(np.subtract(self.source_m, self.microphone_m))
        sphere_m = (_IMAGE_ORDER - 2) / np.linalg.norm(1 / np.array(self.size_m))
        return max(_SPLICE, int((sphere_m - direct_m) / _SPEED_M_S * audio.SAMPLE_RATE))

    def clip_ids(self) -> tuple[str, ...]:
        return ()


def _draw_room(rng: np.random.Generator, scene: Scene) -> MeasuredRoom | SimulatedRoom:
    """Draw a measured room, uniformly, if the manifest has impulse responses; otherwise a simulated one.

    Simulated: a home or office of 3..10 m by 3..8 m by 2.5..4 m, RT60 of 0.2..0.8 s (furnished to bare), talker and
    microphone at least 0.5 m from the walls and from each other, all uniform.
    """
    responses = scene.clips.rir
    if len(responses):
        clip = responses[int(rng.integers(len(responses)))]
        return MeasuredRoom(clip.clip_id, clip.uri)
    size = rng.uniform(_SMALLEST_M, _LARGEST_M)
    rt60_s = float(rng.uniform(*_RT60_S))
    source = rng.uniform(_MARGIN_M, size - _MARGIN_M)
    microphone = rng.uniform(_MARGIN_M, size - _MARGIN_M)
    while np.linalg.norm(source - microphone) < _MARGIN_M:
        microphone = rng.uniform(_MARGIN_M, size - _MARGIN_M)
    return SimulatedRoom(_xyz(size), rt60_s, _xyz(source), _xyz(microphone), int(rng.integers(2**32)))


def _xyz(metres: np.ndarray) -> tuple[float, float, float]:
    x, y, z = metres.tolist()
    return x, y, z


def _reverberated(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Reverberate `wave`; float32, shape (num_samples,), length and RMS stay the same."""
    wet = fftconvolve(wave, response[: len(wave)].astype(np.float32))[: len(wave)]
    dry_energy, wet_energy = (float(np.einsum("i,i->", x, x, dtype=np.float64)) for x in (wave, wet))
    gain = np.sqrt(dry_energy / wet_energy) if wet_energy > 0 else 0.0
    return np.asarray(wet * gain, dtype=np.float32)


def _measured(uri: str, channel: int) -> np.ndarray:
    """Read a response from its direct path on, which is scaled to 1."""

    def beginning(uri: str) -> np.ndarray:
        num_samples = min(audio.probe(uri).num_samples, round(MAX_RESPONSE_S * audio.SAMPLE_RATE))
        return audio.load(uri, 0, max(1, num_samples), channel=channel)

    response = file_cache.read(uri, beginning).astype(np.float64)
    direct = int(np.argmax(np.abs(response)))
    if abs(response[direct]) < _SILENT_PEAK:
        reason = f"channel {channel} is silent in its first {len(response) / audio.SAMPLE_RATE:.2f} s"
        raise AudioError(uri, reason, "it is not an impulse response: leave it out")
    return np.asarray(response[direct:] / response[direct])


def _reflections(step: SimulatedRoom) -> np.ndarray:
    """Compute the image-source response (Allen and Berkley 1979) from the direct path (about 1)."""
    import pyroomacoustics as pra
    from pyroomacoustics import libroom

    absorption = pra.Material(_absorption(step.size_m, step.rt60_s))
    box = pra.ShoeBox(step.size_m, audio.SAMPLE_RATE, materials=absorption, max_order=_IMAGE_ORDER)
    box.add_source(step.source_m).add_microphone(step.microphone_m).image_source_model()
    source = box.sources[0]
    path_m = np.linalg.norm(source.images - np.array(step.microphone_m)[:, None], axis=0)
    # Not by `compute_rir`, which starts a thread per core and sums in an order that depends on their number, so that
    # bits differ between machines. Here the direct path also falls exactly on a sample.
    taps, lead = 81, 41  # length of the fractional delay filters, samples before the direct path
    arrival_s = (path_m - path_m.min()) / _SPEED_M_S + lead / audio.SAMPLE_RATE
    response = np.zeros(int(arrival_s.max() * audio.SAMPLE_RATE) + taps)
    gains = source.damping[0] * path_m.min() / path_m
    libroom.rir_builder(response, arrival_s, gains, audio.SAMPLE_RATE, taps, 20, 1)
    # All images are positive and sum to an offset that real rooms lack; Allen and Berkley filter it too.
    highpass = butter(2, 20.0, "highpass", fs=audio.SAMPLE_RATE, output="sos")
    return np.asarray(sosfilt(highpass, response[lead:]))


def _absorption(size_m: tuple[float, float, float], rt60_s: float) -> float:
    """Return the energy absorption of the walls by Eyring (J. Acoust. Soc. Am. 1, 1930).

    It is below 1 for every RT60, unlike Sabine's formula in large dry rooms.
    """
    x, y, z = size_m
    volume, surface = x * y * z, 2 * (x * y + y * z + z * x)
    return float(1 - np.exp(-0.161 * volume / (surface * rt60_s)))


def _with_tail(early: np.ndarray, complete: int, rt60_s: float, seed: int) -> np.ndarray:
    """Return `early` up to sample `complete`, then exponentially decaying noise (Polack 1988).

    Joined as by Lehmann and Johansson (2010). Images alone would need an order above 100 for 0.8 s.
    """
    length = round(rt60_s * audio.SAMPLE_RATE)
    first = complete - _SPLICE
    if length <= complete:
        return early[:complete]
    level = np.sqrt(np.mean(early[first:complete] ** 2))  # the level half a splice after `first`
    time_s = (np.arange(length - first) - _SPLICE / 2) / audio.SAMPLE_RATE
    tail = np.random.default_rng(seed).standard_normal(len(time_s)) * level * 10 ** (-3 * time_s / rt60_s)
    fade = np.linspace(0, np.pi / 2, _SPLICE)  # equal-power, since the parts are incoherent
    tail[:_SPLICE] = tail[:_SPLICE] * np.sin(fade) + early[first:complete] * np.cos(fade)
    return np.concatenate([early[:first], tail])


room = Component(_draw_room, (MeasuredRoom, SimulatedRoom))
