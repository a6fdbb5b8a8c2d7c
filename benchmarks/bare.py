"""A bare training loop over tensors in memory: what a student's training costs at least. It needs torch alone.

On a GPU: samples a second of every student in bfloat16, the share of what the GPU reaches in a matrix product of
bfloat16 (8,192 cubed), and the hours of 250,000 steps.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from speechdistill.models.networks.conv_transformer import VARIANTS, ConvTransformer

BATCH = 20
WARM_UP = 5  # steps; the first ones choose kernels, or compile
PAPER_STEPS = 250_000


def steps_per_s(
    name: str,
    steps: int,
    crop_samples: int,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    compiles: bool = False,
) -> float:
    """Updates a second of batch 20, after a few to warm up."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network, waves, targets = _made(name, crop_samples, device)
    model = torch.compile(network) if compiles else network
    optimizer = torch.optim.AdamW(network.parameters(), 2e-5)
    start = 0.0
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            _wait(device)
            start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = (1 + 4 * model(waves).sigmoid() - targets).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    _wait(device)
    return steps / (time.perf_counter() - start)


def flop(name: str, crop_samples: int, device: str) -> int:
    """Floating-point operations of an update, but the optimiser's."""
    network, waves, _ = _made(name, crop_samples, device)
    with FlopCounterMode(display=False) as counter:
        network(waves[:1]).sum().backward()
    return BATCH * counter.get_total_flops()


def _made(name: str, crop_samples: int, device: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    with torch.device(device):
        network = ConvTransformer(VARIANTS[name]()).train()
        return network, torch.randn(BATCH, crop_samples), torch.rand(BATCH) * 4 + 1


def ceiling(device: str, size: int = 8_192, rounds: int = 20) -> float:
    """Floating-point operations a second of a matrix product in bfloat16."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    _wait(device)
    start = time.perf_counter()
    for _ in range(rounds):
        a @ b
    _wait(device)
    return rounds * 2 * size**3 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="v0")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--crop-s", type=float, default=7.68)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here; --device cpu shows the table with the CPU's figures")
        return
    most, crop = (
        ceiling(options.device, *(() if options.device == "cuda" else (2_048, 5))),
        round(options.crop_s * 16_000),
    )
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{where}: {most / 1e12:.3g} TFLOP/s in bfloat16; batch {BATCH}, crops of {options.crop_s:g} s\n")
    print("| student | samples/s | share of the ceiling | hours for 250,000 steps |\n|---|---|---|---|")
    hours = []
    for name in options.variants:
        rate = steps_per_s(
            name, options.steps, crop, options.device, "bfloat16", torch.get_num_threads(), options.compile
        )
        hours.append(PAPER_STEPS / rate / 3600)
        print(
            f"| {name} | {BATCH * rate:.0f} | {rate * flop(name, crop, options.device) / most:.1%} | {hours[-1]:.1f} |",
            flush=True,
        )
    print(f"| all | | | {sum(hours):.1f} |")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
