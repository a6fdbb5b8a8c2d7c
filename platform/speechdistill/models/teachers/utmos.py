"""UTMOS's strong learner (Saeki et al. 2022): the naturalness of synthetic speech, wav2vec 2.0 base, 103 M parameters.

The file is SpeechMOS's, which holds the original's fine-tuned wav2vec 2.0 and, of its head, the embeddings of the one
domain and the one listener that it is asked for. The original needs fairseq, SpeechMOS torch.hub and torchaudio.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechdistill.models.networks import speech_encoder
from speechdistill.models.networks.speech_encoder import Encoder
from speechdistill.models.released import Released

_HEAD_WIDTH = 64  # of attention, in wav2vec 2.0 of all sizes
_CONVOLUTIONS = 7
_BLOCK = "wav2vec2.encoder.layers"
# fairseq's names to those of transformers, first to last.
_RENAMED = (
    (r"^wav2vec2\.(feature_extractor\.conv_layers\.\d+)\.0\.", r"encoder.model.\1.conv."),
    (r"^wav2vec2\.(feature_extractor\.conv_layers\.0)\.2\.", r"encoder.model.\1.layer_norm."),
    (r"^wav2vec2\.layer_norm\.", r"encoder.model.feature_projection.layer_norm."),
    (r"^wav2vec2\.post_extract_proj\.", r"encoder.model.feature_projection.projection."),
    (r"^wav2vec2\.encoder\.pos_conv\.0\.", r"encoder.model.encoder.pos_conv_embed.conv."),
    (r"^wav2vec2\.encoder\.", r"encoder.model.encoder."),
    (r"\.self_attn\.", r".attention."),
    (r"\.self_attn_layer_norm\.", r".layer_norm."),
    (r"\.fc1\.", r".feed_forward.intermediate_dense."),
    (r"\.fc2\.", r".feed_forward.output_dense."),
)


class Teacher(Released):
    """The MOS, which the network may put a little beyond 1 and 5, where it is cut.

    How waves are judged, and what is raised, is `Released`'s.
    """

    name = "utmos"
    model = "UTMOS"
    url = "https://github.com/tarepan/SpeechMOS/releases/download/v1.0.0/utmos22_strong_step7459_v1.pt"
    terms = "411 MB, MIT"
    whole_s = 30.0

    def _place(self) -> str:
        return str(Path(torch.hub.get_dir()) / "checkpoints" / "utmos22_strong_step7459_v1.pt")

    def _network(self, saved: Any) -> nn.Module:
        return network(saved)

    def _mos(self, waves: Tensor) -> Tensor:
        scores: Tensor = self.network(waves)
        return scores


class Network(nn.Module):
    """Waves (batch, num_samples) of one length to scores (batch,): the mean of the frames', which are (MOS - 3) / 2."""

    def __init__(self, encoder: Encoder, embedding: int, hidden: int, projection: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.domain_emb = nn.Parameter(torch.empty(1, embedding))
        self.judge_emb = nn.Parameter(torch.empty(1, embedding))
        self.blstm = nn.LSTM(encoder.dim + 2 * embedding, hidden, batch_first=True, bidirectional=True)
        self.projection = nn.Sequential(nn.Linear(2 * hidden, projection), nn.ReLU(), nn.Linear(projection, 1))

    def forward(self, waves: Tensor) -> Tensor:
        frames, _ = self.encoder(waves)
        asked = torch.cat([self.domain_emb, self.judge_emb], 1).expand(*frames.shape[:2], -1)
        heard, _ = self.blstm(torch.cat([frames, asked], 2))
        scores: Tensor = self.projection(heard)
        return 3 + 2 * scores.mean((1, 2))


def network(saved: Mapping[str, Tensor]) -> Network:
    """The network of a state dict of SpeechMOS's; its sizes are the tensors'. Raises `KeyError` or `RuntimeError`."""
    state = {_renamed(name): tensor for name, tensor in saved.items() if name != "wav2vec2.mask_emb"}  # for training
    conv = "encoder.model.encoder.pos_conv_embed.conv.weight"
    direction, length = state.pop(f"{conv}_v"), state.pop(f"{conv}_g")
    state[conv] = direction * (length / direction.norm(dim=(0, 1), keepdim=True))
    hidden, projection = saved["blstm.weight_hh_l0"].shape[1], saved["projection.0.bias"].shape[0]
    with torch.device("meta"):
        built = Network(_encoder(saved), saved["domain_emb"].shape[1], hidden, projection)
    built.load_state_dict(state, assign=True)
    return built.requires_grad_(False)


def _encoder(saved: Mapping[str, Tensor]) -> Encoder:
    """wav2vec 2.0 of these sizes, without weights. It wants waves as they are: fairseq's base is not normalised."""
    num_blocks = sum(name.startswith(_BLOCK) and name.endswith(".fc1.bias") for name in saved)
    width, neurons = saved["wav2vec2.post_extract_proj.bias"].shape[0], saved[f"{_BLOCK}.0.fc1.bias"].shape[0]
    convolutions = [saved[f"wav2vec2.feature_extractor.conv_layers.{i}.0.weight"] for i in range(_CONVOLUTIONS)]
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": width // _HEAD_WIDTH,
        "intermediate_size": neurons,
        "conv_dim": [len(weight) for weight in convolutions],
    }
    config = {"model_type": "wav2vec2", **sizes}  # all else is as in transformers' defaults, which are those of base
    return speech_encoder.rebuilt(config, [(width // _HEAD_WIDTH, neurons)] * num_blocks, normalises=False)


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name
