"""A small synthetic corpus for demos and tests: speech by espeak-ng, computed noise, simulated rooms.

Nothing is downloaded. Every file is a function of its row alone, and bit-equal with equal library versions.
"""

import csv
from collections.abc import Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from scipy.signal import butter, sosfilt

from speechdistill.data import espeak_ng
from speechdistill.data.listed import Row
from speechdistill.io import fingerprint, storage
from speechdistill.io.audio import SAMPLE_RATE

_SEED = 2512  # for everything drawn here
_LICENCE = "CC0-1.0"  # the sentences are ours; the GPL of espeak-ng does not cover its output
_COLUMNS = ("path", "kind", "corpus", "speaker", "language", "licence")
_NOISE_S = 10

# Voice variants of espeak-ng with a base pitch (0..99) and rate (words per minute): six speakers per language.
_SPEAKERS = (("f1", 55, 170), ("m3", 40, 180), ("f2", 65, 185), ("m1", 45, 165), ("f4", 50, 175), ("m7", 55, 170))
_VOICES = {"en-US": "en-us", "de-DE": "de", "fr-FR": "fr", "es-ES": "es", "pt-PT": "pt"}
_SENTENCES = {
    "en-US": (
        "The baker on the corner opens at six, and by seven the smell of bread has reached every window.",
        "We missed the last ferry, so we walked along the shore until the lights of the village appeared.",
        "My grandmother keeps her recipes in a blue tin, written on the backs of old train tickets.",
        "Before you paint the fence, check the weather, because it has rained every afternoon this week.",
        "The library closes early on Friday, but the reading room in the basement stays open for students.",
        "Eleven children stood in the yard, counting aloud, while the youngest one looked for a place to hide.",
    ),
    "de-DE": (
        "Der Zug nach Norden hat zwanzig Minuten Verspätung, deshalb trinken wir noch einen Kaffee.",
        "Im Garten hinter dem Haus wachsen Äpfel, Birnen und ein alter Kirschbaum mit krummen Ästen.",
        "Meine Schwester hat gestern drei Stunden lang nach ihrem grünen Schlüssel gesucht.",
        "Wenn es morgen nicht regnet, fahren wir mit dem Fahrrad an den See und nehmen Brot mit.",
        "Der Uhrmacher öffnete vorsichtig das Gehäuse und zählte die winzigen Räder mit der Pinzette.",
        "Am Ende der Straße steht ein gelbes Haus, in dem früher die Post untergebracht war.",
    ),
    "fr-FR": (
        "Le facteur passe chaque matin vers neuf heures et bavarde un moment avec notre voisine.",
        "Nous avons planté des tomates sur le balcon, mais les oiseaux mangent toutes les jeunes feuilles.",
        "La petite gare du village est fermée depuis longtemps, et les herbes poussent entre les rails.",
        "Il faut remuer la soupe doucement, ajouter du sel, puis la laisser reposer quelques minutes.",
        "Les enfants ont dessiné une carte du quartier avec tous les arbres et toutes les fontaines.",
        "Elle a choisi un manteau rouge, un chapeau gris et de grosses bottes pour marcher dans la neige.",
    ),
    "es-ES": (
        "El panadero de la plaza cierra los lunes, así que hoy compraremos el pan en el mercado.",
        "Si llegas antes de las ocho, deja la llave debajo de la maceta y enciende la luz del pasillo.",
        "Los vecinos pintaron la fachada de azul y colgaron macetas con flores en todos los balcones.",
        "La profesora dibujó un mapa en la pizarra y nos explicó por qué el río cambia de nombre.",
        "Después de la tormenta, el camino quedó cubierto de hojas y ramas, y nadie pudo pasar en coche.",
        "Caminamos tres horas por la montaña hasta encontrar la fuente que aparecía en el libro.",
    ),
    "pt-PT": (
        "O autocarro da manhã passa sempre atrasado, por isso temos tempo para beber um café.",
        "Quando o mar está calmo, os pescadores saem cedo e voltam antes do meio-dia com as redes cheias.",
        "O relógio da torre parou às quatro horas, e ninguém sabe onde está a chave para lhe dar corda.",
        "Os meninos construíram uma ponte de madeira sobre o ribeiro e atravessaram-na a correr.",
        "Para chegar ao mercado, siga pela rua da escola e vire à direita depois da farmácia.",
        "O jardineiro regou as laranjeiras, varreu as folhas secas e sentou-se à sombra do muro.",
    ),
}


_AFTERTHOUGHTS = {
    "en-US": ("Nobody knew why.", "It was a good day.", "Please remember that.", "Who would have thought so?"),
    "de-DE": ("Niemand wusste warum.", "Das war ein guter Tag.", "Bitte denk daran.", "Wer hätte das gedacht?"),
    "fr-FR": ("Personne ne savait pourquoi.", "C'était une belle journée.", "Pensez-y bien.", "Qui l'aurait cru?"),
    "es-ES": ("Nadie sabía por qué.", "Fue un buen día.", "Acuérdate de eso.", "¿Quién lo habría pensado?"),
    "pt-PT": ("Ninguém sabia porquê.", "Foi um bom dia.", "Lembra-te disso.", "Quem diria uma coisa dessas?"),
}


def write(root: str | Path, num_clips: int = 60) -> Path:
    """Write the corpus to folder `root`; returns its list `corpus.csv`, with paths relative to the list."""
    target = Path(root).absolute() / "corpus.csv"
    text = StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows(root, num_clips):
        uri = row.pop("uri")
        writer.writerow({"path": Path(uri).relative_to(target.parent).as_posix(), **row})
    storage.publish(text.getvalue().encode(), str(target))
    return target


def rows(root: str | Path, num_clips: int = 60) -> Iterator[Row]:
    """Yield the manifest rows of `num_clips` speech clips, 6 noises and 6 impulse responses; makes missing files first.

    Speech is 22.05 kHz, 4 to 10 s long, in five languages with six speakers each; the rest is 16 kHz. Raises
    `LibraryError` if espeak-ng is not installed.
    """
    folder = Path(root).absolute()
    utterances = {}
    for index in range(num_clips):
        utterance = _utterance(index)
        utterances[folder / "speech" / _name(index, utterance)] = utterance
    _speak({path: utterance for path, utterance in utterances.items() if not path.exists()})
    for path, utterance in utterances.items():
        yield _row(path, "speech", speaker=utterance.speaker, language=utterance.language)
    for index, (name, make) in enumerate(_NOISES.items()):
        path = folder / "noise" / f"{name}.wav"
        if not path.exists():
            _publish(path, _levelled(make(np.random.default_rng([_SEED, index]))), SAMPLE_RATE, "PCM_16")
        yield _row(path, "noise")
    for name, room in _ROOMS.items():
        path = folder / "rir" / f"{name}.wav"
        if not path.exists():
            _publish(path, _response(*room), SAMPLE_RATE, "PCM_24")
        yield _row(path, "rir")


def _row(path: Path, kind: str, **columns: str) -> Row:
    return {"uri": str(path), "kind": kind, "corpus": "espeak", "licence": _LICENCE, **columns}


def _publish(path: Path, wave: np.ndarray, rate: int, subtype: str) -> None:
    buffer = BytesIO()
    soundfile.write(buffer, wave, rate, format="WAV", subtype=subtype)
    storage.publish(buffer.getvalue(), str(path))


# Speech


class _Utterance(NamedTuple):
    """The text of a clip in a voice of espeak-ng (`espeak_ng.Job`)."""

    language: str
    speaker: str
    voice: str
    text: str
    rate: int
    pitch: int


def _utterance(index: int) -> _Utterance:
    rng = np.random.default_rng([_SEED, index])
    language = list(_VOICES)[index % len(_VOICES)]
    variant, pitch, rate = _SPEAKERS[index // len(_VOICES) % len(_SPEAKERS)]
    return _Utterance(
        language=language,
        speaker=f"{language}-{variant}",
        voice=f"{_VOICES[language]}+{variant}",
        text=_text(rng, language),
        rate=rate + int(rng.integers(-12, 13)),
        pitch=pitch + int(rng.integers(-5, 6)),
    )


def _name(index: int, utterance: _Utterance) -> str:
    """Return the file name of a clip, which changes with the utterance."""
    return f"{index:05d}-{utterance.speaker}-{fingerprint.of(utterance._asdict())[:8]}.wav"


def _text(rng: np.random.Generator, language: str) -> str:
    """Draw a sentence and one or two short ones: 4 to 10 s."""
    short = rng.choice(_AFTERTHOUGHTS[language], size=int(rng.integers(1, 3)), replace=False)
    return " ".join([str(rng.choice(_SENTENCES[language])), *short])


def _speak(utterances: dict[Path, _Utterance]) -> None:
    jobs: list[espeak_ng.Job] = [
        {"text": one.text, "voice": one.voice, "pitch": one.pitch, "rate": one.rate} for one in utterances.values()
    ]
    for path, (pcm, rate) in zip(utterances, espeak_ng.speak(jobs), strict=True):
        _publish(path, np.frombuffer(pcm, np.int16), rate, "PCM_16")


# Noise, shape (num_samples,)


def _coloured(rng: np.random.Generator, exponent: float) -> np.ndarray:
    """Return noise of power spectrum 1/f^`exponent` from 20 Hz."""
    spectrum = np.fft.rfft(rng.standard_normal(_NOISE_S * SAMPLE_RATE))
    hertz = np.fft.rfftfreq(_NOISE_S * SAMPLE_RATE, 1 / SAMPLE_RATE)
    return np.fft.irfft(np.where(hertz >= 20, spectrum / np.maximum(hertz, 20) ** (exponent / 2), 0))


def _hum(rng: np.random.Generator) -> np.ndarray:
    times = np.arange(_NOISE_S * SAMPLE_RATE) / SAMPLE_RATE
    harmonics = [np.sin(2 * np.pi * (50 * k * times + rng.uniform())) / k for k in range(1, 20)]
    return np.asarray(sum(harmonics) + 0.02 * rng.standard_normal(len(times)))


def _babble(rng: np.random.Generator) -> np.ndarray:
    """Return twelve talkers, each a band of noise that swells in the rhythm of syllables."""
    n = _NOISE_S * SAMPLE_RATE
    syllables = butter(2, [1, 5], "bandpass", fs=SAMPLE_RATE, output="sos")
    talkers = np.zeros(n)
    for _ in range(12):
        formant = rng.uniform(300, 2500)
        band = butter(2, [0.7 * formant, 1.4 * formant], "bandpass", fs=SAMPLE_RATE, output="sos")
        swell = np.maximum(sosfilt(syllables, rng.standard_normal(n)), 0)
        talkers += sosfilt(band, rng.standard_normal(n)) * swell
    return talkers


def _bursts(rng: np.random.Generator, per_s: float, decay_s: float, band_hz: tuple[float, float]) -> np.ndarray:
    """Return random decaying clicks in a frequency band."""
    n = _NOISE_S * SAMPLE_RATE
    hits = np.where(rng.uniform(size=n) < per_s / SAMPLE_RATE, rng.exponential(size=n), 0)
    decay = np.exp(-np.arange(round(8 * decay_s * SAMPLE_RATE)) / (decay_s * SAMPLE_RATE))
    envelope = np.convolve(hits, decay)[:n]
    band = butter(2, band_hz, "bandpass", fs=SAMPLE_RATE, output="sos")
    return np.asarray(sosfilt(band, envelope * rng.standard_normal(n)))


def _typing(rng: np.random.Generator) -> np.ndarray:
    """Return keys in a quiet room; no part is silent, so that any part can be mixed at an SNR."""
    return _bursts(rng, 7, 0.004, (800, 6000)) + 1e-3 * _coloured(rng, 0)


def _rain(rng: np.random.Generator) -> np.ndarray:
    return _bursts(rng, 400, 0.001, (1500, 7500)) + 0.2 * _bursts(rng, 20_000, 0.001, (400, 7000))


_NOISES = {
    "pink": lambda rng: _coloured(rng, 1),
    "brown": lambda rng: _coloured(rng, 2),
    "hum": _hum,
    "babble": _babble,
    "typing": _typing,
    "rain": _rain,
}


def _levelled(wave: np.ndarray) -> np.ndarray:
    """Scale a wave to -26 dB re full scale, or lower if the peaks would clip."""
    return np.asarray(wave * min(0.05 / np.sqrt(np.mean(wave**2)), 0.9 / np.abs(wave).max()))


# Rooms: size, source, microphone (m) and reverberation time (s)

_ROOMS = {
    "booth": ((2.5, 2.0, 2.3), (0.8, 1.0, 1.4), (1.6, 1.1, 1.3), 0.15),
    "car_sized": ((3.0, 2.5, 2.2), (0.9, 0.8, 1.2), (2.2, 1.7, 1.2), 0.25),
    "office": ((4.5, 3.5, 2.6), (1.2, 1.1, 1.3), (3.1, 2.4, 1.2), 0.4),
    "living_room": ((6.0, 4.5, 2.7), (1.5, 1.3, 1.5), (4.2, 3.1, 1.1), 0.55),
    "classroom": ((8.5, 6.5, 3.2), (1.4, 3.0, 1.6), (6.0, 4.1, 1.2), 0.8),
    "hall": ((12.0, 9.0, 5.0), (2.0, 4.2, 1.6), (8.5, 5.5, 1.5), 1.1),
}


def _response(
    size: tuple[float, ...], source: tuple[float, ...], microphone: tuple[float, ...], rt60_s: float
) -> np.ndarray:
    """Return the impulse response of a shoebox room by the image method; shape (num_samples,), peak 0.9."""
    import pyroomacoustics

    absorption, order = pyroomacoustics.inverse_sabine(rt60_s, size)
    material = pyroomacoustics.Material(absorption)
    room = pyroomacoustics.ShoeBox(size, fs=SAMPLE_RATE, materials=material, max_order=min(order, 30))
    room.add_source(source)
    room.add_microphone(microphone)
    room.compute_rir()
    response = np.asarray(room.rir[0][0])
    return np.asarray(response * (0.9 / np.abs(response).max()))
