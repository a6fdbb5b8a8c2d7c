"""NSNet2 and DeepFilterNet 3: denoisers as ONNX graphs, with their features and filters around the graphs."""

import tarfile
from configparser import ConfigParser
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from scipy.signal import lfilter

from speechdistill.io import audio

# featurelib.py and enhance_onnx.py of NSNet2-baseline: 20 ms, gains of -80 to 0 dB.
_NSNET2_WINDOW = np.sqrt(np.hanning(320)).astype(np.float32)
_LEAST_POWER, _LEAST_GAIN = 1e-12, 1e-4

_DEEP_FILTER_FILES = ("enc.onnx", "erb_dec.onnx", "df_dec.onnx", "config.ini")
# Initial running means of the lowest and the highest band (libDF/src/lib.rs).
_FIRST_LEVELS_DB, _FIRST_MAGNITUDES = (-60.0, -90.0), (1e-3, 1e-4)


def session(graph: bytes, device: str) -> Any:
    """Load a graph into ONNX Runtime, with one thread on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    cuda = device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    # Without TF32, like PyTorch networks (`degradation.apply_batch`).
    providers: list[Any] = [("CUDAExecutionProvider", {"use_tf32": "0"})] if cuda else []
    return onnxruntime.InferenceSession(graph, options, [*providers, "CPUExecutionProvider"])


def _stft(waves: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Map (batch, num_samples) to complex64 (batch, frames, frequencies); frame i is centred i half windows in."""
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


def gained(session: Any, waves: np.ndarray) -> np.ndarray:
    """Apply NSNet2 to waves of shape (batch, num_samples).

    There is one frame more than in the challenge's script, which fades in over the first 10 ms for lack of it.
    """
    spectra = _stft(waves, _NSNET2_WINDOW)
    powers = np.square(np.abs(spectra))
    (gains,) = session.run(None, {session.get_inputs()[0].name: np.log10(np.maximum(powers, _LEAST_POWER))})
    return _istft(spectra * np.clip(gains, _LEAST_GAIN, 1.0), _NSNET2_WINDOW, waves.shape[1])


class DeepFilter(NamedTuple):
    """The three graphs and the settings of config.ini. Look-aheads are in frames."""

    encoder: Any
    gains: Any
    taps: Any
    sample_rate: int
    window: np.ndarray
    widths: np.ndarray  # (bands,): number of frequencies of each ERB band
    filtered: int  # number of lowest frequencies, which are filtered
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
        raise ValueError(f"{', '.join(missing)} is missing")
    return files


def deep_filter(path: Path, device: str) -> DeepFilter:
    """Load the archive of the export; raises `ValueError` for another model."""
    files = _archived(path)
    config = ConfigParser(interpolation=None)
    config.read_string(files["config.ini"].decode())
    if config["train"]["model"] != "deepfilternet3":  # DeepFilterNet 2 filters after the gains
        raise ValueError(f"the model is {config['train']['model']}")
    numbers = config["df"]
    rate, fft_size, hop = (int(numbers[name]) for name in ("sr", "fft_size", "hop_size"))
    if fft_size != 2 * hop:
        raise ValueError(f"the hop of {hop} is not half the window of {fft_size}")
    sines = np.sin(np.pi / fft_size * (np.arange(fft_size) + 0.5))
    return DeepFilter(
        encoder=session(files["enc.onnx"], device),
        gains=session(files["erb_dec.onnx"], device),
        taps=session(files["df_dec.onnx"], device),
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
    """Return the widths of bands that are equal on the ERB scale, in FFT frequencies, each at least `least`."""
    scale_hz = 24.7 * 9.265
    highest = np.log1p(sample_rate / 2 / scale_hz)
    edges_hz = scale_hz * np.expm1(np.arange(1, bands + 1) / bands * highest)
    ends = [0]
    for edge in np.rint(edges_hz * fft_size / sample_rate).astype(int):
        ends.append(max(edge, ends[-1] + least))
    ends[-1] = fft_size // 2 + 1
    return np.diff(ends)


def _forgetting(frame_per_tau: float) -> float:
    """Return the factor of a running mean, rounded to the fewest digits (three or more) that keep it below 1."""
    exact, digits = float(np.exp(-frame_per_tau)), 3
    while round(exact, digits) >= 1:
        digits += 1
    return round(exact, digits)


def deep_filtered(network: DeepFilter, wave: np.ndarray) -> np.ndarray:
    """Apply DeepFilterNet 3 to a wave of shape (num_samples,) at 16 kHz."""
    wide = audio.resample(wave, audio.SAMPLE_RATE, network.sample_rate)
    padded = np.pad(wide, (0, len(network.window)))  # frames for the final look-ahead
    spectrum = _stft(padded[None], network.window)[0]
    levels, shapes = _features(network, spectrum / len(network.window))
    names = ("e0", "e1", "e2", "e3", "emb", "c0")
    outputs = network.encoder.run(names, {"feat_erb": levels[None], "feat_spec": shapes[None]})
    hidden = dict(zip(names, outputs, strict=True))
    (gains,) = network.gains.run(["m"], {name: hidden[name] for name in ("emb", "e3", "e2", "e1", "e0")})
    (taps,) = network.taps.run(["coefs"], {name: hidden[name] for name in ("emb", "c0")})
    denoised = spectrum * np.repeat(gains[0, 0], network.widths, axis=1)
    denoised[:, : network.filtered] = _filtered(network, spectrum[:, : network.filtered], taps[0])
    enhanced = _istft(denoised[None], network.window, len(padded))[0]
    return audio.fit(audio.resample(enhanced, network.sample_rate), len(wave))


def _features(network: DeepFilter, spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return normalised float32 features: levels (1, frames, bands), real and imaginary parts (2, frames, filtered)."""
    starts = np.cumsum(network.widths) - network.widths
    powers = np.add.reduceat(np.square(np.abs(spectrum)), starts, axis=1) / network.widths
    levels_db = 10 * np.log10(powers + 1e-10)
    levels = (levels_db - _running_mean(levels_db, _FIRST_LEVELS_DB, network.alpha)) / 40
    low = spectrum[:, : network.filtered]
    magnitudes = _running_mean(np.abs(low), _FIRST_MAGNITUDES, network.alpha)
    shapes = low / np.sqrt(np.maximum(magnitudes, 1e-30))  # otherwise 0/0 after a quarter of an hour of silence
    parts = np.stack([shapes.real, shapes.imag])
    return _ahead(levels[None], network.features_ahead), _ahead(parts, network.features_ahead)


def _ahead(features: np.ndarray, frames: int) -> np.ndarray:
    return np.pad(features[:, frames:], ((0, 0), (0, frames), (0, 0))).astype(np.float32)


def _running_mean(values: np.ndarray, first: tuple[float, float], alpha: float) -> np.ndarray:
    """Return the exponential running mean over the frames of (frames, bands)."""
    before = np.linspace(*first, values.shape[1])[None]
    return np.asarray(lfilter([1 - alpha], [1, -alpha], values, axis=0, zi=alpha * before)[0])


def _filtered(network: DeepFilter, spectrum: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Filter (frames, filtered) over frames; `taps`, (frames, filtered, 2 * order), are complex numbers as floats."""
    past = network.order - 1 - network.filter_ahead
    padded = np.pad(spectrum, ((past, network.filter_ahead), (0, 0)))
    around = np.lib.stride_tricks.sliding_window_view(padded, network.order, axis=0)
    return np.asarray((around * np.ascontiguousarray(taps).view(np.complex64)).sum(axis=-1))
