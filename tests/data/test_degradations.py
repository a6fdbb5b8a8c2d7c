"""The classical degradations: aligned, of equal length, finite, reproducible, and as strong as they say."""

import hashlib
import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate, lfilter

from speechdistill.data import components, degradation
from speechdistill.data.clips import Clips
from speechdistill.data.degradation import Scene, Step
from speechdistill.data.degradations import codecs, denoisers, levels, noise, packets, rooms
from speechdistill.io import audio, table
from speechdistill.io.errors import AudioError

RATE = audio.SAMPLE_RATE
COMPONENTS = (
    *("rooms.room", "noise.noise", "denoisers.spectral_gating", "codecs.opus", "codecs.band_limit"),
    *("codecs.g711", "codecs.g722", "codecs.amr_nb", "packets.opus_loss", "levels.clipping", "levels.level_changes"),
)


def speech(duration_s: float = 2.0, seed: int = 0, f0: float = 120.0) -> np.ndarray:
    """Something with the structure of speech: voiced and unvoiced syllables, formants, pauses between."""
    rng = np.random.default_rng(seed)
    n = round(duration_s * RATE)
    time_s = np.arange(n) / RATE
    phase = np.cumsum(f0 * (1 + 0.2 * np.sin(2 * np.pi * 0.7 * time_s + seed))) / RATE
    source = np.diff(np.floor(phase), prepend=0) + 0.03 * rng.standard_normal(n)
    for formant_hz, width_hz in ((600, 80), (1300, 110), (2600, 160), (5200, 400)):
        radius, angle = np.exp(-np.pi * width_hz / RATE), 2 * np.pi * formant_hz / RATE
        source += 0.5 * lfilter([1 - radius], [1, -2 * radius * np.cos(angle), radius**2], source)
    wave = source * np.clip(np.sin(2 * np.pi * 1.6 * time_s) + 0.4, 0, 1)
    return np.asarray(0.4 * wave / np.abs(wave).max(), dtype=np.float32)


def rms_db(wave: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(wave, dtype=np.float64)) + 1e-30))


def lag(wave: np.ndarray, degraded: np.ndarray, furthest: int = 200) -> int:
    """Samples by which `degraded` comes late, from the cross-correlation."""
    inner = wave[furthest:-furthest].astype(np.float64)
    scores = correlate(degraded.astype(np.float64), inner, "valid", "fft")
    return int(np.argmax(scores)) - furthest


def write(path: Path, wave: np.ndarray, sample_rate: int = RATE) -> Path:
    soundfile.write(path, wave, sample_rate, subtype="FLOAT")
    return path


def decaying_room(seed: int = 0, delay: int = 300) -> np.ndarray:
    rng = np.random.default_rng(seed)
    response = 0.3 * rng.standard_normal(RATE // 2) * 10 ** (-3 * np.arange(RATE // 2) / (0.4 * RATE))
    response[:delay] = 0
    response[delay] = 1
    return response.astype(np.float32)


def clip(path: Path, kind: str, speaker: str | None = None) -> dict[str, object]:
    info = audio.probe(str(path))
    return {
        "clip_id": f"id-{path.stem}",
        "uri": str(path),
        "kind": kind,
        "speaker": speaker,
        "duration_s": info.duration_s,
        "sample_rate": info.sample_rate,
        "channels": info.channels,
    }


def scene(*rows: dict[str, object], num_samples: int = RATE, **numbers: float) -> Scene:
    speaker = next((row["speaker"] for row in rows if row["clip_id"] == "id-talker0"), None)
    return Scene("id-talker0", speaker, num_samples, Clips(table.from_rows(rows, "clip.v1")), **numbers)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(1)
    waves = {f"talker{i}": speech(1.0 + i / 4, i, 100 + 20 * i) for i in range(6)}
    waves["long"] = 0.1 * rng.standard_normal(3 * RATE).astype(np.float32)
    waves["short"] = 0.1 * rng.standard_normal(RATE // 4).astype(np.float32)
    waves["room"] = decaying_room()
    return {name: write(folder / f"{name}.wav", wave) for name, wave in waves.items()}


NAMES = (
    *("measured room", "simulated room", "recorded noise", "looped noise", "coloured noise", "babble"),
    *("stationary gating", "moving gating", "opus 6", "opus 32", "band limit"),
    *("a-law", "mu-law", "g722", "amr 4.75", "amr 12.2", "lost", "repaired", "clipping", "levels"),
)
ADDITIVE = ("recorded noise", "looped noise", "coloured noise", "babble")
ROOMS = dict.fromkeys(("measured room", "simulated room"), 1)
CODECS = dict.fromkeys(("opus 6", "opus 32", "lost", "repaired", "g722", "amr 4.75", "amr 12.2"), 16)
LAGS = {**ROOMS, **CODECS}  # samples; of all others 0


@pytest.fixture(scope="module")
def steps(files: dict[str, Path]) -> dict[str, Step]:
    talkers = tuple((f"id-talker{i}", str(files[f"talker{i}"]), 0, RATE, 77 * i) for i in range(3))
    made: tuple[Step, ...] = (
        rooms.MeasuredRoom("id-room", str(files["room"])),
        rooms.SimulatedRoom((6.0, 5.0, 3.0), 0.6, (1.0, 1.5, 1.2), (3.0, 3.5, 1.6), 9),
        noise.RecordedNoise("id-long", str(files["long"]), 500, 2 * RATE, 0, 12.0),
        noise.RecordedNoise("id-short", str(files["short"]), 0, RATE // 4, 321, 12.0),
        noise.ColouredNoise(1.3, 5, 12.0),
        noise.Babble(talkers, 12.0),
        denoisers.SpectralGating(True, 0.9),
        denoisers.SpectralGating(False, 0.9),
        codecs.Opus(6_000),
        codecs.Opus(32_000),
        codecs.BandLimit(),
        codecs.Telephone("g711_alaw"),
        codecs.Telephone("g711_ulaw"),
        codecs.Telephone("g722"),
        codecs.Telephone("amr_nb", 4_750),
        codecs.Telephone("amr_nb", 12_200),
        packets.OpusLoss(16_000, 0.1, 3.0, False, 1),
        packets.OpusLoss(24_000, 0.1, 1 / 0.9, True, 1),
        levels.Clipping(6.0),
        levels.LevelChanges(((4_000, -6.0), (9_000, 3.0))),
    )
    return dict(zip(NAMES, made, strict=True))


# Every step


def assert_keeps_the_contract(step: Step, wave: np.ndarray) -> None:
    before = wave.copy()
    wave.setflags(write=False)
    degraded = step.apply(wave)
    assert degraded.dtype == np.float32
    assert degraded.shape == wave.shape
    assert np.isfinite(degraded).all()
    np.testing.assert_array_equal(wave, before)


@given(
    length=st.sampled_from([1, 2, 159, 320, 321, 2047, 2048, 2049, 9000]),
    kind=st.sampled_from(["silence", "dc", "noise", "click", "gap", "square"]),
    gain=st.sampled_from([1e-30, 1e-4, 1.0, 300.0]),
)
@settings(max_examples=15, deadline=None)
def test_any_audio_comes_out_finite_and_of_the_same_length(
    steps: dict[str, Step], length: int, kind: str, gain: float
) -> None:
    index = np.arange(length)
    white = np.random.default_rng(length).standard_normal(length)
    wave = {
        "silence": np.zeros(length),
        "dc": np.ones(length),
        "noise": white,
        "click": 1.0 * (index == length // 2),
        "gap": white * (np.abs(index - length / 2) > length / 4),
        "square": np.where(index // 8 % 2, 1.0, -1.0),
    }[kind]
    for step in steps.values():
        assert_keeps_the_contract(step, (gain * wave).astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_a_minute_keeps_its_length(steps: dict[str, Step], name: str) -> None:
    assert_keeps_the_contract(steps[name], np.tile(speech(2.0), 30)[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_the_wave_stays_aligned(steps: dict[str, Step], name: str) -> None:
    wave = speech(3.0)
    assert abs(lag(wave, steps[name].apply(wave))) <= LAGS.get(name, 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ADDITIVE])
def test_the_end_of_a_clip_is_not_lost(steps: dict[str, Step], name: str) -> None:
    wave = speech(1.0, f0=200)[: RATE // 2 - 13]
    end = slice(len(wave) - 60, None)
    wave[-1600:] = 0.4 * np.sin(np.arange(1600) / 6)
    assert rms_db(steps[name].apply(wave)[end]) > rms_db(wave[end]) - 18


@pytest.mark.parametrize("name", NAMES)
def test_json_brings_back_the_step_and_its_effect(steps: dict[str, Step], name: str) -> None:
    step, wave = steps[name], speech(0.5)
    again = components.from_json(json.loads(json.dumps(components.to_json(step))))
    assert again == step
    assert again.clip_ids() == step.clip_ids()
    np.testing.assert_array_equal(again.apply(wave), step.apply(wave))


def test_steps_name_the_clips_that_they_read(steps: dict[str, Step]) -> None:
    assert steps["measured room"].clip_ids() == ("id-room",)
    assert steps["recorded noise"].clip_ids() == ("id-long",)
    assert steps["babble"].clip_ids() == ("id-talker0", "id-talker1", "id-talker2")
    assert steps["coloured noise"].clip_ids() == steps["opus 6"].clip_ids() == ()


OTHER_PROCESS = """
import hashlib, json, sys
import numpy as np
from speechdistill.data import components
wave = np.load(sys.argv[1])
for line in reversed(sys.stdin.read().splitlines()):
    degraded = components.from_json(json.loads(line)).apply(wave)
    print(hashlib.sha256(degraded.tobytes()).hexdigest())
"""


@pytest.mark.server
def test_another_process_makes_the_same_bits(steps: dict[str, Step], tmp_path: Path) -> None:
    wave = speech(2.0)
    np.save(tmp_path / "wave.npy", wave)
    lines = "\n".join(json.dumps(components.to_json(step)) for step in steps.values())
    threads = {"OMP_NUM_THREADS": "1", "PRA_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    source = str(Path(degradation.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OTHER_PROCESS, str(tmp_path / "wave.npy")],
        input=lines,
        env={**os.environ, **threads, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [hashlib.sha256(step.apply(wave).tobytes()).hexdigest() for step in steps.values()]
    assert done.stdout.split()[::-1] == here


def test_no_global_state_changes(steps: dict[str, Step]) -> None:
    def state() -> list[object]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        return [
            *(numpy_state[0], numpy_state[1].tobytes(), numpy_state[2:]),
            random.getstate(),
            torch.random.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
        ]

    before = state()
    for step in steps.values():
        step.apply(speech(0.5))
    assert state() == before


# Drawing


@pytest.fixture
def rich(files: dict[str, Path]) -> Scene:
    rows = [clip(files[f"talker{i}"], "speech") for i in range(6)]
    rows += [clip(files[name], "noise") for name in ("long", "short")]
    return scene(*rows, clip(files["room"], "rir"))


@pytest.fixture
def poor(files: dict[str, Path]) -> Scene:
    return scene(*[clip(files[f"talker{i}"], "speech") for i in range(6)])


def drawn(component: str, where: Scene, count: int) -> list[Step]:
    draw = components.component(component).draw
    return [draw(np.random.default_rng(seed), where) for seed in range(count)]


@pytest.mark.parametrize("component", COMPONENTS)
def test_draws_are_json_and_repeat_with_their_seed(component: str, rich: Scene, poor: Scene) -> None:
    for where in (rich, poor):
        for first, second in zip(drawn(component, where, 40), drawn(component, where, 40), strict=True):
            assert first == second
            text = json.dumps(components.to_json(first), allow_nan=False)
            assert components.from_json(json.loads(text)) == first


@pytest.mark.parametrize("component", COMPONENTS)
def test_drawn_steps_work(component: str, rich: Scene, poor: Scene) -> None:
    for where in (rich, poor):
        for step in drawn(component, where, 4):
            assert_keeps_the_contract(step, speech(1.0))


def test_an_unknown_component_is_answered_with_the_families() -> None:
    with pytest.raises(ValueError, match=r"codecs.*denoisers.*noise.*rooms"):
        components.component("reverb.room")
    with pytest.raises(ValueError, match="codecs has no mp3"):
        components.component("codecs.mp3")


def test_codec_and_denoiser_draws_span_their_ranges(poor: Scene) -> None:
    rates = np.array([step.bitrate_bps for step in drawn("codecs.opus", poor, 300)])
    assert (rates.min(), rates.max()) == (pytest.approx(6e3, rel=0.1), pytest.approx(32e3, rel=0.1))
    assert np.median(rates) == pytest.approx(np.sqrt(6e3 * 32e3), rel=0.15)
    gates = drawn("denoisers.spectral_gating", poor, 300)
    assert 0.4 < np.mean([gate.stationary for gate in gates]) < 0.6
    assert 0.6 <= min(gate.strength for gate in gates) < max(gate.strength for gate in gates) <= 1


# Rooms


def test_scale_and_polarity_of_a_room_do_not_matter(tmp_path: Path) -> None:
    wave = speech()
    outputs = [
        rooms.MeasuredRoom("r", str(write(tmp_path / f"{gain}.wav", gain * decaying_room()))).apply(wave)
        for gain in (1.0, 0.01, -0.3)
    ]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-6)
    np.testing.assert_allclose(outputs[2], outputs[0], atol=1e-6)


@pytest.mark.parametrize("name", ["measured room", "simulated room"])
def test_a_room_keeps_the_level_and_blurs_the_wave(steps: dict[str, Step], name: str) -> None:
    wave = speech()
    wet = steps[name].apply(wave)
    assert rms_db(wet) == pytest.approx(rms_db(wave), abs=0.01)
    assert rms_db(wet - wave) > rms_db(wave) - 20


def test_only_the_named_channel_is_heard(tmp_path: Path) -> None:
    one, other = decaying_room(1), decaying_room(2, delay=900)
    stereo = str(write(tmp_path / "stereo.wav", np.stack([one, other], axis=1)))
    alone = str(write(tmp_path / "alone.wav", one))
    wave = speech()
    np.testing.assert_array_equal(
        rooms.MeasuredRoom("s", stereo).apply(wave), rooms.MeasuredRoom("a", alone).apply(wave)
    )
    assert (rooms.MeasuredRoom("s", stereo, 1).apply(wave) != rooms.MeasuredRoom("s", stereo).apply(wave)).any()


def test_of_a_long_response_only_the_beginning_is_read(tmp_path: Path) -> None:
    response = audio.fit(decaying_room(), 6 * RATE)
    response[5 * RATE :] = np.nan  # a read of it would be refused
    room = rooms.MeasuredRoom("r", str(write(tmp_path / "long.wav", response)))
    assert lag(speech(), room.apply(speech())) == 0


@pytest.mark.parametrize("level", [0.0, 1e-9])
def test_a_silent_response_is_an_error_that_says_what_to_do(tmp_path: Path, level: float) -> None:
    room = rooms.MeasuredRoom("r", str(write(tmp_path / "r.wav", np.full(800, level, np.float32))))
    with pytest.raises(AudioError, match=r"r\.wav.*silent.*leave it out"):
        room.apply(speech())


def test_a_room_comes_from_the_manifest_where_it_has_some(rich: Scene, poor: Scene) -> None:
    assert {step.clip_ids() for step in drawn("rooms.room", rich, 5)} == {("id-room",)}
    assert {type(step) for step in drawn("rooms.room", poor, 5)} == {rooms.SimulatedRoom}


def test_simulated_rooms_are_plausible(poor: Scene) -> None:
    for step in drawn("rooms.room", poor, 300):
        size, source, microphone = map(np.array, (step.size_m, step.source_m, step.microphone_m))
        for position in (source, microphone):
            assert (position >= 0.5).all() and (position <= size - 0.5).all()
        assert np.linalg.norm(source - microphone) >= 0.5
        assert 0.2 <= step.rt60_s <= 0.8


def decay_s(response: np.ndarray) -> float:
    """RT60 from the slope between -5 and -25 dB of Schroeder's backward integral (ISO 3382-1, T20)."""
    energy = np.cumsum(response[::-1] ** 2)[::-1]
    level_db = 10 * np.log10(energy / energy[0])
    first, last = np.argmax(level_db < -5), np.argmax(level_db < -25)
    slope = np.polyfit(np.arange(first, last) / RATE, level_db[first:last], 1)[0]
    return float(-60 / slope)


def test_simulated_rooms_decay_as_their_rt60_says(poor: Scene) -> None:
    for step in drawn("rooms.room", poor, 25):
        response = step.response()
        assert decay_s(response) == pytest.approx(step.rt60_s, rel=0.25)
        assert response[0] == pytest.approx(1, abs=0.1)  # the direct path


def test_even_a_dry_hall_can_be_simulated() -> None:
    hall = rooms.SimulatedRoom((30.0, 20.0, 12.0), 0.2, (2.0, 2.0, 2.0), (25.0, 15.0, 2.0), 0)
    assert np.isfinite(hall.apply(speech())).all()  # Sabine's formula has no absorption for it


# Noise and its level


def sine(amplitude: float, duration_s: float) -> np.ndarray:
    return np.asarray(amplitude * np.sin(0.2 * np.arange(round(duration_s * RATE))), dtype=np.float32)


def test_the_active_level_of_a_steady_sine_is_its_rms_level() -> None:
    assert noise.active_level_db(sine(0.3, 4.0)) == pytest.approx(rms_db(sine(0.3, 4.0)), abs=0.1)
    assert noise.active_level_db(sine(1.0, 8.0)) == pytest.approx(-3.01, abs=0.1)


def test_pauses_do_not_count_beyond_the_hangover() -> None:
    burst = sine(0.3, 4.0)
    wave = np.concatenate([burst, 0 * burst] * 3)
    assert rms_db(wave) == pytest.approx(rms_db(burst) - 3.01, abs=0.05)
    assert noise.active_level_db(wave) == pytest.approx(rms_db(burst), abs=0.5)
    assert noise.active_level_db(wave) < rms_db(burst)  # 0.2 s of hangover are counted


@pytest.mark.parametrize("gain", [1e-6, 0.037, 0.5, 40.0])
def test_the_meter_is_indifferent_to_scale(gain: float) -> None:
    wave = speech().astype(np.float64)
    expected = noise.active_level_db(wave) + 20 * np.log10(gain)
    assert noise.active_level_db(gain * wave) == pytest.approx(expected, abs=1e-6)


def test_the_meter_of_silence_and_of_a_click() -> None:
    assert noise.active_level_db(np.zeros(100, np.float32)) == -np.inf
    click = np.zeros(RATE, np.float32)
    click[100] = 1
    assert -50 < noise.active_level_db(click) < 0


def level_by_the_letter(wave: np.ndarray) -> float:
    """ITU-T P.56, method B, sample by sample: processes 1 and 2 with one counter pair per threshold."""
    g, hangover, p, q = np.exp(-1 / (0.03 * RATE)), round(0.2 * RATE), 0.0, 0.0
    thresholds = 2.0 ** -np.arange(15, 0, -0.25)
    active, hung = np.zeros(len(thresholds)), np.full(len(thresholds), hangover)
    for sample in np.abs(wave.astype(np.float64)):
        p = g * p + (1 - g) * sample
        q = g * q + (1 - g) * p
        above = q >= thresholds
        hanging = ~above & (hung < hangover)
        active += above | hanging
        hung = np.where(above, 0, hung + hanging)
    levels_db = 10 * np.log10(np.sum(wave.astype(np.float64) ** 2) / np.maximum(active, 1))
    within = (levels_db - 20 * np.log10(thresholds) <= 15.9) & (active > 0)
    return float(levels_db[np.argmax(within)])


@pytest.mark.parametrize("seed", range(3))
def test_the_meter_agrees_with_the_recommendation_by_the_letter(seed: int) -> None:
    wave = np.concatenate([speech(1.0, seed), np.zeros(RATE // 2, np.float32), 0.2 * speech(0.7, seed + 5)])
    assert noise.active_level_db(wave) == pytest.approx(level_by_the_letter(wave), abs=0.2)


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("snr_db", [-15.0, 0.0, 12.5, 40.0])
def test_the_mix_has_its_snr(steps: dict[str, Step], name: str, snr_db: float) -> None:
    wave = 1.9 * speech(1.7)
    step = components.from_json({**components.to_json(steps[name]), "snr_db": snr_db})
    added = step.apply(wave).astype(np.float64) - wave
    assert noise.active_level_db(wave) - rms_db(added) == pytest.approx(snr_db, abs=0.1)


def test_silent_speech_gets_noise_below_the_nominal_level(steps: dict[str, Step]) -> None:
    for name in ("recorded noise", "coloured noise", "babble"):
        assert rms_db(steps[name].apply(np.zeros(RATE, np.float32))) == pytest.approx(-26 - 12, abs=0.1)


def test_silent_noise_adds_nothing(tmp_path: Path) -> None:
    path = str(write(tmp_path / "silent.wav", np.zeros(RATE, np.float32)))
    wave = speech()
    section = ("s", path, 0, RATE, 0)
    np.testing.assert_array_equal(noise.RecordedNoise(*section, snr_db=0.0).apply(wave), wave)
    np.testing.assert_array_equal(noise.Babble((section,) * 3, 0.0).apply(wave), wave)


def test_of_a_long_recording_only_the_section_is_read(tmp_path: Path) -> None:
    recording = np.full(4 * RATE, np.nan, np.float32)  # a read of it would be refused
    part = np.random.default_rng(3).standard_normal(RATE).astype(np.float32)
    recording[RATE : 2 * RATE + 10] = np.append(part, np.ones(10, np.float32))
    path = str(write(tmp_path / "long.wav", recording))
    wave = speech(1.0)
    added = noise.RecordedNoise("n", path, RATE, RATE, 0, 0.0).apply(wave) - wave
    assert np.corrcoef(added, part)[0, 1] > 0.99999


def test_a_short_recording_is_looped_from_its_offset(tmp_path: Path) -> None:
    part = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    path = str(write(tmp_path / "short.wav", part))
    wave = speech(1.0)
    added = noise.RecordedNoise("n", path, 0, 1000, 250, 0.0).apply(wave) - wave
    assert np.corrcoef(added, np.resize(np.roll(part, -250), RATE))[0, 1] > 0.99999


def test_drawn_sections_lie_inside_their_recordings_and_begin_anywhere(rich: Scene) -> None:
    long = [step for step in drawn("noise.noise", rich, 200) if step.clip_id == "id-long"]
    short = [step for step in drawn("noise.noise", rich, 200) if step.clip_id == "id-short"]
    assert 60 < len(long) < 140
    assert {(step.num_samples, step.offset) for step in long} == {(RATE, 0)}
    starts = np.array([step.start for step in long])
    assert 0 <= starts.min() < RATE / 4 and 1.75 * RATE < starts.max() <= 2 * RATE
    assert {(step.start, step.num_samples) for step in short} == {(0, RATE // 4)}
    assert len({step.offset for step in short}) > 50


def test_snr_is_normal_with_the_mean_and_sigma_of_the_scene(poor: Scene) -> None:
    where = Scene(poor.clip_id, poor.speaker, RATE, poor.clips, snr_mean_db=7.0, snr_sigma_db=3.0)
    snrs = [step.snr_db for step in drawn("noise.noise", where, 600)]
    assert np.mean(snrs) == pytest.approx(7, abs=0.5)
    assert np.std(snrs) == pytest.approx(3, abs=0.4)


def kinds(steps: list[Step]) -> set[type]:
    return {type(step) for step in steps}


def test_without_recordings_noise_is_coloured_or_babble_of_others(poor: Scene, rich: Scene) -> None:
    assert kinds(drawn("noise.noise", rich, 30)) == {noise.RecordedNoise}
    found = drawn("noise.noise", poor, 300)
    babble = [step for step in found if isinstance(step, noise.Babble)]
    assert kinds(found) == {noise.Babble, noise.ColouredNoise}
    assert 110 < len(babble) < 190
    for step in babble:
        assert "id-talker0" not in step.clip_ids()
        assert len(set(step.clip_ids())) == len(step.talkers)
    assert {len(step.talkers) for step in babble} == {3, 4, 5}  # six clips, one of them is the scene's


def test_nobody_babbles_over_himself(files: dict[str, Path]) -> None:
    speakers = ["ann", "bob", "ann", "cem", "dee", None]
    where = scene(*[clip(files[f"talker{i}"], "speech", speakers[i]) for i in range(6)])
    heard = {name for step in drawn("noise.noise", where, 100) for name in step.clip_ids()}
    assert heard == {"id-talker1", "id-talker3", "id-talker4", "id-talker5"}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_babble_needs_three_others(files: dict[str, Path], count: int) -> None:
    where = scene(*[clip(files[f"talker{i}"], "speech") for i in range(count)])
    assert kinds(drawn("noise.noise", where, 30)) == {noise.ColouredNoise}


def test_talkers_are_equally_loud(tmp_path: Path) -> None:
    tones = {500: 0.5, 2000: 0.005}
    talkers = []
    for hz, amplitude in tones.items():
        tone = amplitude * np.sin(2 * np.pi * hz * np.arange(RATE) / RATE).astype(np.float32)
        talkers.append((f"{hz}", str(write(tmp_path / f"{hz}.wav", tone)), 0, RATE, 0))
    both = noise.Babble(tuple(talkers), 10.0).apply(np.zeros(RATE, np.float32))
    assert band_db(both, 400, 600) == pytest.approx(band_db(both, 1900, 2100), abs=0.2)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_noise_has_its_colour(exponent: float) -> None:
    added = noise.ColouredNoise(exponent, 3, 0.0).apply(np.zeros(8 * RATE, np.float32))
    power = np.abs(np.fft.rfft(added)) ** 2
    bands_hz = 60.0 * 2 ** np.arange(0, 7, 0.5)
    edges = np.round(bands_hz * 8).astype(int)
    levels = [np.log2(power[a:b].mean()) for a, b in pairwise(edges)]
    slope = np.polyfit(np.log2(bands_hz[:-1]), levels, 1)[0]
    assert -slope == pytest.approx(exponent, abs=0.15)
    assert power[: 15 * 8].sum() < 1e-3 * power.sum()


# Denoisers


@pytest.mark.parametrize("stationary", [True, False])
def test_gating_lowers_noise_and_leaves_speech(stationary: bool) -> None:
    wave = np.concatenate([speech(1.5), np.zeros(RATE, np.float32), speech(1.5, 4)])
    noisy = noise.ColouredNoise(0.0, 1, 25.0).apply(wave)
    pause = slice(round(1.65 * RATE), round(2.35 * RATE))
    weak, strong = (denoisers.SpectralGating(stationary, s).apply(noisy) for s in (0.6, 1.0))
    assert rms_db(strong[pause]) < rms_db(weak[pause]) < rms_db(noisy[pause]) - 3
    assert np.corrcoef(strong, wave)[0, 1] > 0.8


@pytest.mark.parametrize("stationary", [True, False])
@pytest.mark.parametrize("duration_s", [0.128, 0.4, 2.0])  # 9 frames are less than the convolutions reach
def test_gating_is_that_of_the_library(stationary: bool, duration_s: float) -> None:
    from noisereduce.torchgate import TorchGate

    noisy = noise.ColouredNoise(1.0, 2, 10.0).apply(speech(2.0))[: round(duration_s * RATE) // 256 * 256]
    theirs = TorchGate(RATE, not stationary, n_movemean_nonstationary=21, prop_decrease=0.8)
    expected = theirs(torch.from_numpy(noisy)[None])[0].numpy()
    np.testing.assert_allclose(denoisers.SpectralGating(stationary, 0.8).apply(noisy), expected, atol=1e-6)


def test_only_the_moving_threshold_follows_louder_noise() -> None:
    hiss = 0.01 * np.random.default_rng(0).standard_normal(8 * RATE).astype(np.float32)
    hiss[4 * RATE : 5 * RATE] *= 10
    louder = slice(round(4.3 * RATE), round(4.7 * RATE))
    fixed, moving = (denoisers.SpectralGating(stationary, 1.0).apply(hiss) for stationary in (True, False))
    assert rms_db(moving[louder]) < rms_db(hiss[louder]) - 20 < rms_db(fixed[louder]) - 15


def test_digital_silence_spoils_nothing_beside_it() -> None:
    tone = sine(0.3, 1.0) * np.linspace(0, 1, RATE, dtype=np.float32) ** 4
    hiss = 1e-7 * np.random.default_rng(0).standard_normal(3 * RATE).astype(np.float32)
    wave = np.concatenate([np.zeros(RATE, np.float32), tone, np.zeros(RATE, np.float32)])
    gate = denoisers.SpectralGating(False, 1.0)
    np.testing.assert_allclose(gate.apply(wave), gate.apply(wave + hiss), atol=1e-3)
    assert rms_db(gate.apply(wave)) > -60


# Codecs


def band_db(wave: np.ndarray, low_hz: float, high_hz: float) -> float:
    power = np.abs(np.fft.rfft(wave.astype(np.float64) * np.hanning(len(wave)))) ** 2
    hz = np.fft.rfftfreq(len(wave), 1 / RATE)
    return float(10 * np.log10(power[(hz >= low_hz) & (hz < high_hz)].sum() + 1e-30))


@pytest.mark.parametrize("cutoff_hz", [3000, 4000, 6000])
def test_the_band_ends_at_the_cutoff(cutoff_hz: int) -> None:
    white = 0.1 * np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)
    narrow = codecs.BandLimit(cutoff_hz).apply(white)
    above, below = (1.05 * cutoff_hz, 8000), (100, 0.85 * cutoff_hz)
    assert band_db(narrow, *above) < band_db(white, *above) - 40
    assert band_db(narrow, *below) == pytest.approx(band_db(white, *below), abs=0.2)


def test_the_drawn_band_limit_is_4_khz(poor: Scene) -> None:
    assert drawn("codecs.band_limit", poor, 1) == [codecs.BandLimit(4000)]


def test_more_bits_are_larger_and_better() -> None:
    wave = speech(3.0)
    sizes, errors = [], []
    for bitrate_bps in (6_000, 12_000, 32_000):
        opus = codecs.Opus(bitrate_bps)
        sizes.append(sum(map(len, opus.encode(wave)[0])))
        spectra = [np.log(np.abs(np.fft.rfft(np.resize(x, (150, 320)))) + 1e-2) for x in (wave, opus.apply(wave))]
        errors.append(np.abs(spectra[0] - spectra[1]).mean())
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    assert sizes[2] > 2 * sizes[0]


def test_opus_neither_clips_nor_wraps_above_full_scale() -> None:
    loud = speech(1.0) / np.float32(0.4)  # of peak 1
    opus = codecs.Opus(32_000)
    np.testing.assert_array_equal(opus.apply(8 * loud), 8 * opus.apply(loud))
    assert np.corrcoef(opus.apply(8 * loud), loud)[0, 1] > 0.6


# Codecs of telephony, lost packets, levels


@pytest.mark.parametrize("loss", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("mean_burst", [None, 4.0])
def test_losses_have_their_rate_and_burst_length(loss: float, mean_burst: float | None) -> None:
    count, burst = 200_000, mean_burst or 1 / (1 - loss)
    lost = ~packets.OpusLoss(24_000, loss, burst, True, seed=3).arrives(count)
    starts = np.flatnonzero(np.diff(lost.astype(int), prepend=0) == 1)
    # Bursts lengthen the correlation, and with it the spread, of a share of independent losses.
    assert lost.mean() == pytest.approx(loss, abs=4 * np.sqrt(2 * burst * loss * (1 - loss) / count))
    assert lost.sum() / len(starts) == pytest.approx(burst, abs=4 * burst / np.sqrt(len(starts)))


def test_losses_that_cannot_be_are_refused() -> None:
    for loss, burst in ((1.0, 2.0), (-0.1, 2.0), (0.1, 0.5), (0.9, 2.0)):
        with pytest.raises(ValueError, match="no such losses"):
            packets.OpusLoss(24_000, loss, burst, True, 0)


def test_fewer_losses_and_repair_are_better() -> None:
    wave = np.tile(speech(2.0), 10)

    def error_db(loss: float, fec: bool) -> float:
        return rms_db(packets.OpusLoss(24_000, loss, 1 / (1 - loss), fec, 5).apply(wave) - wave)

    assert error_db(0.0, False) < error_db(0.05, False) < error_db(0.2, False)
    assert error_db(0.2, True) < error_db(0.2, False) - 0.5


@pytest.mark.parametrize(
    ("codec", "bitrate_bps"), [("g711_alaw", 64_000), ("g711_ulaw", 64_000), ("amr_nb", 4_750), ("amr_nb", 12_200)]
)
def test_a_telephone_codec_ends_at_4_khz(codec: str, bitrate_bps: int) -> None:
    wave = np.tile(speech(2.0), 3)
    spectra = [
        np.abs(np.fft.rfft(w)) ** 2 for w in (wave, codecs.Telephone(codec, bitrate_bps).apply(wave).astype(np.float64))
    ]
    hz = np.fft.rfftfreq(len(wave), 1 / RATE)
    inside, outside = (hz > 300) & (hz < 3_400), hz > 4_200
    clean, coded = ((spectrum[inside].sum(), spectrum[outside].sum()) for spectrum in spectra)
    assert 0.4 < coded[0] / clean[0] < 1.6
    assert coded[1] < 1e-4 * coded[0]


@pytest.mark.parametrize(("codec", "bitrate_bps"), [("gsm", 13_000), ("amr_nb", 64_000), ("g722", 48_000)])
def test_a_telephone_mode_that_does_not_exist_is_refused(codec: str, bitrate_bps: int) -> None:
    with pytest.raises(ValueError, match=r"choose from|no such mode"):
        codecs.Telephone(codec, bitrate_bps)


def test_clipping_cuts_at_its_level() -> None:
    wave = speech(1.0)
    clipped = levels.Clipping(12.0).apply(wave)
    limit = np.abs(wave).max() * 10 ** (-12 / 20)
    assert np.abs(clipped).max() == pytest.approx(limit)
    softer = np.abs(wave) < limit
    np.testing.assert_array_equal(clipped[softer], wave[softer])
    assert 0.001 < 1 - softer.mean() < 0.5


def test_levels_change_where_they_are_told_to() -> None:
    wave = np.ones(RATE, np.float32)
    changed = 20 * np.log10(levels.LevelChanges(((4_000, -6.0), (9_000, 3.0))).apply(wave))
    np.testing.assert_allclose(changed[:3_800], 0, atol=1e-5)
    np.testing.assert_allclose(changed[4_200:8_800], -6, atol=1e-5)
    np.testing.assert_allclose(changed[9_200:], 3, atol=1e-5)
    assert np.abs(np.diff(changed)).max() < 0.05  # no click


# Real recordings


@pytest.fixture(scope="module")
def utterance(real_audio: Path) -> np.ndarray:
    return audio.load(str(min((real_audio / "speech").glob("*.flac"))))[: 5 * RATE]


def test_real_rooms_are_aligned_and_keep_the_level(real_audio: Path, utterance: np.ndarray) -> None:
    for path in sorted((real_audio / "rir").glob("*.wav")):
        wet = rooms.MeasuredRoom(path.stem, str(path)).apply(utterance)
        assert abs(lag(utterance, wet)) <= 1, path
        assert rms_db(wet) == pytest.approx(rms_db(utterance), abs=0.01)


def test_real_noise_has_its_snr_whatever_the_format(real_audio: Path, utterance: np.ndarray) -> None:
    for path in sorted((real_audio / "noise").iterdir()):
        where = scene(clip(path, "noise"), num_samples=len(utterance))
        (step,) = drawn("noise.noise", where, 1)
        added = step.apply(utterance).astype(np.float64) - utterance
        assert noise.active_level_db(utterance) - rms_db(added) == pytest.approx(step.snr_db, abs=0.1), path


@pytest.mark.parametrize(
    "name",
    [
        *("opus 6", "opus 32", "band limit", "stationary gating", "moving gating"),
        *("a-law", "mu-law", "g722", "amr 12.2", "repaired", "clipping", "levels"),
    ],
)
def test_real_speech_survives(steps: dict[str, Step], utterance: np.ndarray, name: str) -> None:
    degraded = steps[name].apply(utterance)
    assert abs(lag(utterance, degraded)) <= LAGS.get(name, 0)
    assert np.corrcoef(degraded, utterance)[0, 1] > 0.5


def test_real_babble_is_drawn_from_other_speakers(real_audio: Path, utterance: np.ndarray) -> None:
    paths = sorted((real_audio / "speech").glob("*.flac"))[:8]
    rows = [{**clip(path, "speech", path.stem.split("-")[0]), "corpus": "LibriSpeech"} for path in paths]
    where = Scene(str(rows[0]["clip_id"]), None, len(utterance), Clips(table.from_rows(rows, "clip.v1")))
    babble = next(step for step in drawn("noise.noise", where, 20) if isinstance(step, noise.Babble))
    added = babble.apply(utterance).astype(np.float64) - utterance
    assert noise.active_level_db(utterance) - rms_db(added) == pytest.approx(babble.snr_db, abs=0.1)


def test_packets_of_real_speech_have_their_bitrate(real_audio: Path) -> None:
    wave = np.concatenate([audio.load(str(path)) for path in sorted((real_audio / "speech").glob("*.flac"))[:4]])
    for bitrate in (12_000, 24_000, 32_000):
        for step in (packets.OpusLoss(bitrate, 0.1, 2.0, True, 0), codecs.Opus(bitrate)):
            coded, _ = step.encode(wave)
            assert 8 * sum(map(len, coded)) / (len(wave) / RATE) == pytest.approx(bitrate, rel=0.1)


LADDERS: dict[str, list[Step | None]] = {  # from better to worse
    "codec": [None, codecs.Opus(24_000), codecs.Opus(6_000)],
    "noise": [noise.ColouredNoise(1.0, 3, snr_db) for snr_db in (20.0, 10.0, 0.0)],
    "loss": [packets.OpusLoss(24_000, loss, 1 / (1 - loss), False, 7) for loss in (0.0, 0.05, 0.2)],
    "repaired loss": [packets.OpusLoss(24_000, 0.2, 1.25, fec, 7) for fec in (True, False)],
    "clipping": [None, levels.Clipping(10.0), levels.Clipping(20.0)],
}


@pytest.fixture(scope="module")
def utterances(real_audio: Path) -> list[np.ndarray]:
    return [audio.load(str(path))[: 7 * RATE] for path in sorted((real_audio / "speech").glob("*.flac"))[:4]]


@pytest.mark.slow  # the same order by PESQ, below, takes a fifth of the time
@pytest.mark.parametrize("ladder", LADDERS)
def test_the_teacher_hears_the_order_of_strengths(ladder: str, utterances: list[np.ndarray]) -> None:
    from speechdistill.models.teachers import distillmos

    teacher = distillmos.load()
    scores = [
        np.mean([label.score for label in teacher.label([step.apply(wave) if step else wave for wave in utterances])])
        for step in LADDERS[ladder]
    ]
    print(ladder, [f"{score:.2f}" for score in scores])
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)


@pytest.mark.parametrize("ladder", LADDERS)
def test_pesq_hears_the_order_of_strengths(ladder: str, utterances: list[np.ndarray]) -> None:
    pesq = pytest.importorskip("pesq", reason="its installation needs a C compiler").pesq
    scores = [
        np.mean([pesq(RATE, wave, step.apply(wave), "wb") if step else 4.644 for wave in utterances])
        for step in LADDERS[ladder]
    ]
    print(ladder, [f"{score:.2f}" for score in scores])
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)
