"""UTMOS's strong learner (Saeki et al. 2022): the naturalness of synthetic speech, wav2vec 2.0 base, 103 M parameters.

The file is SpeechMOS's. It holds the original's fine-tuned wav2vec 2.0, and a head with the embeddings of one domain
and one listener. The original needs fairseq, SpeechMOS torch.hub and torchaudio.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.models import released
from speechdistill.models.networks import speech_encoder
from speechdistill.models.networks.speech_encoder import Encoder
from speechdistill.models.options import TeacherOptions
from speechdistill.models.released import Release
from speechdistill.models.windowed import EvenWindows, WindowScorer

_WHOLE_S = 30
_HEAD_WIDTH = 64  # of attention, in wav2vec 2.0 of all sizes
_CONVOLUTIONS = 7
_BLOCK = "wav2vec2.encoder.layers"
# From fairseq's names to those of transformers, applied in this order.
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


_DEFAULTS = TeacherOptions()


def _place() -> str:
    return str(Path(torch.hub.get_dir()) / "checkpoints" / "utmos22_strong_step7459_v1.pt")


_RELEASE = Release(
    teacher="utmos",
    model="UTMOS",
    url="https://github.com/tarepan/SpeechMOS/releases/download/v1.0.0/utmos22_strong_step7459_v1.pt",
    terms="411 MB, MIT",
    place=_place,
)


def load(options: TeacherOptions = _DEFAULTS) -> WindowScorer:
    """Load the MOS, which the network may give a little beyond 1 and 5 and which is cut there.

    Waves of up to 30 s are scored whole, longer ones in windows of 7.68 s. Errors are those of `released.scorer`.
    """
    windows = EvenWindows(hop=options.hop(), whole=_WHOLE_S * SAMPLE_RATE)
    return released.scorer(_RELEASE, options, windows, network, _mos)


def _mos(scores: Tensor) -> Tensor:
    return scores


class Network(nn.Module):
    """Waves (batch, num_samples) of one length to scores (batch,): the mean of the frames' scores, (MOS - 3) / 2."""

    def __init__(self, encoder: Encoder, embedding: int, hidden: int, projection: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.domain_emb = nn.Parameter(torch.empty(1, embedding))
        self.judge_emb = nn.Parameter(torch.empty(1, embedding))
        self.blstm = nn.LSTM(encoder.dim + 2 * embedding, hidden, batch_first=True, bidirectional=True)
        self.projection = nn.Sequential(nn.Linear(2 * hidden, projection), nn.ReLU(), nn.Linear(projection, 1))

    def forward(self, waves: Tensor) -> Tensor:
        frames, _ = self.encoder(waves)
        embeddings = torch.cat([self.domain_emb, self.judge_emb], 1).expand(*frames.shape[:2], -1)
        states, _ = self.blstm(torch.cat([frames, embeddings], 2))
        scores: Tensor = self.projection(states)
        return 3 + 2 * scores.mean((1, 2))


def network(saved: Mapping[str, Tensor]) -> Network:
    """Build the network of a SpeechMOS state dict, with the tensors' sizes. Raises `KeyError` or `RuntimeError`."""
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
    """Build wav2vec 2.0 of these sizes, without weights; waves are not normalised, as in fairseq's base."""
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
    config = {"model_type": "wav2vec2", **sizes}  # the rest are transformers' defaults, those of base
    return speech_encoder.rebuilt(config, [(width // _HEAD_WIDTH, neurons)] * num_blocks, normalises=False)


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name
