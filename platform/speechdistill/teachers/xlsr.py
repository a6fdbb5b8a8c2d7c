"""XLS-R 2B to its tenth block, and the original head of Distill-MOS' teacher: 477.4 M parameters.

The encoder (Apache 2.0) is a folder in the format of transformers or a model of the hub, the head a file of the
`xls-r-sqa` wheel (MIT), which is not imported: it needs torchaudio and librosa.
"""

import hashlib
import importlib.util
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from speechdistill import slim_xlsr
from speechdistill.audio import SAMPLE_RATE
from speechdistill.scorer import DTYPES, HOP_S, Windowed, check, segment_starts, torch_device
from speechdistill.students.conv_transformer import SEGMENT_SAMPLES, QualityHead

HUB = "hf://facebook/wav2vec2-xls-r-2b"
BLOCKS = 10  # hidden state 10 is what the tenth block gives
WHOLE_S = 15.0
"""A longer wave is judged in windows, as the original advises from there on."""

_FRAMES = 384  # of the head: those of the middle, or zeros after the last
_HEAD = (32, 4, 4)  # width, attention heads, layers
_BATCH_S = {"cpu": SEGMENT_SAMPLES / SAMPLE_RATE, "cuda": 32 * SEGMENT_SAMPLES / SAMPLE_RATE}
_ENCODER_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
_ENCODER = (
    "give a folder with config.json and model.safetensors or pytorch_model.bin, or hf://facebook/wav2vec2-xls-r-2b, "
    "which downloads it (8.7 GB, Apache 2.0)"
)
_NO_HEAD = "{}: no such head; `pip install --no-deps xls-r-sqa==0.1.0` (15 MB, MIT) brings it, or give its path"
_BROKEN = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, SafetensorError)
# What training would drop or mask: blocks without a gradient, and losses that depend on the number of workers.
_AT_RANDOM = (
    "layerdrop",
    "mask_time_prob",
    "mask_feature_prob",
    "activation_dropout",
    "attention_dropout",
    "feat_proj_dropout",
    "hidden_dropout",
)
_WEIGHT_NORM = {
    "conv.weight_g": "conv.parametrizations.weight.original0",
    "conv.weight_v": "conv.parametrizations.weight.original1",
}


class Teacher(Windowed):
    """Waves of up to 15 s go through the encoder whole; the head hears the 7.68 s in the middle, as in the original.

    Longer ones are judged in windows of 7.68 s at most `hop_s` apart. Waves of any lengths make a batch, `batch_s` in
    windows of 7.68 s; each scores as if alone. In bfloat16 the convolutions over samples and the head stay float32.

    `weights` is the encoder's folder, or hf://OWNER/NAME to download (default: XLS-R 2B in the hub's cache), `head`
    the head's file (default: from the installed wheel), `blocks` how many of the encoder's the head wants: no others
    are read. `compile`: torch compiles them at the first batch. Raises `FileNotFoundError` where weights are missing,
    and `ValueError` for wrong ones or a wrong device, dtype, batch or hop.
    """

    def __init__(
        self,
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = HOP_S,
        head: str | None = None,
        blocks: int = BLOCKS,
        compile: bool = False,
    ) -> None:
        check(dtype, batch_s, hop_s)
        self.name = "xlsr"
        self._segment = SEGMENT_SAMPLES
        self._device = torch_device(device)
        at_once_s = batch_s or _BATCH_S.get(self._device.type, _BATCH_S["cpu"])
        self._batch = max(1, int(at_once_s * SAMPLE_RATE / SEGMENT_SAMPLES + 1e-6))
        self._hop = max(1, round(hop_s * SAMPLE_RATE))
        digest = hashlib.sha256()
        top = _head(head or _released_head(), digest)
        encoder = _encoder(_folder(weights), blocks, digest)
        self.weights_hash = digest.hexdigest()
        wants = top.norm_input.num_features
        if wants != encoder.config.hidden_size:
            raise ValueError(f"the head takes features of {wants}, the encoder gives {encoder.config.hidden_size}")
        self.network = Network(encoder, top, DTYPES[dtype]).to(self._device).eval()
        if compile:
            for block in encoder.encoder.layers:  # one by one: they are alike, so it is done once
                block.compile(dynamic=True)

    def _starts(self, wave: np.ndarray) -> list[int]:
        return [0] if _is_whole(wave) else segment_starts(len(wave), self._hop)

    def _window(self, wave: np.ndarray, start: int) -> np.ndarray:
        return wave if _is_whole(wave) else super()._window(wave, start)

    def _forward(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        lengths = [len(window) for window in windows]
        batch = np.zeros((len(windows), max(lengths)), np.float32)
        for row, window in zip(batch, windows, strict=True):
            row[: len(window)] = (window - window.mean()) / np.sqrt(window.var() + 1e-7)  # transformers' `do_normalize`
        padded = None if min(lengths) == max(lengths) else torch.tensor(lengths, device=self._device)
        with torch.inference_mode():
            logits = self.network(torch.from_numpy(batch).to(self._device), padded)
        return np.asarray(logits.cpu().numpy(), np.float64)


class Network(nn.Module):
    """Normalised waves to logits. `encoder` is transformers' `Wav2Vec2Model`, of which parts go to `dtype`."""

    def __init__(self, encoder: nn.Module, head: QualityHead, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.head = head
        for part in (self.encoder.feature_projection, self.encoder.encoder):
            part.to(dtype)

    def forward(self, waves: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, num_samples), zeros after the `lengths` (batch,) where they differ, to logits (batch,).

        Float32; float64 where all parameters and the waves are.
        """
        dtype = self.encoder.feature_projection.projection.weight.dtype
        features = self.encoder.feature_extractor(waves).transpose(1, 2).to(dtype)  # (batch, frames, 512)
        hidden, _ = self.encoder.feature_projection(features)
        counts = torch.full((len(hidden),), hidden.shape[1], device=waves.device)
        mask: Tensor | None = None
        if lengths is not None:
            counts = self._num_frames(lengths)
            mask = torch.arange(hidden.shape[1], device=waves.device) < counts[:, None]
        hidden = self.encoder.encoder(hidden, attention_mask=mask).last_hidden_state
        hidden = hidden if hidden.dtype is torch.float64 else hidden.float()
        logits: Tensor = self.head(centre(hidden, counts))
        return logits

    def _num_frames(self, lengths: Tensor) -> Tensor:
        for kernel, stride in zip(self.encoder.config.conv_kernel, self.encoder.config.conv_stride, strict=True):
            lengths = (lengths - kernel) // stride + 1
        return lengths


def centre(frames: Tensor, counts: Tensor) -> Tensor:
    """(batch, frames, dim), of which the first `counts` (batch,) are meant, to their middle 384; zeros after fewer."""
    wanted = torch.arange(_FRAMES, device=frames.device) + ((counts - _FRAMES) // 2).clamp(min=0)[:, None]
    there = wanted < counts[:, None]
    return frames.take_along_dim(wanted.clamp(max=frames.shape[1] - 1)[..., None], 1) * there[..., None]


def build(config: Any, blocks: int) -> Any:
    """Transformers' `Wav2Vec2Model` of that `Wav2Vec2Config`, as far as block `blocks`, without weights (meta device).

    Raises `ValueError` for a network that is none of the XLS-R family: with another place of its norms, padding would
    be heard, and the last norm not be the one to leave out.
    """
    from transformers import Wav2Vec2Model

    if not (config.do_stable_layer_norm and config.feat_extract_norm == "layer"):
        raise ValueError("the encoder is not of the XLS-R family (do_stable_layer_norm, feat_extract_norm 'layer')")
    if not 1 <= blocks <= config.num_hidden_layers:
        raise ValueError(f"blocks {blocks}; the encoder has {config.num_hidden_layers}")
    config.num_hidden_layers, config.add_adapter = blocks, False
    for part_of_training in _AT_RANDOM:
        setattr(config, part_of_training, 0.0)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = Wav2Vec2Model(config)
    model.encoder.layer_norm = nn.Identity()  # hidden state `blocks` is what comes before it
    if hasattr(config, "block_sizes"):
        slim_xlsr.like_saved(model)
    return model.eval().requires_grad_(False)


def _encoder(folder: Path, blocks: int, digest: Any) -> Any:
    from transformers import Wav2Vec2Config

    try:
        model = build(Wav2Vec2Config.from_pretrained(folder, local_files_only=True), blocks)
        wanted = set(model.state_dict())
        state = {name: tensor.float() for name, tensor in _read(folder, wanted)}
        model.load_state_dict(state, assign=True)
    except _BROKEN as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise ValueError(f"{folder}: not the weights of an XLS-R encoder ({reason})") from error
    for name in sorted(state):
        digest.update(f"{name}\0".encode())
        digest.update(state[name].contiguous().numpy())
    conv = model.encoder.pos_conv_embed.conv
    if nn.utils.parametrize.is_parametrized(conv):  # its weight once, and not anew for each batch
        nn.utils.parametrize.remove_parametrizations(conv, "weight")
    return model.requires_grad_(False)


def _read(folder: Path, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The `wanted` tensors of a checkpoint by their names in transformers 5; of the others nothing is read."""
    for file in _files(folder):
        keys, tensor = _opened(file)
        for key in keys:
            name = key.removeprefix("wav2vec2.")
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
    raise FileNotFoundError(f"{folder}: no weights of an XLS-R encoder there; {_ENCODER}")


def _opened(file: Path) -> tuple[Iterable[str], Callable[[str], Tensor]]:
    """Its names and what reads one; both kinds of file are mapped into memory."""
    if file.suffix == ".safetensors":
        tensors: Any = safe_open(file, "pt")
        return tensors.keys(), tensors.get_tensor
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return state, state.__getitem__


def _folder(weights: str | None) -> Path:
    """Where the encoder is; only an address that was given is downloaded, and not 8.7 GB because nothing was."""
    if weights and not weights.startswith("hf://"):
        if not Path(weights, "config.json").is_file():
            raise FileNotFoundError(f"{weights}: no XLS-R encoder there; {_ENCODER}")
        return Path(weights)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    owner_name, only_here = (weights or HUB).removeprefix("hf://"), not weights
    try:
        return Path(snapshot_download(owner_name, allow_patterns=list(_ENCODER_FILES), local_files_only=only_here))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = "" if only_here else ", and the hub gives no answer"
        raise FileNotFoundError(f"{owner_name} is not in this machine's cache of the hub{why}; {_ENCODER}") from error


def _released_head() -> str:
    spec = importlib.util.find_spec("xls_r_sqa")  # finds the package without importing it
    folder = Path(spec.origin).parent if spec and spec.origin else Path("xls_r_sqa")
    # Version 2: the files of the first are the wrong checkpoint, says the wheel.
    return str(folder / "models" / "sqa-v2" / "xls-r-2b" / "model_2b_lay10_full.pt")


def _head(path: str, digest: Any) -> QualityHead:
    try:
        with fsspec.open(path, "rb") as file:
            data = bytes(file.read())
    except FileNotFoundError as error:
        raise FileNotFoundError(_NO_HEAD.format(path)) from error
    digest.update(hashlib.sha256(data).digest())
    try:
        state = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
        head = QualityHead(len(state["norm_input.weight"]), *_HEAD)
        head.load_state_dict(state)
    except _BROKEN as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise ValueError(f"{path}: not a head of XLS-R ({reason})") from error
    return head.eval()


def _is_whole(wave: np.ndarray) -> bool:
    return len(wave) <= WHOLE_S * SAMPLE_RATE
