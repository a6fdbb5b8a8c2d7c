"""Noise: recordings if the manifest has any, otherwise coloured noise or babble of other clips.

SNR is the active speech level (ITU-T P.56) minus the RMS level of the noise, so pauses in the speech do not count. The
sum may exceed full scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq
from scipy.ndimage import maximum_filter1d
from scipy.signal import lfilter

from speechdistill.data.clips import Clip
from speechdistill.data.degradation import Component, Scene
from speechdistill.io import audio, file_cache

NOMINAL_LEVEL_DB = -26.0
"""Nominal active speech level of telephony in dBov (ITU-T P.830), used for silent speech."""

# ITU-T P.56, method B
_TIME_CONSTANT_S = 0.03
_HANGOVER_S = 0.2
_MARGIN_DB = 15.9
_METER_STEP = audio.SAMPLE_RATE // 1000

_LOWEST_HZ = 20.0
_TALKERS = (3, 6)
_CANDIDATES = 64

Section = tuple[str, str, int, int, int]
"""(clip_id, uri, start, num_samples, offset): samples of a clip from `start`, looped, used from `offset`."""


@dataclass(frozen=True)
class RecordedNoise:
    """Recorded noise: `num_samples` from sample `start` at 16 kHz, looped, used from `offset` samples in.

    A silent section adds nothing. `apply` raises `AudioError` for an unusable file.
    """

    clip_id: str
    uri: str
    start: int
    num_samples: int
    offset: int
    snr_db: float

    def apply(self, wave: np.ndarray) -> np.ndarray:
        def section(uri: str) -> np.ndarray:
            return _read((self.clip_id, uri, self.start, self.num_samples, self.offset), len(wave))

        return _mixed(wave, file_cache.read(self.uri, section), self.snr_db)

    def clip_ids(self) -> tuple[str, ...]:
        return (self.clip_id,)


@dataclass(frozen=True)
class ColouredNoise:
    """Gaussian noise of power spectrum 1/f^`exponent`: 0 white, 1 pink, 2 brown.

    High-passed at 20 Hz, since brown noise has most of its power below, where it is inaudible.
    """

    exponent: float
    seed: int
    snr_db: float

    def apply(self, wave: np.ndarray) -> np.ndarray:
        length = next_fast_len(max(len(wave), audio.SAMPLE_RATE), real=True)
        spectrum = rfft(np.random.default_rng(self.seed).standard_normal(length, np.float32))
        frequency = rfftfreq(length, 1 / audio.SAMPLE_RATE).astype(np.float32)
        first = int(np.searchsorted(frequency, _LOWEST_HZ))
        spectrum[first:] *= frequency[first:] ** np.float32(-self.exponent / 2)
        spectrum[:first] = 0
        return _mixed(wave, irfft(spectrum, length)[: len(wave)], self.snr_db)

    def clip_ids(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Babble:
    """Sum of other talkers at equal active speech levels.

    `talkers` are `Section`s; silent sections add nothing. `apply` raises `AudioError` for an unusable file.
    """

    talkers: tuple[Section, ...]
    snr_db: float

    def apply(self, wave: np.ndarray) -> np.ndarray:
        babble = np.zeros(len(wave))
        for talker in self.talkers:
            speech = _read(talker, len(wave))
            level_db = active_level_db(speech)
            if np.isfinite(level_db):
                babble += speech * 10 ** ((NOMINAL_LEVEL_DB - level_db) / 20)
        return _mixed(wave, babble, self.snr_db)

    def clip_ids(self) -> tuple[str, ...]:
        return tuple(talker[0] for talker in self.talkers)


def _draw_noise(rng: np.random.Generator, scene: Scene) -> RecordedNoise | ColouredNoise | Babble:
    """Draw a recording, uniformly, if the manifest has noise; otherwise coloured noise or babble, 1:1.

    SNR is normal with the scene's mean and sigma. Colour: exponent uniform in 0..2. Babble: 3 to 6 clips of other
    speakers than the scene's (if speakers are known), or coloured noise if there are fewer than three.
    """
    snr_db = float(rng.normal(scene.snr_mean_db, scene.snr_sigma_db))
    recordings = scene.clips.noise
    if len(recordings):
        clip = recordings[int(rng.integers(len(recordings)))]
        return RecordedNoise(*_section(rng, clip, scene.num_samples), snr_db)
    if rng.random() < 0.5 and (talkers := _talkers(rng, scene)):
        return Babble(talkers, snr_db)
    return ColouredNoise(float(rng.uniform(0, 2)), int(rng.integers(2**32)), snr_db)


def active_level_db(wave: np.ndarray) -> float:
    """Return the active speech level of a 16 kHz wave, shape (num_samples,), by ITU-T P.56, method B.

    The unit is dBov: 0 is a square wave at full scale, minus infinity silence. The optional band filter of the
    recommendation is not applied. If no threshold is within the margin (a lone click), return the level of the loudest
    part.
    """
    energy = _energy(wave)
    if energy == 0:
        return -np.inf
    held = _held_envelope(wave)
    # The recommendation spaces thresholds by at most 2:1. Thresholds relative to the envelope's peak, not to full
    # scale, make the meter independent of scale.
    thresholds = held.max() * 2.0 ** (np.arange(-32, 1) / 2)
    active = len(wave) / len(held) * np.array([np.count_nonzero(held >= threshold) for threshold in thresholds])
    level_db = 10 * np.log10(energy / active)
    excess_db = level_db - 20 * np.log10(thresholds) - _MARGIN_DB
    within = np.flatnonzero(excess_db <= 0)
    if len(within) == 0 or within[0] == 0:
        return float(level_db[-1])
    high = int(within[0])
    low = high - 1
    return float(np.interp(0, excess_db[[high, low]], level_db[[high, low]]))


def _held_envelope(wave: np.ndarray) -> np.ndarray:
    """Return the envelope, held for the hangover. The wave is active at the thresholds that the envelope reaches.

    There is one value for each millisecond, from the mean magnitude. With the time constant of 30 ms this changes
    levels by 0.01 dB at most, and takes a quarter of the time.
    """
    padded = np.pad(np.abs(wave), (-len(wave) % _METER_STEP, 0))
    means = np.einsum("ij->i", padded.reshape(-1, _METER_STEP)) / _METER_STEP
    g = np.exp(-_METER_STEP / (_TIME_CONSTANT_S * audio.SAMPLE_RATE))
    envelope = lfilter([(1 - g) ** 2], [1, -2 * g, g**2], means)  # the recommendation's two smoothings
    window = round(_HANGOVER_S * audio.SAMPLE_RATE / _METER_STEP) + 1
    return np.asarray(maximum_filter1d(envelope, window, mode="constant", origin=window // 2))


def _energy(wave: np.ndarray) -> float:
    return float(np.einsum("i,i->", wave, wave, dtype=np.float64))  # without copies, and on one thread


def _mixed(wave: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    noise_rms = np.sqrt(_energy(noise) / len(noise))
    if noise_rms == 0:
        return wave.copy()
    speech_db = active_level_db(wave)
    target_db = (speech_db if np.isfinite(speech_db) else NOMINAL_LEVEL_DB) - snr_db
    return np.asarray(wave + noise * (10 ** (target_db / 20) / noise_rms), dtype=np.float32)


def _section(rng: np.random.Generator, clip: Clip, num_samples: int) -> Section:
    """Draw a part as long as needed, or loop a short clip from a random sample."""
    start = int(rng.integers(max(1, clip.num_samples - num_samples + 1)))
    length = min(clip.num_samples, num_samples)
    offset = int(rng.integers(max(1, length))) if length < num_samples else 0
    return clip.clip_id, clip.uri, start, length, offset


def _read(section: Section, num_samples: int) -> np.ndarray:
    _, uri, start, length, offset = section
    part = audio.load(uri, start, length)
    return np.resize(np.roll(part, -offset), num_samples)


def _talkers(rng: np.random.Generator, scene: Scene) -> tuple[Section, ...]:
    """Draw sections of 3 to 6 clips of other speakers than the scene's; none if there are fewer than three."""
    count = int(rng.integers(_TALKERS[0], _TALKERS[1], endpoint=True))
    sections = []
    for clip in _others(rng, scene):
        sections.append(_section(rng, clip, scene.num_samples))
        if len(sections) == count:
            break
    return tuple(sections) if len(sections) >= _TALKERS[0] else ()


def _others(rng: np.random.Generator, scene: Scene) -> Iterator[Clip]:
    """Yield distinct clips of other speakers in random order; at most `_CANDIDATES` of a pool are tried."""
    pool = scene.clips.speech
    for index in rng.choice(len(pool), min(len(pool), _CANDIDATES), replace=False):
        clip = pool[int(index)]
        if clip.clip_id != scene.clip_id and (scene.speaker is None or clip.speaker != scene.speaker):
            yield clip


noise = Component(_draw_noise, (RecordedNoise, ColouredNoise, Babble))
