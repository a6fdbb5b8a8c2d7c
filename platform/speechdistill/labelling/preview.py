"""A degradation recipe as text, and a sample of it as WAV files."""

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
    """Return a line per component with its stage and probability, and the assets that components need."""
    lines = [f"{recipe.name}: segments of {recipe.segment_s:g} s, {'whole files' if recipe.whole_files else 'drawn'}"]
    if any("noise.noise" in stage.odds for stage in recipe.stages):
        lines.append(f"SNR: normal, mean {recipe.snr_mean_db:g} dB, standard deviation {recipe.snr_sigma_db:g} dB")
    all_needs: dict[str, Need] = {}
    for stage in recipe.stages:
        for name, probability in [*stage.odds.items(), ("none", stage.none())]:
            needs = components.component(name).needs if name in stage.odds else ()
            all_needs |= {need.name: need for need in needs}
            note = f"  needs {', '.join(need.name for need in needs)}" if needs else ""
            ends = "  then nothing else" if stage.ends and name != "none" else ""
            lines.append(f"  {stage.name:<13}{name:<28}{probability:>6.1%}{ends}{note}")
    if all_needs:
        lines.append("needs, given with --assets NAME PATH:")
    for need in all_needs.values():
        lines.append(f"  {need.name}: {need.what}\n    from {need.where} (licence: {need.licence})")
        lines += [f"    default: {need.hub}, from the local cache or the hub"] if need.hub else []
    return "\n".join(lines)


def files(out: str) -> tuple[str, str]:
    """Return the paths of the WAV files of a sample and of its clean segment."""
    return out, f"{out.removesuffix('.wav')}-clean.wav"


def listen(recipe: DegradationRecipe, clips: str, seed: int, index: int, out: str) -> Plan:
    """Write sample `index` of a run to the WAV file `out`, with its clean segment beside it, and return its plan.

    Raises `UserError` if an asset of the recipe is missing or the sample does not exist, `TableError` for an unusable
    manifest and `AudioError` for an unusable recording.
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
