"""Generated speech: a text read aloud, the same every time, never longer than the scene."""

import inspect
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from speechdistill.data import components, degradation, espeak_ng, sentences
from speechdistill.data.clips import Clips
from speechdistill.data.degradation import Scene
from speechdistill.data.degradations import generated
from speechdistill.data.degradations.generated import MODELS, CoquiTts, EspeakNg
from speechdistill.io import assets, audio, table
from speechdistill.io.assets import Asset
from speechdistill.io.errors import MissingError

RATE = audio.SAMPLE_RATE
NUM_SAMPLES = 122_880  # 7.68 s
ANY = np.zeros(NUM_SAMPLES, np.float32)
SENTENCES = {
    "de": ["Der Zug hat zwanzig Minuten Verspätung.", "Im Garten wachsen Äpfel und Birnen."],
    "fr": ["Le facteur passe chaque matin vers neuf heures.", "La petite gare est fermée."],
    "es": ["El panadero cierra los lunes.", "Caminamos tres horas por la montaña."],
    "pt": ["O relógio da torre parou às quatro horas.", "O mar está calmo."],
}
ENGLISH = (
    "0113277#12\tThe baker on the corner opens at six.\r\n0113277#13\t- ...\n0113277#14\t\n"
    "0113277#15\tWe\u00a0missed the\x07 ferry."
)
EN_SAID = {"The baker on the corner opens at six.", "We missed the ferry."}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Asset:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "monolingual").mkdir()
    (folder / "monolingual" / "en.sents.det").write_bytes(ENGLISH.encode())
    for language, lines in SENTENCES.items():
        (folder / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return assets.looked_up(sentences.TEXTS, str(folder))


def scene(num_samples: int = NUM_SAMPLES, **found: Asset) -> Scene:
    row = {"clip_id": "a", "kind": "speech", "corpus": "c", "licence": "l", "uri": "/a.wav", "duration_s": 8.0}
    clips = Clips(table.from_rows([{**row, "sample_rate": RATE, "channels": 1}], "clip.v1"))
    return Scene("a", None, num_samples, clips, assets=found)


# Texts


def test_sentences_are_the_lines_without_what_nobody_says(texts: Asset) -> None:
    found = sentences.sentences(texts)
    assert set(found) == {"en", "de", "fr", "es", "pt"}
    assert {found["en"][i] for i in range(len(found["en"]))} == EN_SAID | {"- ...", ""}
    for language, lines in SENTENCES.items():
        assert [found[language][i] for i in range(len(lines))] == lines


def test_texts_take_about_as_long_as_the_scene(texts: Asset) -> None:
    for seconds in (0.001, 2, 7.68, 60):
        wanted = max(1, round(18 * seconds))
        for seed in range(20):
            where = scene(round(seconds * RATE), texts=texts)
            text = sentences.drawn_text(np.random.default_rng(seed), where.assets["texts"], "en", where.num_samples)
            assert text and min(wanted, 40) - 1 <= len(text) <= max(2 * wanted, wanted + 40)
            assert (
                seconds < 7 or set(text.replace("six. ", "six.|").replace("ferry. ", "ferry.|").split("|")) <= EN_SAID
            )


def test_lines_are_found_across_blocks(tmp_path: Path) -> None:
    lines = [f"{'ä' * (i % 97)}{i}" for i in range(300_000)]
    (tmp_path / "en.txt").write_text("\n".join(lines), encoding="utf-8")
    found = sentences.Sentences(tmp_path / "en.txt")
    assert len(found) == len(lines) and found._bytes.size > 1 << 24
    for i in (0, 1, 1234, 170_000, 180_001, 299_999):
        assert found[i] == lines[i]


def test_folders_without_sentences_are_named(tmp_path: Path) -> None:
    (tmp_path / "de.txt").touch()
    empty = assets.looked_up(sentences.TEXTS, str(tmp_path))
    for draw in (generated.espeak.draw, generated.text_to_speech.draw):
        with pytest.raises(ValueError, match=f"{tmp_path} has no sentences"):
            draw(np.random.default_rng(0), scene(texts=empty, coqui=Asset("/models", "1")))
    (tmp_path / "de.txt").write_text("12\n...\n")
    with pytest.raises(ValueError, match=r"de\.txt has hardly a word"):
        generated.espeak.draw(np.random.default_rng(0), scene(texts=assets.looked_up(sentences.TEXTS, str(tmp_path))))


@pytest.mark.parametrize("name", ["espeak", "text_to_speech"])
def test_draws_are_equal_and_survive_json(name: str, texts: Asset) -> None:
    draw, where = components.component(f"generated.{name}").draw, scene(texts=texts, coqui=Asset("/models", "ab"))
    assert {need.name for need in components.component(f"generated.{name}").needs} <= set(where.assets)
    for seed in range(20):
        step = draw(np.random.default_rng(seed), where)
        assert draw(np.random.default_rng(seed), where) == step
        assert components.from_json(json.loads(json.dumps(components.to_json(step)))) == step
        assert degradation.generates(step) and step.clip_ids() == ()
    assert components.component(f"generated.{name}").network is (CoquiTts if name == "text_to_speech" else None)


def test_languages_without_text_are_not_drawn(tmp_path: Path) -> None:
    for language in ("de", "pt"):
        (tmp_path / f"{language}.txt").write_text("\n".join(SENTENCES[language]), encoding="utf-8")
    where = scene(texts=assets.looked_up(sentences.TEXTS, str(tmp_path)), coqui=Asset("/models", "ab"))
    rng = np.random.default_rng(0)
    spoken = Counter(generated.espeak.draw(rng, where).language for _ in range(300))
    assert set(spoken) == {"de", "pt"} and spoken["de"] == pytest.approx(150, abs=40)
    models = Counter(generated.text_to_speech.draw(rng, where).model for _ in range(400))
    assert set(models) == {name for name in MODELS if name.split("/")[1] in ("de", "pt")}
    assert min(models.values()) > 60


# espeak-ng


@pytest.fixture
def installed() -> None:
    pytest.importorskip("espeakng_loader", reason='espeak-ng is not installed: pip install "speechdistill[demo]"')


def test_what_was_said_before_changes_nothing(installed: None, texts: Asset) -> None:
    rng = np.random.default_rng(0)
    steps = [generated.espeak.draw(rng, scene(texts=texts)) for _ in range(16)]
    assert len({step.language for step in steps}) == 5
    waves = [step.apply(ANY) for step in steps]
    jobs: list[espeak_ng.Job] = [
        {"text": s.text, "voice": f"{generated._VOICES[s.language]}+{s.variant}", "pitch": s.pitch, "rate": s.rate}
        for s in steps
    ]
    for (pcm, rate), wave in zip(list(espeak_ng.speak(jobs[::-1]))[::-1], waves, strict=True):
        again = generated._finished(np.frombuffer(pcm, np.int16).astype(np.float32) / 32768, rate, NUM_SAMPLES)
        np.testing.assert_array_equal(again, wave)
    assert len({wave.tobytes() for wave in waves}) == len(waves)
    for wave in waves:
        assert wave.dtype == np.float32 and np.abs(wave).max() <= 1
        assert 0.6 * NUM_SAMPLES < len(wave) <= NUM_SAMPLES
        assert 0.01 < np.sqrt(np.mean(wave**2)) < 0.3


def test_short_texts_are_short_and_long_ones_cut(installed: None) -> None:
    short = EspeakNg("Hello.", "en", "f1", 50, 170, NUM_SAMPLES).apply(ANY)
    assert 0.2 * RATE < len(short) < 2 * RATE
    long = "The reading room in the basement stays open."
    whole = EspeakNg(long, "en", "f1", 50, 170, NUM_SAMPLES).apply(ANY)
    np.testing.assert_array_equal(EspeakNg(long, "en", "f1", 50, 170, 8_000).apply(ANY), whole[:8_000])
    np.testing.assert_array_equal(EspeakNg(long, "en", "f1", 50, 170, NUM_SAMPLES).apply(ANY[:8_000]), whole[:8_000])


def test_voices_that_do_not_exist_are_refused() -> None:
    for language, variant in (("it", "f1"), ("en", "f9")):
        with pytest.raises(ValueError, match="choose a language from"):
            EspeakNg("a", language, variant, 50, 170, RATE)


def test_louder_than_full_scale_is_brought_down() -> None:
    tone = np.sin(np.arange(RATE, dtype=np.float32))
    assert np.abs(generated._finished(3 * tone, RATE, RATE)).max() == pytest.approx(1)
    np.testing.assert_array_equal(generated._finished(tone, RATE, RATE), tone)


# Coqui TTS. Where it does not work, its place is taken by a stub with the same signatures: what is tested then is the
# adapter's own part (which files, configs, seeds, rates), not that Coqui TTS does what the adapter expects of it.

STUB = """
import json
import torch


class Synthesizer:
    def __init__(self, *, tts_checkpoint=None, tts_config_path=None, tts_speakers_file=None, vocoder_checkpoint=None,
                 vocoder_config=None, encoder_checkpoint=None, encoder_config=None, vc_checkpoint=None, vc_config=None,
                 voice_dir=None, use_cuda=False):
        self.gain = torch.nn.Linear(1, 1)  # draws, as a new network does
        self.gain.load_state_dict(torch.load(tts_checkpoint)["model"])
        with open(tts_config_path) as file:
            config = json.load(file)
        self.output_sample_rate = config["audio"]["sample_rate"]
        self.speakers = {}
        if config["speakers_file"]:
            with open(config["speakers_file"]) as file:
                self.speakers = json.load(file)
        if vocoder_checkpoint:
            with open(vocoder_config) as file:
                self.output_sample_rate = json.load(file)["audio"]["sample_rate"]

    def tts(self, text="", speaker_name="", language_name=None, **kwargs):
        pitch = 100 + 50 * (self.speakers[speaker_name] if self.speakers else 0)
        times = torch.arange(self.output_sample_rate * len(text) // 14) / self.output_sample_rate
        wave = 0.1 * torch.sin(2 * torch.pi * pitch * times) + 0.01 * torch.randn(len(times))
        return [float(sample) for sample in wave]
"""
TINY = {
    "tts_models/en/ljspeech/vits": (22_050, []),
    "tts_models/en/vctk/vits": (22_050, ["p225", "p226", "p376"]),
    "tts_models/pt/cv/vits": (24_000, []),
}


def works() -> bool:
    try:
        generated._coqui()
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def coqui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asset]:
    """A folder of tiny random models, VITS of Coqui TTS if it works, whose configs are from another machine."""
    folder, make, stub = tmp_path_factory.mktemp("tts"), real_model, tmp_path_factory.mktemp("stub")
    with pytest.MonkeyPatch.context() as patch:
        if not works():
            make = stub_model
            (stub / "TTS" / "utils").mkdir(parents=True)
            (stub / "TTS" / "__init__.py").touch()
            (stub / "TTS" / "utils" / "__init__.py").touch()
            (stub / "TTS" / "utils" / "synthesizer.py").write_text(STUB)
            patch.syspath_prepend(stub)
            for name in [name for name in sys.modules if name.partition(".")[0] == "TTS"]:
                patch.delitem(sys.modules, name)
        for name, (rate, speakers) in TINY.items():
            model = folder / name.replace("/", "--")
            model.mkdir()
            if speakers:
                (model / "speaker_ids.json").write_text(json.dumps({s: i for i, s in enumerate(speakers)}))
            make(model, rate, len(speakers))
        with pytest.raises(MissingError, match="lacks tts_models--de--css10--vits-neon"):
            assets.looked_up(CoquiTts.need, str(folder))
        patch.setattr(CoquiTts, "need", replace(CoquiTts.need, every=False))
        with pytest.raises(ValueError, match="has no model file"):
            generated.Models(folder, "cpu")
        patch.setattr(generated, "MODELS", dict.fromkeys(TINY))
        yield assets.looked_up(CoquiTts.need, str(folder))
        for name in [name for name in sys.modules if make is stub_model and name.partition(".")[0] == "TTS"]:
            del sys.modules[name]


def stub_model(folder: Path, rate: int, num_speakers: int) -> None:
    torch.save({"model": torch.nn.Linear(1, 1).state_dict()}, folder / "model_file.pth")
    speakers = "/another/machine/speaker_ids.json" if num_speakers else None
    (folder / "config.json").write_text(json.dumps({"audio": {"sample_rate": rate}, "speakers_file": speakers}))


def real_model(folder: Path, rate: int, num_speakers: int) -> None:
    from TTS.config.shared_configs import BaseAudioConfig
    from TTS.tts.configs.vits_config import VitsArgs, VitsConfig
    from TTS.tts.models.vits import Vits

    args = VitsArgs(
        hidden_channels=16,
        hidden_channels_ffn_text_encoder=16,
        num_layers_text_encoder=1,
        num_layers_posterior_encoder=1,
        num_layers_flow=1,
        upsample_initial_channel_decoder=32,
    )
    config = VitsConfig(model_args=args, audio=BaseAudioConfig(sample_rate=rate), use_phonemes=False)
    config.text_cleaner = "basic_cleaners"
    if num_speakers:
        config.use_speaker_embedding = args.use_speaker_embedding = True
        config.num_speakers = args.num_speakers = num_speakers
        config.speakers_file = args.speakers_file = str(folder / "speaker_ids.json")
    torch.save({"model": Vits(config).state_dict()}, folder / "model_file.pth")
    config.save_json(folder / "config.json")
    text = (folder / "config.json").read_text().replace(str(folder), "/another/machine")
    (folder / "config.json").write_text(text)


def step(coqui: Asset, model: str, speaker: str | None = None, seed: int = 7, num_samples: int = 32_000) -> CoquiTts:
    text = "The baker opens at six. The smell of bread has reached us."
    return CoquiTts(*coqui, model, speaker, model.split("/")[1], text, seed, num_samples)


@pytest.mark.parametrize("model", TINY)
def test_models_say_the_same_with_the_same_seed(model: str, coqui: Asset) -> None:
    speaker = "p226" if "vctk" in model else None
    before = torch.random.get_rng_state()
    wave = step(coqui, model, speaker).apply(ANY)
    again, another = (step(coqui, model, speaker, seed).apply(ANY) for seed in (7, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert wave.dtype == np.float32 and 8_000 < len(wave) <= 32_000 and 0.001 < np.abs(wave).max() <= 1
    np.testing.assert_array_equal(again, wave)
    assert wave.shape != another.shape or np.abs(wave - another).max() > 1e-4
    np.testing.assert_array_equal(step(coqui, model, speaker, num_samples=8_000).apply(ANY), wave[:8_000])


def test_speakers_differ_and_batches_are_as_each_alone(coqui: Asset) -> None:
    first, last = (step(coqui, "tts_models/en/vctk/vits", speaker) for speaker in ("p225", "p376"))
    waves = degradation.apply_together([first, last, first], [ANY] * 3, [True] * 3)
    np.testing.assert_array_equal(waves[0], waves[2])
    np.testing.assert_array_equal(waves[1], last.apply(ANY))
    assert waves[0].shape != waves[1].shape or np.abs(waves[0] - waves[1]).max() > 1e-4


def test_models_that_are_not_there_or_not_models_are_named(
    coqui: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"choose from \['tts_models/en/ljspeech/vits'"):
        step(coqui, "tts_models/it/mai_female/vits").apply(ANY)
    monkeypatch.setattr(generated, "MODELS", {"tts_models/pt/cv/vits": None})
    broken = tmp_path / "tts_models--pt--cv--vits"
    broken.mkdir()
    (broken / "model_file.pth").write_bytes(b"not a model")
    (broken / "config.json").write_bytes(Path(coqui.source, broken.name, "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"model_file\.pth \(vocoder: None\) is not Coqui's tts_models/pt/cv/vits"):
        step(assets.looked_up(CoquiTts.need, str(tmp_path)), "tts_models/pt/cv/vits").apply(ANY)


def test_a_vocoder_sets_the_rate(coqui: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "stub" not in inspect.getfile(generated._coqui()):
        pytest.skip("a vocoder of Coqui TTS is not tiny")
    for name, rate in (
        ("tts_models/de/thorsten/tacotron2-DDC", 22_050),
        ("vocoder_models/de/thorsten/hifigan_v1", 24_000),
    ):
        folder = tmp_path / name.replace("/", "--")
        folder.mkdir()
        stub_model(folder, rate, 0)
    pair = {"tts_models/de/thorsten/tacotron2-DDC": "vocoder_models/de/thorsten/hifigan_v1"}
    monkeypatch.setattr(generated, "MODELS", pair)
    models = generated.Models(tmp_path, "cpu")
    assert models.synthesizer("tts_models/de/thorsten/tacotron2-DDC").output_sample_rate == 24_000


def test_without_coqui_tts_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "TTS"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "TTS", None)
    with pytest.raises(ImportError, match=r"pip install \"coqui-tts"):
        generated.Models(tmp_path, "cpu")
    with pytest.raises(ImportError, match=r"pip install \"coqui-tts"):
        components.component("generated.text_to_speech").check()


def test_the_paper_s_seventeen_models() -> None:
    assert Counter(name.split("/")[1] for name in MODELS) == {"en": 9, "de": 3, "fr": 2, "es": 2, "pt": 1}
    assert len(generated.SPEAKERS["tts_models/en/vctk/vits"]) == 108
