"""Denoisers: spectral gating and three trained networks; the distortion they leave is part of the recipe."""

import tarfile
from configparser import ConfigParser
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from scipy.signal import lfilter

from speechdistill import audio
from speechdistill.assets import Need
from speechdistill.degradations import Neural, Scene

if TYPE_CHECKING:
    import torch

_WINDOW, _HOP = 1024, 256  # TorchGate's defaults
_MOVING_MEAN = 21  # frames; its default of 20 has no middle, and torch warns about it

# featurelib.py and enhance_onnx.py of NSNet2-baseline: 20 ms, gains of -80 to 0 dB.
_NSNET2_WINDOW = np.sqrt(np.hanning(320)).astype(np.float32)
_LEAST_POWER, _LEAST_GAIN = 1e-12, 1e-4

_DEEP_FILTER_FILES = ("enc.onnx", "erb_dec.onnx", "df_dec.onnx", "config.ini")
# What the running means start from, of the lowest and the highest band (libDF/src/lib.rs).
_FIRST_LEVELS_DB, _FIRST_MAGNITUDES = (-60.0, -90.0), (1e-3, 1e-4)


@dataclass(frozen=True)
class SpectralGating:
    """Spectral gating as noisereduce's TorchGate does it, on the wave's own statistics.

    The threshold of a frequency is fixed (`stationary`) or follows a moving mean; what falls below it is
    lowered to 1 - `strength`.
    """

    stationary: bool
    strength: float

    def apply(self, wave: np.ndarray) -> np.ndarray:
        import torch

        # TorchGate refuses less than two windows, and its inverse transform drops an incomplete hop.
        length = max(2 * _WINDOW, -(-len(wave) // _HOP) * _HOP)
        padded = torch.from_numpy(audio.fit(wave, length).astype(np.float32))
        gated: np.ndarray = _gate(self.stationary, self.strength)(padded[None])[0].numpy()
        return gated[: len(wave)]

    def clip_ids(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class NSNet2(Neural):
    """The DNS challenge's baseline: gains per frequency from log powers (Braun and Tashev, arXiv 2008.06412)."""

    need: ClassVar[Need] = Need(
        "nsnet2",
        "the ONNX file of NSNet2, nsnet2-20ms-baseline.onnx",
        "https://github.com/microsoft/DNS-Challenge/raw/master/NSNet2-baseline/nsnet2-20ms-baseline.onnx",
        "the repository's: MIT for code, CC BY 4.0 for other content",
    )

    @classmethod
    def load(cls, path: Path, device: str) -> Any:
        session = _session(path.read_bytes(), device)
        _gained(session, np.zeros((1, 1), np.float32))  # a graph of another shape fails here
        return session

    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        if network.get_inputs()[0].shape[0] == 1:
            return np.concatenate([_gained(network, wave[None]) for wave in waves])
        return _gained(network, waves)


@dataclass(frozen=True)
class DeepFilterNet3(Neural):
    """Gains per ERB band, and below 4.8 kHz a filter over five frames, at 48 kHz (Schröter et al., arXiv 2305.08227).

    As its `enhance` does it: without a limit to the attenuation and without the post-filter.
    """

    need: ClassVar[Need] = Need(
        "deepfilternet3",
        "the ONNX export of DeepFilterNet 3, DeepFilterNet3_onnx.tar.gz",
        "https://github.com/Rikorose/DeepFilterNet/raw/main/models/DeepFilterNet3_onnx.tar.gz",
        "MIT or Apache-2.0",
    )

    @classmethod
    def load(cls, path: Path, device: str) -> Any:
        network = _deep_filter(_archived(path), device)
        _deep_filtered(network, np.zeros(1, np.float32))  # graphs of other shapes fail here
        return network

    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        return np.stack([_deep_filtered(network, wave) for wave in waves])  # the export has a batch of one


@dataclass(frozen=True)
class Demucs(Neural):
    """The causal Demucs on waveforms, trained on the DNS challenge, dns64 (Défossez et al., arXiv 2006.12847)."""

    need: ClassVar[Need] = Need(
        "demucs",
        "the weights of Demucs for speech, dns64-a7761ff99a7d5bb6.th",
        "https://dl.fbaipublicfiles.com/adiyoss/denoiser/dns64-a7761ff99a7d5bb6.th",
        "CC BY-NC 4.0, also of the package `denoiser` that runs it",
    )

    @classmethod
    def load(cls, path: Path, device: str) -> Any:
        import torch

        kind = _demucs()
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # drawing initial weights would change the global random state
            network = kind(hidden=len(state["encoder.0.0.weight"]), sample_rate=audio.SAMPLE_RATE)
        network.load_state_dict(state, assign=True)
        return network.eval().requires_grad_(False).to(device)

    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        import torch

        length = waves.shape[1]
        # It divides by the standard deviation, and a single sample has none.
        padded = torch.from_numpy(np.pad(waves, ((0, 0), (0, max(0, 2 - length)))))
        denoised: torch.Tensor = network(padded.to(next(network.parameters()).device))
        return denoised[:, 0, :length].cpu().numpy()


def spectral_gating(rng: np.random.Generator, scene: Scene) -> SpectralGating:
    """Stationary or not with equal probability, strength uniform in 0.6..1."""
    return SpectralGating(bool(rng.random() < 0.5), float(rng.uniform(0.6, 1.0)))


def nsnet2(rng: np.random.Generator, scene: Scene) -> NSNet2:
    return NSNet2(*scene.assets[NSNet2.need.name])


def deepfilternet3(rng: np.random.Generator, scene: Scene) -> DeepFilterNet3:
    return DeepFilterNet3(*scene.assets[DeepFilterNet3.need.name])


def demucs(rng: np.random.Generator, scene: Scene) -> Demucs:
    return Demucs(*scene.assets[Demucs.need.name])


def _demucs() -> Any:
    """The network's class."""
    try:
        from denoiser.demucs import Demucs
    except ImportError as error:
        raise ImportError(
            "no Demucs for speech (CC BY-NC 4.0, not for commercial use): pip install --no-deps denoiser==0.1.5"
        ) from error
    return Demucs


NEEDS = {"nsnet2": (NSNet2.need,), "deepfilternet3": (DeepFilterNet3.need,), "demucs": (Demucs.need,)}
OPTIONAL = {"demucs": _demucs}
LIBRARIES = {"nsnet2": ("onnxruntime",), "deepfilternet3": ("onnxruntime",), "demucs": ("denoiser",)}


def _gate(stationary: bool, strength: float) -> "torch.nn.Module":
    import torch
    from noisereduce.torchgate import TorchGate

    class Gate(TorchGate):  # type: ignore[misc]
        def _nonstationary_mask(self, X_abs: torch.Tensor) -> torch.Tensor:
            # It divides by the moving mean of magnitudes, 0/0 in digital silence, and the mask's smoothing
            # would spread the NaN to bins with signal. 1e-20 is far below a 16-bit step; the gate closes.
            return super()._nonstationary_mask(X_abs + 1e-20)  # type: ignore[no-any-return]

    return Gate(
        audio.SAMPLE_RATE,
        nonstationary=not stationary,
        n_movemean_nonstationary=_MOVING_MEAN,
        prop_decrease=strength,
        n_fft=_WINDOW,
        hop_length=_HOP,
    )


def _session(graph: bytes, device: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    cuda = device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    # Without TF32, as PyTorch's networks here (`apply_batch`).
    providers: list[Any] = [("CUDAExecutionProvider", {"use_tf32": "0"})] if cuda else []
    return onnxruntime.InferenceSession(graph, options, [*providers, "CPUExecutionProvider"])


def _stft(waves: np.ndarray, window: np.ndarray) -> np.ndarray:
    """(batch, num_samples) to complex64 (batch, frames, frequencies); frame i's middle is i half windows in."""
    import torch

    hop = len(window) // 2
    padded = torch.from_numpy(np.pad(waves, ((0, 0), (0, -waves.shape[1] % hop))))
    spectra = torch.stft(
        padded, len(window), hop, window=torch.from_numpy(window), pad_mode="constant", return_complex=True
    )
    return spectra.transpose(1, 2).numpy()


def _istft(spectra: np.ndarray, window: np.ndarray, num_samples: int) -> np.ndarray:
    import torch

    columns = torch.from_numpy(spectra).transpose(1, 2)
    waves = torch.istft(columns, len(window), len(window) // 2, window=torch.from_numpy(window), length=num_samples)
    return waves.numpy()


def _gained(session: Any, waves: np.ndarray) -> np.ndarray:
    """NSNet2 on (batch, num_samples).

    A frame more than in the challenge's script, which for want of it fades in the first 10 ms.
    """
    spectra = _stft(waves, _NSNET2_WINDOW)
    powers = np.square(np.abs(spectra))
    (gains,) = session.run(None, {session.get_inputs()[0].name: np.log10(np.maximum(powers, _LEAST_POWER))})
    return _istft(spectra * np.clip(gains, _LEAST_GAIN, 1.0), _NSNET2_WINDOW, waves.shape[1])


class _DeepFilter(NamedTuple):
    """The three graphs, and the numbers of config.ini. Look-aheads are in frames."""

    encoder: Any
    gains: Any
    taps: Any
    sample_rate: int
    window: np.ndarray
    widths: np.ndarray  # (bands,): the frequencies of each ERB band
    filtered: int  # lowest frequencies, which get the filter
    order: int
    filter_ahead: int
    features_ahead: int
    alpha: float


def _archived(path: Path) -> dict[str, bytes]:
    files = {}
    with tarfile.open(fileobj=BytesIO(path.read_bytes()), mode="r:gz") as archive:
        for member in archive:
            data = archive.extractfile(member)
            if data is not None:
                files[PurePosixPath(member.name).name] = data.read()
    missing = sorted(set(_DEEP_FILTER_FILES) - set(files))
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    return files


def _deep_filter(files: dict[str, bytes], device: str) -> _DeepFilter:
    config = ConfigParser(interpolation=None)
    config.read_string(files["config.ini"].decode())
    if config["train"]["model"] != "deepfilternet3":  # the one before it filters what the gains have changed
        raise ValueError(f"its model is {config['train']['model']}")
    numbers = config["df"]
    rate, fft_size, hop = (int(numbers[name]) for name in ("sr", "fft_size", "hop_size"))
    if fft_size != 2 * hop:
        raise ValueError(f"its hop of {hop} is not half its window of {fft_size}")
    sines = np.sin(np.pi / fft_size * (np.arange(fft_size) + 0.5))
    return _DeepFilter(
        encoder=_session(files["enc.onnx"], device),
        gains=_session(files["erb_dec.onnx"], device),
        taps=_session(files["df_dec.onnx"], device),
        sample_rate=rate,
        window=np.sin(np.pi / 2 * sines**2).astype(np.float32),  # Vorbis I, section 4.3.1
        widths=_erb_widths(rate, fft_size, int(numbers["nb_erb"]), int(numbers["min_nb_erb_freqs"])),
        filtered=int(numbers["nb_df"]),
        order=int(numbers["df_order"]),
        filter_ahead=int(numbers["df_lookahead"]),
        features_ahead=int(config["deepfilternet"]["conv_lookahead"]),
        alpha=_forgetting(hop / rate / float(numbers["norm_tau"])),
    )


def _erb_widths(sample_rate: int, fft_size: int, bands: int, least: int) -> np.ndarray:
    """Bands of equal width on the ERB scale, in FFT frequencies, each of `least` at least."""
    scale_hz = 24.7 * 9.265
    highest = np.log1p(sample_rate / 2 / scale_hz)
    edges_hz = scale_hz * np.expm1(np.arange(1, bands + 1) / bands * highest)
    ends = [0]
    for edge in np.rint(edges_hz * fft_size / sample_rate).astype(int):
        ends.append(max(edge, ends[-1] + least))
    ends[-1] = fft_size // 2 + 1
    return np.diff(ends)


def _forgetting(frame_per_tau: float) -> float:
    """Of a running mean; rounded to the fewest digits, three or more, that keep it below 1."""
    exact, digits = float(np.exp(-frame_per_tau)), 3
    while round(exact, digits) >= 1:
        digits += 1
    return round(exact, digits)


def _deep_filtered(network: _DeepFilter, wave: np.ndarray) -> np.ndarray:
    wide = audio.resample(wave, audio.SAMPLE_RATE, network.sample_rate)
    padded = np.pad(wide, (0, len(network.window)))  # frames for the look-ahead of the last ones
    spectrum = _stft(padded[None], network.window)[0]
    levels, shapes = _features(network, spectrum / len(network.window))
    names = ("e0", "e1", "e2", "e3", "emb", "c0")
    found = network.encoder.run(names, {"feat_erb": levels[None], "feat_spec": shapes[None]})
    hidden = dict(zip(names, found, strict=True))
    (gains,) = network.gains.run(["m"], {name: hidden[name] for name in ("emb", "e3", "e2", "e1", "e0")})
    (taps,) = network.taps.run(["coefs"], {name: hidden[name] for name in ("emb", "c0")})
    denoised = spectrum * np.repeat(gains[0, 0], network.widths, axis=1)
    denoised[:, : network.filtered] = _filtered(network, spectrum[:, : network.filtered], taps[0])
    enhanced = _istft(denoised[None], network.window, len(padded))[0]
    return audio.fit(audio.resample(enhanced, network.sample_rate), len(wave))


def _features(network: _DeepFilter, spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(1, frames, bands) and (2, frames, filtered), both float32: levels, real and imaginary parts, normalised."""
    starts = np.cumsum(network.widths) - network.widths
    powers = np.add.reduceat(np.square(np.abs(spectrum)), starts, axis=1) / network.widths
    levels_db = 10 * np.log10(powers + 1e-10)
    levels = (levels_db - _running_mean(levels_db, _FIRST_LEVELS_DB, network.alpha)) / 40
    low = spectrum[:, : network.filtered]
    magnitudes = _running_mean(np.abs(low), _FIRST_MAGNITUDES, network.alpha)
    shapes = low / np.sqrt(np.maximum(magnitudes, 1e-30))  # a quarter of an hour of silence would end in 0/0
    parts = np.stack([shapes.real, shapes.imag])
    return _ahead(levels[None], network.features_ahead), _ahead(parts, network.features_ahead)


def _ahead(features: np.ndarray, frames: int) -> np.ndarray:
    return np.pad(features[:, frames:], ((0, 0), (0, frames), (0, 0))).astype(np.float32)


def _running_mean(values: np.ndarray, first: tuple[float, float], alpha: float) -> np.ndarray:
    """Exponential, over the frames of (frames, bands)."""
    before = np.linspace(*first, values.shape[1])[None]
    return np.asarray(lfilter([1 - alpha], [1, -alpha], values, axis=0, zi=alpha * before)[0])


def _filtered(network: _DeepFilter, spectrum: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """(frames, filtered) through complex filters over frames, which (frames, filtered, 2 * order) holds as floats."""
    past = network.order - 1 - network.filter_ahead
    padded = np.pad(spectrum, ((past, network.filter_ahead), (0, 0)))
    around = np.lib.stride_tricks.sliding_window_view(padded, network.order, axis=0)
    return np.asarray((around * np.ascontiguousarray(taps).view(np.complex64)).sum(axis=-1))
