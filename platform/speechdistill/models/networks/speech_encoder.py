"""The speech encoders of transformers up to one layer: XLS-R, wav2vec 2.0, HuBERT and WavLM, of any size.

Only the tensors that this layer needs are read from a checkpoint, and hashed.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from speechdistill.io.errors import UserError, WeightsError
from speechdistill.models.device import on_device
from speechdistill.models.networks import slim_encoder
from speechdistill.models.networks.conv_transformer import FRAMES

XLSR_2B = "hf://facebook/wav2vec2-xls-r-2b"

_BROKEN = (
    *(RuntimeError, ValueError, OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError),
    SafetensorError,
)
"""Exceptions of loaders for a file that is not the expected checkpoint."""

_CLASSES = {"wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel", "wavlm": "WavLMModel"}
_FILES = (
    "config.json",
    "preprocessor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
)
_FIX = (
    "give a folder with config.json, preprocessor_config.json and model.safetensors or pytorch_model.bin, or "
    "hf://facebook/wav2vec2-xls-r-2b, which downloads it (8.7 GB, Apache 2.0)"
)
# Settings of a configuration that affect the result and do not follow from the tensors.
_DECIDING = (
    "model_type",
    "num_attention_heads",
    "hidden_act",
    "conv_kernel",
    "conv_stride",
    "feat_extract_norm",
    "feat_extract_activation",
    "do_stable_layer_norm",
    "layer_norm_eps",
    "num_conv_pos_embedding_groups",
)
_WEIGHT_NORM = {
    "conv.weight_g": "conv.parametrizations.weight.original0",
    "conv.weight_v": "conv.parametrizations.weight.original1",
}


class Loaded(NamedTuple):
    """An encoder, and the sha256 of the weights that were read and of the settings that affect the result."""

    encoder: "Encoder"
    digest: str


class Encoder(nn.Module):
    """Waves to hidden states. `model` is a model of transformers; its parts after the convolutions compute in `dtype`.

    `normalises`: the model takes waves of zero mean and unit variance.
    """

    def __init__(self, model: nn.Module, normalises: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model: Any = model
        self.normalises = normalises
        self.to_dtype(dtype)

    def to_dtype(self, dtype: torch.dtype) -> "Encoder":
        """Compute in `dtype` after the convolutions over samples, which stay float32."""
        for part in (self.model.feature_projection, self.model.encoder):
            part.to(dtype)
        return self

    @property
    def dim(self) -> int:
        return int(self.model.config.hidden_size)

    def prepared(self, waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor | None]:
        """Turn waves of any lengths into the arguments of `forward`, on the encoder's device."""
        lengths = [len(wave) for wave in waves]
        batch = np.zeros((len(waves), max(lengths)), np.float32)
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7) if self.normalises else wave
        device = next(self.parameters()).device
        padded = None if min(lengths) == max(lengths) else on_device(np.array(lengths), device)
        return on_device(batch, device), padded

    def forward(self, waves: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map waves (batch, num_samples) to hidden states (batch, frames, dim) and counts of valid frames (batch,).

        `lengths` (batch,) are those of zero-padded waves, None if all are of one length. Hidden states are float32,
        float64 if the model is.
        """
        dtype = self.model.feature_projection.projection.weight.dtype
        features = self._features(waves, lengths).to(dtype)  # (batch, frames, 512)
        projected = self.model.feature_projection(features)
        hidden = projected[0] if isinstance(projected, tuple) else projected
        counts = torch.full((len(hidden),), hidden.shape[1], device=waves.device)
        mask: Tensor | None = None
        if lengths is not None:
            counts = self._num_frames(lengths)
            mask = torch.arange(hidden.shape[1], device=waves.device) < counts[:, None]
        hidden = self.model.encoder(hidden, attention_mask=mask).last_hidden_state
        return hidden if hidden.dtype is torch.float64 else hidden.float(), counts

    def _features(self, waves: Tensor, lengths: Tensor | None) -> Tensor:
        """Apply the convolutions; zeros follow the frames of shorter waves."""
        # Some models normalise over time, padding included; and on a CPU a batch only fills the caches.
        alone = self.model.config.feat_extract_norm == "group" or waves.device.type == "cpu"
        if not alone:
            features: Tensor = self.model.feature_extractor(waves).transpose(1, 2)
            return features
        whole = zip(waves, [waves.shape[1]] * len(waves) if lengths is None else lengths.tolist(), strict=True)
        parts = [self.model.feature_extractor(wave[None, :length])[0].T for wave, length in whole]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def _num_frames(self, lengths: Tensor) -> Tensor:
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True):
            lengths = (lengths - kernel) // stride + 1
        return lengths


def middle(frames: Tensor, counts: Tensor) -> Tensor:
    """Cut the middle 384 of the first `counts` (batch,) frames of (batch, frames, dim); zeros follow fewer frames."""
    wanted = torch.arange(FRAMES, device=frames.device) + ((counts - FRAMES) // 2).clamp(min=0)[:, None]
    there = wanted < counts[:, None]
    return frames.take_along_dim(wanted.clamp(max=frames.shape[1] - 1)[..., None], 1) * there[..., None]


def by_length(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Batch waves of similar length, as indices: at most `most` samples with padding, or one wave."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[i] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def build(config: Any, layer: int) -> Any:
    """Build a model of transformers up to block `layer`, without weights (meta device).

    The output is hidden state `layer`, before the norm that some models have after their last block. Nothing is random,
    even in training (no LayerDrop, SpecAugment or dropout). Raises `UserError` for an unsupported model or a layer that
    the model lacks.
    """
    import transformers

    if config.model_type not in _CLASSES:
        raise UserError(f"a model of type {config.model_type!r}", f"choose from {', '.join(_CLASSES)}")
    if not 1 <= layer <= config.num_hidden_layers:
        raise UserError(f"layer {layer}", f"the encoder has {config.num_hidden_layers}: choose one of these")
    kind = getattr(transformers, _CLASSES[config.model_type])
    config.num_hidden_layers, config.add_adapter = layer, False
    config.mask_time_prob = config.mask_feature_prob = config.layerdrop = 0.0
    for name in ("hidden", "attention", "activation", "feat_proj"):
        setattr(config, f"{name}_dropout", 0.0)
    config._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"
    with torch.device("meta"):
        model = kind(config)
    if config.do_stable_layer_norm:
        model.encoder.layer_norm = nn.Identity()
    return model.eval().requires_grad_(False)


def load(place: str, layer: int) -> Loaded:
    """Load the encoder in a folder of transformers' format, or at hf://OWNER/NAME, up to hidden state `layer`.

    Raises `WeightsError` if the files are missing, `UserError` if they are not a speech encoder.
    """
    from transformers import AutoConfig

    folder = located(place)
    digest: Any = hashlib.sha256()
    try:
        model = build(AutoConfig.from_pretrained(folder, local_files_only=True), layer)
        wanted = set(model.state_dict())
        state = {name: tensor.float() for name, tensor in _read(folder, wanted, model.base_model_prefix)}
        model.load_state_dict(state, assign=True)
        normalises = _normalises(folder)
    except UserError:
        raise
    except _BROKEN as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"{folder}: not the weights of a speech encoder ({reason})", _FIX) from error
    digest.update(json.dumps([normalises, *(getattr(model.config, name, None) for name in _DECIDING)]).encode())
    for name in sorted(state):
        digest.update(f"{name}\0".encode())
        digest.update(state[name].contiguous().numpy())
    _without_weight_norm(model)
    model.requires_grad_(False)
    return Loaded(Encoder(model, normalises), digest.hexdigest())


def rebuilt(config: Mapping[str, Any], block_sizes: Sequence[Sequence[int]], normalises: bool) -> Encoder:
    """Build an encoder without weights (meta device) from transformers' configuration and `slim_encoder.sizes`."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(**config)
    model = build(known, known.num_hidden_layers)
    slim_encoder.resize(model, block_sizes)
    _without_weight_norm(model)
    return Encoder(model, normalises)


def _without_weight_norm(model: Any) -> None:
    """Compute the position convolution's weight once, not for each batch."""
    conv = getattr(model.encoder.pos_conv_embed, "conv", None)
    if conv is not None and nn.utils.parametrize.is_parametrized(conv):
        nn.utils.parametrize.remove_parametrizations(conv, "weight")
        conv.weight = nn.Parameter(conv.weight.detach())  # of frozen weights, torch leaves a plain tensor


def located(place: str, only_here: bool = False) -> Path:
    """Return the local folder of an encoder; download one from the hub, unless `only_here`."""
    if not place.startswith("hf://"):
        if not Path(place, "config.json").is_file():
            raise WeightsError(f"{place}: no speech encoder there", _FIX)
        return Path(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    owner_name = place.removeprefix("hf://")
    try:
        return Path(snapshot_download(owner_name, allow_patterns=list(_FILES), local_files_only=only_here))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = "" if only_here else ", and the hub gives no answer"
        raise WeightsError(f"{owner_name} is not in this machine's cache of the hub{why}", _FIX) from error


def _normalises(folder: Path) -> bool:
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    return bool(settings.get("do_normalize", True))  # as in transformers


def _read(folder: Path, wanted: set[str], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Read the `wanted` tensors of a checkpoint, by their names in transformers 5, and no others."""
    for file in _files(folder):
        keys, tensor = _opened(file)
        for key in keys:
            name = key.removeprefix(f"{prefix}.")
            for old, new in _WEIGHT_NORM.items():
                name = name.replace(old, new)
            if name in wanted:
                yield name, tensor(key)


def _files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if (folder / name).is_file():
            return [folder / name]
    raise WeightsError(f"{folder}: no weights of a speech encoder there", _FIX)


def _opened(file: Path) -> tuple[Iterable[str], Callable[[str], Tensor]]:
    """Return the tensors' names and a function that reads one; both kinds of file are mapped into memory."""
    if file.suffix == ".safetensors":
        tensors: Any = safe_open(file, "pt")
        return tensors.keys(), tensors.get_tensor
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return state, state.__getitem__
