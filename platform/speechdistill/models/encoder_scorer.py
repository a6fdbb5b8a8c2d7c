"""A quality head above a speech encoder: the network, its checkpoints, and the network as a teacher."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechdistill.data.label_scale import Scale
from speechdistill.io import checkpoint, fingerprint
from speechdistill.io.audio import SAMPLE_RATE, SEGMENT_S
from speechdistill.io.errors import UserError
from speechdistill.models.device import torch_device
from speechdistill.models.networks import slim_encoder, speech_encoder
from speechdistill.models.networks.conv_transformer import QualityHead
from speechdistill.models.networks.speech_encoder import Encoder, middle
from speechdistill.models.options import WHOLE_S, TeacherOptions
from speechdistill.models.windowed import DTYPES, EvenWindows, WindowScorer

HEAD = (32, 4, 4)
"""Width, attention heads and layers of the paper's head (section IV-A)."""

_AS_IS = Scale()
_DEFAULTS = TeacherOptions()
_BATCH_S = {"cpu": SEGMENT_S, "cuda": 32 * SEGMENT_S}


class Network(nn.Module):
    """An encoder and its head: the arguments of `Encoder.forward` to logits (batch,) float32."""

    def __init__(self, encoder: Encoder, head: QualityHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, waves: Tensor, lengths: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(middle(*self.encoder(waves, lengths)))
        return logits


def scorer(
    network: Network, name: str, weights_hash: str, scale: Scale = _AS_IS, options: TeacherOptions = _DEFAULTS
) -> WindowScorer:
    """Make a teacher of an encoder and its head; `scale` is applied to the logits.

    Waves of up to 15 s go through the encoder whole, and the head scores the middle 7.68 s, as in the original. Longer
    ones are scored in windows of 7.68 s. Waves of any lengths make a batch, measured in windows of 7.68 s; each scores
    as if alone. In bfloat16 the convolutions over samples and the head stay float32. The encoder's blocks are compiled
    at the first batch. Raises `UserError` for a head that does not fit the encoder, and for a wrong device or hop.
    """
    windows = EvenWindows(hop=options.hop(), whole=round(WHOLE_S * SAMPLE_RATE))
    width, expected = network.encoder.dim, network.head.norm_input.num_features
    if width != expected:
        raise UserError(
            f"the head takes features of {expected}, the encoder gives {width}", "give the encoder of the head"
        )
    device = torch_device(options.device)
    batch = options.batch(_BATCH_S.get(device.type, SEGMENT_S))
    network.encoder.to_dtype(DTYPES[options.dtype])
    forward = EncoderForward(network.to(device).eval(), scale)
    if options.compile:
        for block in network.encoder.model.encoder.layers:  # one by one: they are alike, so one compilation serves all
            block.compile(dynamic=True)
    return WindowScorer(name, weights_hash, windows, batch, forward)


class EncoderForward:
    """An encoder and its head as a function of windows of any lengths."""

    def __init__(self, network: Network, scale: Scale) -> None:
        self.network = network
        self._scale = scale

    def __call__(self, windows: Sequence[np.ndarray]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.network(*self.network.encoder.prepared(windows))
            return logits.double() * self._scale.a + self._scale.b


@dataclass(frozen=True)
class TrainedHead:
    """The description of a head in its checkpoint; `encoder` is the encoder's address in training."""

    encoder: str
    encoder_sha256: str
    layer: int
    scale: Scale

    def save(self, head: QualityHead, folder: str, provenance: Mapping[str, Any]) -> None:
        checkpoint.write(head, folder, checkpoint.HEAD_ABOVE_ENCODER, asdict(self), provenance)


@dataclass(frozen=True)
class TrainedTeacher:
    """The description of an encoder and its head in their checkpoint, which holds the weights of both."""

    encoder: Mapping[str, Any]
    block_sizes: list[tuple[int, int]]
    normalises: bool
    scale: Scale

    @classmethod
    def of(cls, network: Network, scale: Scale) -> "TrainedTeacher":
        model = network.encoder.model
        config = json.loads(model.config.to_json_string(use_diff=False))
        return cls(config, slim_encoder.sizes(model), network.encoder.normalises, scale)

    def save(self, network: Network, folder: str, provenance: Mapping[str, Any]) -> None:
        checkpoint.write(network, folder, checkpoint.ENCODER_AND_HEAD, asdict(self), provenance)

    def network(self, weights: Mapping[str, Tensor]) -> Network:
        head = QualityHead(len(weights["head.norm_input.weight"]), *HEAD)
        network = Network(speech_encoder.rebuilt(self.encoder, self.block_sizes, self.normalises), head)
        network.load_state_dict(weights, assign=True)
        return network


def head_network(files: checkpoint.Files, folder: str, encoder: str | None) -> Network:
    """Build the network of a head's checkpoint above the encoder at `encoder`, by default its place in training.

    Raises `TableError` for files of another network, `WeightsError` if the encoder is missing, and `UserError` if it is
    another one.
    """
    with checkpoint.fitting(folder):
        about = TrainedHead(**{**files.config, "scale": _scale(files)})
        head = QualityHead(len(files.weights["norm_input.weight"]), *HEAD)
        head.load_state_dict(files.weights)
    place = encoder or about.encoder
    loaded = speech_encoder.load(place, about.layer)
    if loaded.digest != about.encoder_sha256:
        raise UserError(
            f"{place}: not the encoder that the head in {folder} was trained on", "give the place of that one"
        )
    return Network(loaded.encoder, head)


def teacher_network(files: checkpoint.Files, folder: str, encoder: str | None) -> Network:
    """Build the network of a checkpoint with encoder and head.

    Raises `TableError` for files of another network, and `UserError` for an `encoder`, which would not be used.
    """
    if encoder:
        raise UserError(f"{folder} holds its own encoder", f"{encoder} would not be used, leave it out")
    with checkpoint.fitting(folder):
        return TrainedTeacher(**{**files.config, "scale": _scale(files)}).network(files.weights)


def trained_scorer(network: Network, files: checkpoint.Files, name: str, options: TeacherOptions) -> WindowScorer:
    """Make a teacher of the network of a checkpoint."""
    # All that decides a score: a head's encoder is in another file.
    known = [files.weights_hash, vars(_scale(files)), *(files.config.get(key) for key in ("encoder_sha256", "layer"))]
    return scorer(network, name, fingerprint.of(known), _scale(files), options)


def _scale(files: checkpoint.Files) -> Scale:
    return Scale(**files.config["scale"])
