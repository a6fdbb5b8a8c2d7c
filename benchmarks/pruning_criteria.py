"""What to prune by: the validation MSE with half of the weights, after equal fine-tuning, by each criterion.

A small student is trained on real speech that was degraded and labelled by the released v7 (the labels of
`distillation.py`), then pruned and fine-tuned on the same batches whatever the criterion; "none" is fine-tuned only.
It is validated on 300 samples of speakers that it has not heard, and nothing is chosen by them. As in the paper,
magnitude removes kernels of the convolutions, and the same share of each matrix.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from distillation import SAMPLES, SHARED, label_run, samples
from torch import nn

from speechdistill.engine.finished_run import LabelRun
from speechdistill.engine.held_out import by_row_groups
from speechdistill.io import audio, fingerprint, storage
from speechdistill.models import student_scorer
from speechdistill.models.label import Label
from speechdistill.models.networks.conv_transformer import ConvTransformer, ConvTransformerConfig
from speechdistill.models.options import TeacherOptions
from speechdistill.models.student import load_student
from speechdistill.training.batches import Mix
from speechdistill.training.loop import Loop
from speechdistill.training.pruning import Pruner, Pruning
from speechdistill.training.recipe import Companion, Training
from speechdistill.training.recipes.distill import Distill, DistillRecipe

COLUMNS = ("before", "none", "importance", "magnitude", "random")


@dataclass(frozen=True)
class Options:
    """Half an hour on one core, where the labels are there already. The same command goes on."""

    out: str = "distillation-out"
    """The folder of distillation.py, whose labels are used, and made where there are none."""
    data: str = str(SHARED)
    """Folder with speech/ (one file a speaker), noise/ and rir/, for the labels."""
    seeds: int = 3
    """Trainings."""
    steps: int = 800
    """Updates before the pruning."""
    learning_rate: float = 1e-3
    """Of these updates; a fifth of it in pruning."""
    remaining: float = 0.5
    """The share of the weights that pruning leaves."""
    share: float = 0.05
    """The share that goes at a time."""
    every: int = 15
    """Updates before each time, and after the last."""
    width: int = 24
    """Channels of the student's convolutions, and of its transformer."""
    crop_s: float = 0.96
    """Seconds of each sample in a batch."""


class Pruned(DistillRecipe):
    """A student's training with pruning of its convolutions and its transformer, but not of its pooling and output."""

    def __init__(self, config: Distill, pruning: Pruning) -> None:
        super().__init__(config)
        self._pruning = pruning

    def companions(self, network: nn.Module) -> dict[str, Companion]:
        assert isinstance(network, ConvTransformer)
        parts = {"cnn": network.cnn, "transformer": network.transformer_pool_attn.transformer}
        return {"pruner": Pruner(nn.ModuleDict(parts), self._pruning)}


class Test:
    """Samples of new speakers, with v7's scores."""

    def __init__(self, run: LabelRun) -> None:
        read = samples(run)
        self._waves = [audio.decode(row["audio"], row["audio_format"]) for row in read]
        self.scores = np.array([row["score"] for row in read])

    def mse(self, network: ConvTransformer) -> float:
        hop_s = network.config.segment_samples / audio.SAMPLE_RATE
        found = student_scorer.scorer(network.eval(), "pruned", "", TeacherOptions(hop_s=hop_s)).label(self._waves)
        scores = np.array([label.score for label in found if isinstance(label, Label)])
        return float(np.mean((scores - self.scores) ** 2))


def main(options: Options) -> None:
    torch.set_num_threads(1)
    out = Path(options.out)
    _, _, test_run = (_run(split, options.data, out) for split in SAMPLES)
    test = Test(test_run)
    print(f"{len(test.scores)} test samples, whose scores have the variance {test.scores.var():.3f}")
    results = [_seed(seed, options, test) for seed in range(options.seeds)]
    print(f"\n{options}\n\n| seed | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for seed, figures in enumerate(results):
        print(f"| {seed} | {' | '.join(f'{figures[name]:.4f}' for name in COLUMNS)} |")
    means = [f"{np.mean([figures[name] for figures in results]):.4f}" for name in COLUMNS]
    print(f"| mean | {' | '.join(means)} |")


def _run(split: str, data: str, out: Path) -> LabelRun:
    done = (out / split / "summary.json").is_file()
    return LabelRun(f"{out}/{split}") if done else label_run(split, Path(data), out, SAMPLES[split])


def _seed(seed: int, options: Options, test: Test) -> dict[str, float]:
    """The MSE of a student before pruning, and after equal fine-tuning without and with each criterion."""
    which = fingerprint.of(asdict(replace(options, out="", data="", seeds=0)))[:8]
    folder = f"{options.out}/pruning-{which}-{seed}"
    student = ConvTransformerConfig(options.width, stride_convs=4, dim=options.width, heads=4, layers=2)
    mix = Mix(shards=(f"{options.out}/train",), labeled_percent=0, crop_s=options.crop_s, seed=seed)
    pruning = Pruning(share=options.share, every=options.every, until=options.remaining, seed=seed)
    # The samples of the measured table; other speakers judge, and nothing is chosen by validation.
    held = (by_row_groups(LabelRun(f"{options.out}/train"), validates=True),)
    if not Path(folder, "student.json").is_file():
        loop = _train(Distill(student=student, mix=mix, held_out=held).make(), options.steps, options.learning_rate)
        loop.save(folder)
    config = Distill(student=student, mix=replace(mix, seed=seed + 1_000), init=folder, held_out=held)
    figures: dict[str, float] = dict(storage.read_json(f"{folder}/mse.json") or {})
    for name in COLUMNS:
        if name in figures:
            continue
        if name == "before":
            network = load_student(folder).network
        else:
            recipe = config.make() if name == "none" else Pruned(config, replace(pruning, criterion=name))
            network = _train(recipe, pruning.updates, options.learning_rate / 5).network
        figures[name] = test.mse(network)
        storage.publish_json(figures, f"{folder}/mse.json")
        print(f"seed {seed}, {name}: MSE {figures[name]:.4f}", flush=True)
    return figures


def _train(recipe: DistillRecipe, steps: int, learning_rate: float) -> Loop:
    loop = Loop(recipe, Training(steps=steps, learning_rate=learning_rate, dtype="bfloat16"))
    for _ in loop.run(steps):
        pass
    return loop


if __name__ == "__main__":
    main(tyro.cli(Options))
