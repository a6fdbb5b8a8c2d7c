"""Small models of random weights, in the formats of the real ones."""

import json
from pathlib import Path
from typing import Any

import torch


def encodec(folder: Path, seed: int = 0) -> str:
    from transformers import EncodecConfig, EncodecModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = EncodecConfig(num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=16)
        EncodecModel(config).save_pretrained(folder)
    return str(folder)


def xlsr(folder: Path, seed: int = 0, **sizes: int) -> str:
    """An encoder of the XLS-R family, of 4 blocks where `sizes` does not say otherwise."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    family = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True, "conv_dim": [8] * 7}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Wav2Vec2Config(**family | small | {"num_conv_pos_embedding_groups": 16} | sizes)
        Wav2Vec2Model(config).save_pretrained(folder)
    return str(folder)


def speech_encoder(folder: Path, kind: str, large: bool, seed: int = 0) -> str:
    """A `wav2vec2`, `hubert` or `wavlm` of 4 blocks; `large`: their larger ones' places of norms."""
    import transformers

    kinds = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    norms = {"do_stable_layer_norm": large, "feat_extract_norm": "layer" if large else "group", "conv_bias": large}
    convolutions = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kinds[kind]}Config")(**small, **norms, **convolutions)
        getattr(transformers, f"{kinds[kind]}Model")(config).save_pretrained(folder)
    return str(folder)


def xlsr_head(file: Path, dim_input: int = 16, seed: int = 0) -> str:
    from speechdistill.models.networks.conv_transformer import QualityHead

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.save(QualityHead(dim_input, 32, 4, 4).state_dict(), file)
    return str(file)


def hifigan(folder: Path, **changes: Any) -> Path:
    """In a folder as the hub has it."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    small = {"upsample_initial_channel": 32, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SpeechT5HifiGan(SpeechT5HifiGanConfig(**{**small, "initializer_range": 0.2, **changes}))
        network.mean.fill_(-3.0)
    network.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "hifigan"}))  # as that of the hub
    return folder
