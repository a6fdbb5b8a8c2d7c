"""Small models of random weights, in the formats of the real ones."""

from pathlib import Path

import torch


def encodec(folder: Path, seed: int = 0) -> str:
    from transformers import EncodecConfig, EncodecModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = EncodecConfig(num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=16)
        EncodecModel(config).save_pretrained(folder)
    return str(folder)
