"""Generated speech: a text read aloud replaces the input and is not degraded further (section IV-B).

Only this family may change the length: the output has at most `num_samples`, cut at the end, and is shorter if the text
is.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from speechdistill.data import espeak_ng
from speechdistill.data.degradation import Component, Neural, Scene
from speechdistill.data.sentences import TEXTS, drawn_text, sentences
from speechdistill.io import audio
from speechdistill.io.assets import Need
from speechdistill.io.errors import LibraryError, UserError

_VOICES = {"en": "en-us", "de": "de", "fr": "fr", "es": "es", "pt": "pt"}  # of espeak-ng, by language
_VARIANTS = tuple(f"f{i}" for i in range(1, 5)) + tuple(f"m{i}" for i in range(1, 8))
_PITCHES, _RATES = (30, 70), (140, 200)
_MODEL_FILES = ("model_file.pth", "model_file.pth.tar", "model.pth", "checkpoint.pth")  # in the order of Coqui TTS
_LOADED = 8  # models kept in memory, 0.1 to 0.5 GB each

MODELS: Mapping[str, str | None] = {
    "tts_models/en/ljspeech/tacotron2-DDC": "vocoder_models/en/ljspeech/hifigan_v2",
    "tts_models/en/ljspeech/tacotron2-DDC_ph": "vocoder_models/en/ljspeech/univnet",
    "tts_models/en/ljspeech/glow-tts": "vocoder_models/en/ljspeech/multiband-melgan",
    "tts_models/en/ljspeech/speedy-speech": "vocoder_models/en/ljspeech/hifigan_v2",
    "tts_models/en/ljspeech/fast_pitch": "vocoder_models/en/ljspeech/hifigan_v2",
    "tts_models/en/ljspeech/overflow": "vocoder_models/en/ljspeech/hifigan_v2",
    "tts_models/en/ljspeech/vits": None,
    "tts_models/en/vctk/vits": None,
    "tts_models/en/jenny/jenny": None,
    "tts_models/de/thorsten/tacotron2-DDC": "vocoder_models/de/thorsten/hifigan_v1",
    "tts_models/de/thorsten/vits": None,
    "tts_models/de/css10/vits-neon": None,
    "tts_models/fr/mai/tacotron2-DDC": "vocoder_models/universal/libri-tts/fullband-melgan",
    "tts_models/fr/css10/vits": None,
    "tts_models/es/mai/tacotron2-DDC": "vocoder_models/universal/libri-tts/fullband-melgan",
    "tts_models/es/css10/vits": None,
    "tts_models/pt/cv/vits": None,
}
"""Names of 17 models of Coqui TTS, and their vocoders. The paper does not name its 17."""

_VCTK = (
    "225-234 236-241 243-288 292-295 297-308 310-314 316-318 323 326 329-330 333-336 339-341 343 345 347 351 360-364 "
    "374 376"
)
SPEAKERS = {
    "tts_models/en/vctk/vits": tuple(
        f"p{number}" for span in _VCTK.split() for number in range(int(span[:3]), int(span[-3:]) + 1)
    )
}
"""Speakers of the models that have several."""


def _folder(model: str) -> str:
    return model.replace("/", "--")


@dataclass(frozen=True)
class EspeakNg:
    """A text spoken by espeak-ng in a voice variant (`f1`..`f4`, `m1`..`m7`), pitch 0..99, rate in words per minute."""

    generates: ClassVar[bool] = True

    text: str
    language: str
    variant: str
    pitch: int
    rate: int
    num_samples: int

    def __post_init__(self) -> None:
        if self.language not in _VOICES or self.variant not in _VARIANTS:
            raise ValueError(f"{self}: choose a language from {list(_VOICES)} and a variant from {list(_VARIANTS)}")

    def apply(self, wave: np.ndarray) -> np.ndarray:
        voice = f"{_VOICES[self.language]}+{self.variant}"
        ((pcm, rate),) = espeak_ng.speak([{"text": self.text, "voice": voice, "pitch": self.pitch, "rate": self.rate}])
        spoken = np.frombuffer(pcm, np.int16).astype(np.float32) / 32768
        return _finished(spoken, rate, min(self.num_samples, len(wave)))

    def clip_ids(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class CoquiTts(Neural):
    """A text spoken by one of `MODELS`; `speaker` is one of its `SPEAKERS` or None.

    `seed` determines the noise of the model, which PyTorch draws differently on a GPU and on a CPU.
    """

    need: ClassVar[Need] = Need(
        "coqui",
        "a folder with the text-to-speech models of Coqui, as Coqui TTS stores them (tts_models--en--ljspeech--vits "
        "with a model file and config.json, and so on, and their vocoders)",
        "Coqui TTS: tts --model_name tts_models/en/ljspeech/vits --text a --out_path a.wav, and so for each model, "
        "fills ~/.local/share/tts; copy there those that it keeps in the hub's cache (fr/mai and es/mai)",
        "each its own, most Apache-2.0, MPL-2.0 or BSD-3-Clause; "
        "https://github.com/idiap/coqui-ai-TTS/blob/dev/TTS/.models.json",
        files=tuple(
            f"{_folder(name)}/*" for name in sorted({*MODELS, *(vocoder for vocoder in MODELS.values() if vocoder)})
        ),
        every=True,
    )

    generates: ClassVar[bool] = True

    model: str
    speaker: str | None
    language: str
    text: str
    seed: int
    num_samples: int

    @classmethod
    def load(cls, path: Path, device: str) -> "Models":
        return Models(path, device)

    def apply_batch(self, network: "Models", waves: np.ndarray) -> np.ndarray:
        """Return speech of shape (batch, up to num_samples), float32."""
        import torch

        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            synthesizer = network.synthesizer(self.model)  # loading draws random numbers, so seed afterwards
            torch.manual_seed(self.seed)
            spoken = np.asarray(synthesizer.tts(self.text, speaker_name=self.speaker), np.float32)
        most = min(self.num_samples, waves.shape[1])
        return np.stack([_finished(spoken, synthesizer.output_sample_rate, most)] * len(waves))


class Models:
    """The models in a folder, each loaded at its first use. The last `_LOADED` used are kept."""

    def __init__(self, folder: Path, device: str) -> None:
        """Check the folder; raises `LibraryError` if Coqui TTS does not work, `UserError` for a model without files."""
        self._synthesizer_class, self._folder, self._device = _coqui(), folder, device
        self.synthesizer = lru_cache(maxsize=_LOADED)(self._synthesizer)
        with tempfile.TemporaryDirectory() as scratch:
            for name in filter(None, (*MODELS, *MODELS.values())):  # checked now, not at the first sample of each
                self._files(name, Path(scratch))

    def _synthesizer(self, model: str) -> Any:
        """Load Coqui's `Synthesizer`; raises `ValueError` for an unknown model, `UserError` for unusable files."""
        if model not in MODELS:
            raise ValueError(f"text-to-speech model {model!r} is unknown; choose from {list(MODELS)}")
        vocoder = MODELS[model]
        with tempfile.TemporaryDirectory() as scratch:
            weights, config = self._files(model, Path(scratch))
            vocoder_weights, vocoder_config = self._files(vocoder, Path(scratch)) if vocoder else (None, None)
            try:
                return self._synthesizer_class(
                    tts_checkpoint=weights,
                    tts_config_path=config,
                    vocoder_checkpoint=vocoder_weights,
                    vocoder_config=vocoder_config,
                    use_cuda=self._device.startswith("cuda"),
                )
            except Exception as error:
                reason = f"{weights} (vocoder: {vocoder_weights}) is not Coqui's {model}: {error}"
                raise UserError(reason, f"get it from {CoquiTts.need.where}") from error

    def _files(self, model: str, scratch: Path) -> tuple[str, str]:
        """Return the model file of a model or vocoder, and a copy of its config with local paths."""
        folder = self._folder / _folder(model)
        named = [path for name in _MODEL_FILES if (path := folder / name).is_file()]
        weights = named[:1] or sorted(folder.glob("*.pt*"))
        if len(weights) != 1 or not (folder / "config.json").is_file():
            reason = f"{folder} has no model file (model_file.pth) and config.json: it is not Coqui's {model}"
            raise UserError(reason, f"get it from {CoquiTts.need.where}")
        text = (folder / "config.json").read_text(encoding="utf-8")
        config = scratch / f"{folder.name}.json"
        config.write_text(
            json.dumps(_with_local_paths(json.loads(text), {path.name: str(path) for path in folder.iterdir()}))
        )
        return str(weights[0]), str(config)


def _draw_espeak(rng: np.random.Generator, scene: Scene) -> EspeakNg:
    """Draw a language that has texts, a variant, a pitch of 30 to 70 and 140 to 200 words per minute, all uniform."""
    language = str(rng.choice(sorted(sentences(scene.assets["texts"]))))
    variant = str(rng.choice(_VARIANTS))
    pitch, rate = (int(rng.integers(low, high + 1)) for low, high in (_PITCHES, _RATES))
    text = drawn_text(rng, scene.assets["texts"], language, scene.num_samples)
    return EspeakNg(text, language, variant, pitch, rate, scene.num_samples)


def _draw_text_to_speech(rng: np.random.Generator, scene: Scene) -> CoquiTts:
    """Draw a model, uniformly among those whose language has texts, and one of its speakers."""
    languages = sentences(scene.assets["texts"])
    model = str(rng.choice([name for name in MODELS if name.split("/")[1] in languages]))
    speaker = str(rng.choice(SPEAKERS[model])) if model in SPEAKERS else None
    language = model.split("/")[1]
    text, seed = drawn_text(rng, scene.assets["texts"], language, scene.num_samples), int(rng.integers(1 << 32))
    return CoquiTts(*scene.assets["coqui"], model, speaker, language, text, seed, scene.num_samples)


def _coqui() -> Any:
    """Import the class of Coqui's synthesizers; raises `LibraryError` if that is impossible."""
    try:
        from TTS.utils.synthesizer import Synthesizer
    except (ImportError, OSError) as error:  # OSError: a torchaudio for another build of torch
        raise LibraryError(
            f"no Coqui TTS ({error})",
            'pip install "coqui-tts>=0.28,<0.29", the torchaudio of the installed torch, and for torch 2.9 or later '
            "torchcodec; many models also need the program espeak-ng",
        ) from error
    return Synthesizer


espeak = Component(_draw_espeak, EspeakNg, needs=(TEXTS,), libraries=("espeakng-loader",), check=espeak_ng.installed)
text_to_speech = Component(
    _draw_text_to_speech, CoquiTts, needs=(CoquiTts.need, TEXTS), libraries=("coqui-tts",), check=_coqui
)


def _finished(wave: np.ndarray, rate: int, num_samples: int) -> np.ndarray:
    """Resample speech to 16 kHz, cut it and keep it within full scale."""
    cut = audio.resample(wave, rate)[:num_samples]
    return np.asarray(cut / np.float32(max(1.0, np.abs(cut).max(initial=0.0))), np.float32)


def _with_local_paths(value: Any, files: Mapping[str, str]) -> Any:
    """Replace the paths in a config, which are of another machine, by the local file of the same name, if any."""
    if isinstance(value, dict):
        return {key: _with_local_paths(v, files) for key, v in value.items()}
    if isinstance(value, list):
        return [_with_local_paths(v, files) for v in value]
    return files.get(value.rpartition("/")[2], value) if isinstance(value, str) else value
