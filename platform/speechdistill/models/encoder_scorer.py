"""A quality head above a speech encoder as a scorer of waves: what the XLS-R teachers have in common."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechdistill.data.label_scale import Scale
from speechdistill.io import checkpoint, fingerprint
from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.io.errors import UserError
from speechdistill.models.device import torch_device
from speechdistill.models.networks import slim_encoder, speech_encoder
from speechdistill.models.networks.conv_transformer import SEGMENT_SAMPLES, QualityHead
from speechdistill.models.networks.speech_encoder import Encoder, middle
from speechdistill.models.windowed import DTYPES, HOP_S, Windowed, check, segment_starts

WHOLE_S = 15.0
"""A longer wave is judged in windows, as the original advises from there on."""

HEAD = (32, 4, 4)
"""Width, attention heads and layers of the paper's head (section IV-A)."""

HEAD_ABOVE_ENCODER = "head_above_encoder"
"""The architecture in a checkpoint whose weights are a head's alone."""

ENCODER_AND_HEAD = "encoder_and_head"
"""The architecture in a checkpoint whose weights are both."""

NAMES = {HEAD_ABOVE_ENCODER: "quality_head", ENCODER_AND_HEAD: "trained_teacher"}
"""What such teachers are called in labels."""

_AS_IS = Scale()
_BATCH_S = {"cpu": SEGMENT_SAMPLES / SAMPLE_RATE, "cuda": 32 * SEGMENT_SAMPLES / SAMPLE_RATE}


class EncoderScorer(Windowed):
    """Waves of up to 15 s go through the encoder whole; the head hears the 7.68 s in the middle, as in the original.

    Longer ones are judged in windows of 7.68 s at most `hop_s` apart. Waves of any lengths make a batch, `batch_s` in
    windows of 7.68 s; each scores as if alone. In bfloat16 the convolutions over samples and the head stay float32.
    `scale` is applied to the head's logits; `compile`: torch compiles the encoder's blocks at the first batch. Raises
    `UserError` for a head that does not fit the encoder, and for a wrong device, dtype, batch or hop.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: QualityHead,
        name: str,
        weights_hash: str,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = HOP_S,
        scale: Scale = _AS_IS,
        compile: bool = False,
    ) -> None:
        check(dtype, batch_s, hop_s)
        wants = head.norm_input.num_features
        if wants != encoder.dim:
            raise UserError(
                f"the head takes features of {wants}, the encoder gives {encoder.dim}", "give the encoder of the head"
            )
        self.name, self.weights_hash = name, weights_hash
        self._segment = SEGMENT_SAMPLES
        self._device = torch_device(device)
        at_once_s = batch_s or _BATCH_S.get(self._device.type, _BATCH_S["cpu"])
        self._batch = max(1, int(at_once_s * SAMPLE_RATE / SEGMENT_SAMPLES + 1e-6))
        self._hop = max(1, round(hop_s * SAMPLE_RATE))
        self._scale = scale
        self.network = Network(encoder.to_dtype(DTYPES[dtype]), head).to(self._device).eval()
        if compile:
            for block in encoder.model.encoder.layers:  # one by one: they are alike, so it is done once
                block.compile(dynamic=True)

    def _starts(self, wave: np.ndarray) -> list[int]:
        return [0] if _is_whole(wave) else segment_starts(len(wave), self._hop)

    def _window(self, wave: np.ndarray, start: int) -> np.ndarray:
        return wave if _is_whole(wave) else super()._window(wave, start)

    def _forward(self, windows: Sequence[np.ndarray]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.network(*self.network.encoder.prepared(windows))
            return logits.double() * self._scale.a + self._scale.b


class Network(nn.Module):
    """The arguments of `Encoder.forward` to logits (batch,) float32."""

    def __init__(self, encoder: Encoder, head: QualityHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, waves: Tensor, lengths: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(middle(*self.encoder(waves, lengths)))
        return logits


@dataclass(frozen=True)
class TrainedHead:
    """What stands in the checkpoint of a head beside its weights; `encoder` is its address when it was trained."""

    encoder: str
    encoder_sha256: str
    layer: int
    scale: Scale

    def save(self, head: QualityHead, folder: str, provenance: Mapping[str, Any]) -> None:
        checkpoint.write(head, folder, HEAD_ABOVE_ENCODER, asdict(self), provenance)


@dataclass(frozen=True)
class TrainedTeacher:
    """What stands in the checkpoint of an encoder and its head, whose weights are both in it."""

    encoder: Mapping[str, Any]
    block_sizes: list[tuple[int, int]]
    normalises: bool
    scale: Scale

    @classmethod
    def of(cls, network: "Network", scale: Scale) -> "TrainedTeacher":
        model = network.encoder.model
        config = json.loads(model.config.to_json_string(use_diff=False))
        return cls(config, slim_encoder.sizes(model), network.encoder.normalises, scale)

    def save(self, network: "Network", folder: str, provenance: Mapping[str, Any]) -> None:
        checkpoint.write(network, folder, ENCODER_AND_HEAD, asdict(self), provenance)

    def network(self, weights: Mapping[str, Tensor]) -> "Network":
        head = QualityHead(len(weights["head.norm_input.weight"]), *HEAD)
        network = Network(speech_encoder.rebuilt(self.encoder, self.block_sizes, self.normalises), head)
        network.load_state_dict(weights, assign=True)
        return network


def network(files: checkpoint.Files, folder: str, encoder: str | None = None) -> "Network":
    """The encoder and head of a checkpoint; `encoder` is where that of a head alone is now.

    Raises `TableError` for files of another network, `WeightsError` if the encoder is missing, and `UserError` if it
    is another one, or none is wanted.
    """
    if encoder and files.architecture == ENCODER_AND_HEAD:
        raise UserError(f"{folder} holds its own encoder", f"{encoder} would not be used, leave it out")
    with checkpoint.fitting(folder):
        config = {**files.config, "scale": Scale(**files.config["scale"])}
        if files.architecture == ENCODER_AND_HEAD:
            return TrainedTeacher(**config).network(files.weights)
        about = TrainedHead(**config)
        head = QualityHead(len(files.weights["norm_input.weight"]), *HEAD)
        head.load_state_dict(files.weights)
    place = encoder or about.encoder
    found, digest = speech_encoder.load(place, about.layer)
    if digest != about.encoder_sha256:
        raise UserError(
            f"{place}: not the encoder that the head in {folder} was trained on", "give the place of that one"
        )
    return Network(found, head)


def from_files(files: checkpoint.Files, folder: str, encoder: str | None = None, **options: Any) -> EncoderScorer:
    """The scorer of a checkpoint; `options` are those of `EncoderScorer`. Raises what `network` raises."""
    parts = network(files, folder, encoder)
    name, scale = NAMES[files.architecture], Scale(**files.config["scale"])
    # All that decides a score; a head's encoder is another file.
    known = [files.weights_hash, vars(scale), *(files.config.get(key) for key in ("encoder_sha256", "layer"))]
    return EncoderScorer(parts.encoder, parts.head.eval(), name, fingerprint.of(known), scale=scale, **options)


def _is_whole(wave: np.ndarray) -> bool:
    return len(wave) <= WHOLE_S * SAMPLE_RATE
