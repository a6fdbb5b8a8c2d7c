"""The page of a comparison: complete, self-contained, safe with hostile names, and readable on a phone."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import chromium
from comparisons import RATE, compared, label_run, recordings
from manifests import voice
from mlflow_runs import student
from speechdistill.comparing import page, plots
from speechdistill.comparing.comparison import Comparison

HOSTILE = '<script>document.title="broken"</script>$x_1$&"\'>'
"""A dataset whose name is markup, mathematics and quotes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def students(folder: Path) -> list[str]:
    return [student(folder / f"student{seed}", seed) for seed in range(2)]


@pytest.fixture(scope="module")
def listeners(folder: Path, students: list[str]) -> Comparison:
    """Of clips that listeners scored, with a dataset of a hostile name and models of odd ones."""
    source = recordings(folder / "clips", 24, datasets=("tub", HOSTILE))
    about = {"configuration": {"paper": True, "models": HOSTILE}, "versions": {"python": "3"}, "clips_sha256": "b18b"}
    wanted = f"{students[0]},distillmos={students[1]}"
    return compared(source, wanted, folder, about)


@pytest.fixture(scope="module")
def labels(folder: Path, students: list[str]) -> Comparison:
    """Of the samples of a label run, whose teacher is the second model."""
    return compared(label_run(folder, students[0]), f"v0={students[1]},teacher={students[0]}", folder)


def written(found: Comparison, file: Path) -> str:
    text = page.html(found, plots.all_plots(found))
    file.write_text(text)
    return text


def test_the_page_holds_all_that_it_shows(labels: Comparison, tmp_path: Path) -> None:
    text = written(labels, tmp_path / "page.html")
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "@import" not in text
    assert text.count("<article") == 4 and text.count("data:audio/flac;base64,") == 4
    assert text.count("data:image/png;base64,") >= 4
    assert "are the teacher’s, not listeners’" in text
    steps = plots.steps_of(labels)
    assert steps and all(f"{step} ({len(of_it)})" in text for step, of_it in steps.items())
    identities = re.findall(r'\sid="([^"]+)"', text)
    assert max(Counter(identities).values()) == 1, "two parts of the page have one identity"
    assert set(re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', text)) <= {
        pair for name in identities for pair in ((name, ""), ("", name))
    }
    assert text.count('<svg role="img" aria-label="') == text.count("<svg") == 5
    assert "#1f2a37" in text.split("</style>")[0] and "#1f2a37" not in text.split("</style>", 1)[1]


def test_the_worst_clips_come_first_with_their_plans(labels: Comparison) -> None:
    shown = page.worst(labels, 3)
    away = [abs(float(clip["difference"].removesuffix(" MOS"))) for clip in shown]
    assert away == sorted(away, reverse=True) and len(shown) == 3
    assert max(np.abs(labels.scores["v0"] - [c.mos for c in labels.clips])) == pytest.approx(away[0], abs=0.006)
    assert all(clip["steps"] and clip["audio"] and not clip["problem"] for clip in shown)


def test_the_page_says_how_many_clips_it_shows(
    labels: Comparison, listeners: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "worst", lambda comparison: [])
    assert "The 0 clips of 4 that v0 misjudges most" in page.html(labels, {})
    monkeypatch.setattr(page, "worst", lambda comparison: [page._clip(labels, 0)] * 4)
    assert "All 4 clips, those that v0 misjudges most first" in page.html(labels, {})


def test_a_long_text_is_cut_between_words() -> None:
    text = ", ".join(f'"key{i}": {i}' for i in range(100))
    cut = page._short(text)
    assert len(cut) <= 302 and cut.endswith(" …") and text.startswith(cut.removesuffix(" …") + ", ")
    assert page._short("x" * 400) == "x" * 300 + " …"


def test_only_a_lead_beyond_chance_is_marked(labels: Comparison, tmp_path: Path) -> None:
    assert len(labels.clips) == 4 and labels.best("weights_free") is None
    assert 'class="best"' not in written(labels, tmp_path / "page.html")


def test_hostile_names_are_text(listeners: Comparison, tmp_path: Path) -> None:
    text = written(listeners, tmp_path / "page.html")
    assert "<script" not in text and "&lt;script&gt;" in text and "$x_1$" in text


def test_a_clip_that_is_gone_since_is_said_to_be(listeners: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(uri: str) -> np.ndarray:
        raise FileNotFoundError(uri)

    monkeypatch.setattr("speechdistill.comparing.judged.read", gone)
    assert all("It cannot be played" in clip["problem"] for clip in page.worst(listeners))
    assert "It cannot be played" in page.html(listeners, {})


def test_plots_are_files_too(labels: Comparison, listeners: Comparison, tmp_path: Path) -> None:
    made = plots.all_plots(labels)
    assert set(made) == {"pcc_over_parameters", "pcc_over_cost", "scatter_0", "scatter_1", "residuals_by_step"}
    assert "residuals_by_step" not in plots.all_plots(listeners), "these clips have no plans"
    for name, figure in made.items():
        (tmp_path / f"{name}.png").write_bytes(plots.png(figure))
        assert imread(tmp_path / f"{name}.png").shape[1] > 300
        assert plots.svg(figure, name).startswith(b"<?xml")


def test_a_spectrogram_shows_a_tone_where_it_is(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 2_000 * np.arange(RATE) / RATE)
    (tmp_path / "tone.png").write_bytes(plots.spectrogram(tone))
    brightness = imread(tmp_path / "tone.png")[..., :3].sum(axis=(1, 2))
    assert brightness.argmax() / len(brightness) == pytest.approx(0.75, abs=0.02)  # the lowest frequency is below
    for number, wave in enumerate((np.zeros(10), voice(0.2))):
        (tmp_path / f"{number}.png").write_bytes(plots.spectrogram(wave))
        assert imread(tmp_path / f"{number}.png").shape[0] == len(brightness), "a short clip has another height"
    noise = np.random.default_rng(0).standard_normal(8 * RATE)
    assert len(plots.spectrogram(noise)) < 80_000, "twenty of them make a large page"


@pytest.mark.skipif(chromium.BINARY is None, reason="no chromium here; `apt-get install chromium` brings it")
def test_a_browser_shows_it_without_complaint_or_request(
    listeners: Comparison, labels: Comparison, tmp_path: Path
) -> None:
    with chromium.browser(tmp_path / "profile") as browser:
        for name, found in (("listeners", listeners), ("labels", labels)):
            written(found, tmp_path / f"{name}.html")
            url = (tmp_path / f"{name}.html").as_uri()
            for width, scheme in ((1280, "light"), (390, "dark")):
                browser.open(url, width, scheme)
                names = browser.value("[...document.querySelectorAll('#table-one tbody th')].map(e => e.textContent)")
                assert names == [model.name for model in found.models]
                assert browser.value("document.documentElement.scrollWidth") <= width, (
                    "the page is wider than its screen"
                )
                assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
                assert browser.value(_PLAYS) == "fine"
                assert browser.value(_INTERVALS) == [False, True], "intervals are for pointers alone"
                assert browser.value("document.documentElement.scrollWidth") <= width
                back = browser.value("getComputedStyle(document.body).backgroundColor")
                assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}[scheme]
                assert browser.value("document.title").startswith("Speech quality models")
                assert browser.requested() == [url] and browser.complaints() == []


_INTERVALS = """[0, 1].map(time => {
  if (time) document.getElementById('intervals').click();
  return [...document.querySelectorAll('#table-one td .more')].every(it => it.checkVisibility());
})"""
_PLAYS = """new Promise(said => {
  const sound = document.querySelector('audio');
  sound.onloadedmetadata = () => said(sound.duration > 0.5 ? 'fine' : 'short');
  sound.onerror = () => said('broken');
  sound.load();
})"""
