"""What XLS-R costs as a teacher, with random weights. It needs torch and transformers alone.

On a GPU: seconds of audio a second through the tenth block of XLS-R 2B, in bfloat16 on segments of 7.68 s, the share of
what the GPU reaches in a matrix product of bfloat16 (8,192 cubed), and the hours of 2,600 h. On a CPU: waves of mixed
lengths in batches of like length against one by one.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bare import ceiling
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from speechdistill.models.networks.speech_encoder import Encoder, build, by_length

RATE = 16_000
SEGMENT_S = 7.68
HOURS = 2_600
LAYER = 10
NORMS = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
SIZES = {"hidden_size": 1920, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 7680}
TARGETS = {"cuda": 0.4, "cpu": 1.3}


def encoder(layer: int, device: str, dtype: torch.dtype) -> Encoder:
    model = build(Wav2Vec2Config(**SIZES, **NORMS), layer).to_empty(device=device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.utils.parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
    return Encoder(model, normalises=True, dtype=dtype).eval()


def on_gpu(batch: int, repeats: int) -> None:
    model = encoder(LAYER, "cuda", torch.bfloat16)
    waves = [np.random.default_rng(i).standard_normal(round(SEGMENT_S * RATE)).astype(np.float32) for i in range(batch)]
    inputs = model.prepared(waves)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
        seconds = timed(lambda: model(*inputs), repeats, torch.cuda.synchronize)
    reached, most = counter.get_total_flops() / seconds, ceiling("cuda")
    audio_s = batch * SEGMENT_S / seconds
    print(f"batch of {batch}: {audio_s:,.0f} s of audio a second, {HOURS:,} h in {HOURS / audio_s:.2f} h")
    print(f"{reached / 1e12:.0f} TFLOP/s of {most / 1e12:.0f}: {reached / most:.2f} (wanted: {TARGETS['cuda']})")
    print(f"most memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def on_cpu(layer: int, longest_s: float, repeats: int, threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    model = encoder(layer, "cpu", dtype)
    rng = np.random.default_rng(0)
    lengths = rng.uniform(0.5, longest_s, 16) * RATE
    waves = [rng.standard_normal(int(length)).astype(np.float32) for length in lengths]
    batches = list(by_length([len(wave) for wave in waves], round(8 * SEGMENT_S * RATE)))

    def one_by_one() -> None:
        for wave in waves:
            model(*model.prepared([wave]))

    def batched() -> None:
        for batch in batches:
            model(*model.prepared([waves[i] for i in batch]))

    with torch.inference_mode():
        pairs = [(timed(one_by_one, 1), timed(batched, 1)) for _ in range(repeats)]  # in turns
    ratio = float(np.median([single / together for single, together in pairs]))
    seconds = sum(len(wave) for wave in waves) / RATE
    speed = seconds / min(together for _, together in pairs)
    print(
        f"{len(waves)} waves of 0.5 to {longest_s:g} s, {layer} blocks, {dtype}, {threads} threads: "
        f"batched / one by one {ratio:.2f} (wanted: {TARGETS['cpu']}), {speed:.1f} s of audio a second"
    )


def timed(work: Callable[[], object], repeats: int, wait: Callable[[], object] = lambda: None) -> float:
    """Seconds of one call, after one to warm up."""
    work()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="segments at once, on a GPU")
    parser.add_argument("--layer", type=int, default=4, help="blocks, on a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if torch.cuda.is_available():
        on_gpu(given.batch, 10 * given.repeats)
    else:
        print("no GPU: its part is left out")
    for longest_s in (3.0, 8.0):
        for dtype in (torch.float32, torch.bfloat16):
            on_cpu(given.layer, longest_s, given.repeats, given.threads, dtype)
