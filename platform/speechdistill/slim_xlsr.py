"""An XLS-R encoder whose blocks have fewer attention heads and neurons than its family's: making one, and its files."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from speechdistill import table


class Kept(NamedTuple):
    """What a block keeps: numbers of attention heads and of feed-forward neurons."""

    heads: Tensor
    neurons: Tensor


def slim(encoder: Any, kept: Sequence[Kept]) -> None:
    """Make the blocks of transformers' `Wav2Vec2Model` smaller, in place; its heads stay as wide as they were."""
    for block, (heads, neurons) in zip(encoder.encoder.layers, kept, strict=True):
        attention, feed = block.attention, block.feed_forward
        width = torch.arange(attention.head_dim, device=heads.device)
        rows = (heads[:, None] * attention.head_dim + width).flatten()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, _outputs(getattr(attention, name), rows))
        attention.out_proj = _inputs(attention.out_proj, rows)
        attention.num_heads = len(heads)
        feed.intermediate_dense = _outputs(feed.intermediate_dense, neurons)
        feed.output_dense = _inputs(feed.output_dense, neurons)


def save(encoder: Any, head: nn.Module, folder: str, provenance: Mapping[str, Any]) -> None:
    """Write to a local folder or URL what the teacher `xlsr` loads, as `--weights FOLDER --head FOLDER/head.pt`.

    `model.safetensors` and `config.json` are as transformers has them, but for `block_sizes`, (heads, neurons) of each
    block, and for the position convolution's weight, which is stored without weight norm. Float32.
    """
    from safetensors.torch import save as to_bytes

    table.publish(to_bytes(_portable(encoder)), f"{folder}/model.safetensors")
    file = BytesIO()
    torch.save(_portable(head), file)
    table.publish(file.getvalue(), f"{folder}/head.pt")
    blocks = encoder.encoder.layers
    sizes = [(block.attention.num_heads, block.feed_forward.intermediate_dense.out_features) for block in blocks]
    config = json.loads(encoder.config.to_json_string(use_diff=False))
    table.publish_json({**config, "block_sizes": sizes, "provenance": dict(provenance)}, f"{folder}/config.json")


def like_saved(encoder: Any) -> None:
    """Give an encoder built from the configuration that `save` wrote, yet without weights, the sizes of its file."""
    sizes = encoder.config.block_sizes[: len(encoder.encoder.layers)]
    slim(encoder, [Kept(torch.arange(heads), torch.arange(neurons)) for heads, neurons in sizes])
    nn.utils.parametrize.remove_parametrizations(encoder.encoder.pos_conv_embed.conv, "weight")


def _outputs(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    return _linear(linear.weight[rows], linear.bias[rows])


def _inputs(linear: nn.Linear, columns: Tensor) -> nn.Linear:
    return _linear(linear.weight[:, columns], linear.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous(), weight.requires_grad)
    linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return linear


def _portable(module: nn.Module) -> dict[str, Tensor]:
    state = {key: value.detach().cpu() for key, value in module.state_dict().items()}
    return {key: (value.float() if value.is_floating_point() else value).contiguous() for key, value in state.items()}
