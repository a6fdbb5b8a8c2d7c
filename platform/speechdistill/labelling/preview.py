"""A degradation recipe in words, and one sample of it to listen to."""

from io import BytesIO

import soundfile

from speechdistill.data import components
from speechdistill.data.clips import Clips
from speechdistill.data.degradation_recipes import with_assets
from speechdistill.data.plan import DegradationRecipe, Plan, Plans
from speechdistill.io import audio, storage
from speechdistill.io.assets import Need
from speechdistill.io.errors import UserError
from speechdistill.labelling.samples import make_sample


def show(recipe: DegradationRecipe) -> str:
    """A line per component, with its stage and probability, and a line for each thing that they need."""
    lines = [f"{recipe.name}: segments of {recipe.segment_s:g} s, {'whole files' if recipe.whole_files else 'drawn'}"]
    if any("noise.noise" in stage.odds for stage in recipe.stages):
        lines.append(f"SNR: normal, mean {recipe.snr_mean_db:g} dB, standard deviation {recipe.snr_sigma_db:g} dB")
    wanted: dict[str, Need] = {}
    for stage in recipe.stages:
        for name, probability in [*stage.odds.items(), ("none", stage.none())]:
            needs = components.component(name).needs if name in stage.odds else ()
            wanted |= {need.name: need for need in needs}
            note = f"  needs {', '.join(need.name for need in needs)}" if needs else ""
            ends = "  then nothing else" if stage.ends and name != "none" else ""
            lines.append(f"  {stage.name:<13}{name:<28}{probability:>6.1%}{ends}{note}")
    if wanted:
        lines.append("needs, given with --assets NAME PATH:")
    for need in wanted.values():
        lines.append(f"  {need.name}: {need.what}\n    from {need.where} (licence: {need.licence})")
        lines += [f"    not given: {need.hub}, where this machine has it or reaches the hub"] if need.hub else []
    return "\n".join(lines)


def files(out: str) -> tuple[str, str]:
    """The WAV file of a sample, and that of its clean segment beside it."""
    return out, f"{out.removesuffix('.wav')}-clean.wav"


def listen(recipe: DegradationRecipe, clips: str, seed: int, index: int, out: str) -> Plan:
    """Write sample `index` of a run as the WAV file `out`, its clean segment beside it, and return its plan.

    Raises `UserError` for a recipe whose components lack something or a sample that does not exist, `TableError` for a
    manifest and `AudioError` for a recording that cannot be used.
    """
    try:
        sample = Plans(with_assets(recipe), Clips.read(clips), seed)[index]
    except IndexError as error:
        raise UserError(f"--index {index}: {error}", "choose a smaller one, from 0") from error
    for wave, path in zip(make_sample(sample), files(out), strict=True):
        data = BytesIO()
        soundfile.write(data, wave, audio.SAMPLE_RATE, format="WAV")
        storage.publish(data.getvalue(), path)
    return sample
