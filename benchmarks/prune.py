"""What pruning costs and what a slim model saves, on a CPU and with random weights.

Memory: the peak of training updates of ten blocks as wide as wav2vec 2.0 base has them, without a pruner, with one that
collects importance, and with one that also prunes before updates. Selection: the lowest of 50 M scores, against torch's
own ways to find them. Speed: XLS-R 2B to its tenth block, whole and without half of its heads and neurons, in turns.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro

from speechdistill.data.label_scale import Scale
from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.models import architectures, parameters
from speechdistill.models.encoder_scorer import Network, TrainedTeacher
from speechdistill.models.networks import slim_encoder
from speechdistill.models.networks.conv_transformer import QualityHead
from speechdistill.models.networks.slim_encoder import Kept
from speechdistill.models.networks.speech_encoder import Encoder, build
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers.xlsr import LAYER
from speechdistill.training.pruning import Pruner, Pruning, remove_lowest

MIB = 1 << 20
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
XLSR_2B = {"hidden_size": 1920, "num_attention_heads": 16, "intermediate_size": 7680}
UPDATES = ("plain", "collecting", "pruning")


@dataclass(frozen=True)
class Options:
    """Three tables; ten minutes on one core, 8 GiB."""

    batch: int = 8
    """Waves in an update."""
    wave_s: float = 2.0
    """Their length; longer ones, or more, make the pruner's share smaller."""
    scores: int = 50_000_000
    """Among which to find the lowest 0.5%."""
    repeats: int = 5
    """Scorings of 7.68 s by each model."""
    updates: str = ""
    """Of this process, which then prints its peak alone: plain, collecting or pruning."""


def main(options: Options) -> None:
    torch.set_num_threads(1)
    if options.updates:
        print(_peak(options))
        return
    _memory(options)
    _selection(options.scores)
    _speed(options.repeats)


def _memory(options: Options) -> None:
    peaks = {}
    for updates in UPDATES:
        command = [sys.executable, __file__, "--updates", updates, "--batch", str(options.batch)]
        tight = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}  # what is freed goes back to the system
        run = subprocess.run(
            [*command, "--wave-s", str(options.wave_s)], env=tight, stdout=subprocess.PIPE, text=True, check=True
        )
        peaks[updates] = int(run.stdout.split()[-1])
    print(f"\nPeak of updates of {options.batch} waves of {options.wave_s:g} s (bar: 1.2 times collecting)\n")
    print("| updates | MiB above the start | to plain | to collecting |\n|---|---|---|---|")
    for updates, peak in peaks.items():
        ratios = [f"{peak / peaks[other]:.2f}" for other in ("plain", "collecting")]
        print(f"| {updates} | {peak // MIB} | {' | '.join(ratios)} |", flush=True)


def _peak(options: Options) -> int:
    """Bytes by which three updates raise this process's peak, with the network's weights."""
    before = _resident("VmRSS")
    network = _network(BASE).train().requires_grad_(True)
    _update(network, options.updates, torch.randn(options.batch, round(options.wave_s * SAMPLE_RATE)))
    return _resident("VmHWM") - before


def _update(network: Network, updates: str, waves: torch.Tensor) -> None:
    """Three updates."""
    optimizer = torch.optim.AdamW(network.parameters(), 2e-5)
    pruner = Pruner(network.encoder.model, Pruning()) if updates != "plain" else None
    for update in range(3):
        if pruner and updates == "pruning" and update:
            pruner.prune()
        loss = network(waves).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if pruner:
            pruner.after_backward()
        optimizer.step()
        if pruner:
            pruner.hold()


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def _selection(size: int) -> None:
    scores = torch.randn(size).square() * torch.rand(size)
    count = size // 200
    ways: dict[str, Callable[[], object]] = {
        "pruning": lambda: remove_lowest([scores], [torch.zeros(size, dtype=torch.bool)], count),
        "torch.kthvalue": lambda: scores <= scores.kthvalue(count).values,
        "torch.sort": lambda: scores <= scores.sort().values[count - 1],
    }
    print(f"\nThe lowest {count:,} of {size:,} scores\n\n| way | CPU s |\n|---|---|")
    for name, way in ways.items():
        start = time.process_time()
        way()
        print(f"| {name} | {time.process_time() - start:.2f} |", flush=True)


def speeds(sizes: dict[str, int], device: str, repeats: int, seconds: float) -> tuple[float, float]:
    """Seconds of a forward pass of 16 waves, on a GPU in bfloat16: the whole, and half of its heads and neurons."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    network = _network(sizes).to(device).eval()
    network.encoder.to_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    wave = np.random.default_rng(0).standard_normal(round(seconds * SAMPLE_RATE)).astype(np.float32)
    times = []
    for slims in (False, True):
        if slims:
            heads, neurons = (sizes[name] // 2 for name in ("num_attention_heads", "intermediate_size"))
            slim_encoder.slim(network.encoder.model, [Kept(torch.arange(heads), torch.arange(neurons))] * LAYER)
            network.to(device)
        inputs = network.encoder.prepared([wave] * 16)
        with torch.inference_mode():
            network(*inputs)
            wait()
            began = time.perf_counter()
            for _ in range(repeats):
                network(*inputs)
            wait()
        times.append((time.perf_counter() - began) / repeats)
    return times[0], times[1]


def gpu_peak(sizes: dict[str, int], updates: str, batch: int, seconds: float) -> int:
    """Bytes that three updates reach on a GPU."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    network = _network(sizes).cuda().train().requires_grad_(True)
    _update(network, updates, torch.randn(batch, round(seconds * SAMPLE_RATE), device="cuda"))
    return int(torch.cuda.max_memory_allocated())


def _speed(repeats: int) -> None:
    wave = np.random.default_rng(0).standard_normal(122_880).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        network = _network(XLSR_2B)
        TrainedTeacher.of(network, Scale()).save(network, f"{folder}/whole", {})
        heads, neurons = (XLSR_2B[name] // 2 for name in ("num_attention_heads", "intermediate_size"))
        slim_encoder.slim(network.encoder.model, [Kept(torch.arange(heads), torch.arange(neurons))] * LAYER)
        TrainedTeacher.of(network, Scale()).save(network, f"{folder}/slim", {})
        del network
        sizes = {name: Path(folder, name, "model.safetensors").stat().st_size for name in ("whole", "slim")}
        models = {name: architectures.scorer(f"{folder}/{name}", TeacherOptions(device="cpu")) for name in sizes}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            start = time.process_time()
            model.label([wave])
            times[name].append(time.process_time() - start)
    per_s = {name: median(taken[1:]) * SAMPLE_RATE / len(wave) for name, taken in times.items()}
    print("\nXLS-R 2B to block 10, one thread; slim: half of the heads and neurons (bars: 0.55 and 0.65)\n")
    print("| model | parameters, M | file, MB | CPU s per audio s |\n|---|---|---|---|")
    counts = {name: parameters.count(model.forward.network).stored for name, model in models.items()}
    for name in models:
        print(f"| {name} | {counts[name] / 1e6:.1f} | {sizes[name] / 1e6:.0f} | {per_s[name]:.3f} |")
    ratios = [of["slim"] / of["whole"] for of in (counts, sizes, per_s)]
    print(f"| ratio | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |")


def _network(sizes: dict[str, int]) -> Network:
    from transformers import Wav2Vec2Config

    family = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
    encoder = build(Wav2Vec2Config(**family, **sizes, num_hidden_layers=LAYER), LAYER).to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in encoder.parameters():
        parameter.normal_(std=0.02)
    torch.nn.utils.parametrize.remove_parametrizations(encoder.encoder.pos_conv_embed.conv, "weight")
    return Network(Encoder(encoder, normalises=True), QualityHead(sizes["hidden_size"], 32, 4, 4))


if __name__ == "__main__":
    main(tyro.cli(Options))
