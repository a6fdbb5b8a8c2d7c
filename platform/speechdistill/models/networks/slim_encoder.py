"""Speech encoders with fewer attention heads and neurons in each block than their family."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Kept(NamedTuple):
    """The indices of the attention heads and feed-forward neurons that a block keeps."""

    heads: Tensor
    neurons: Tensor


def slim(encoder: Any, kept: Sequence[Kept]) -> None:
    """Shrink the blocks of transformers' `Wav2Vec2Model` or `HubertModel` in place; heads keep their width."""
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


def sizes(encoder: Any) -> list[tuple[int, int]]:
    """Return the numbers of attention heads and of feed-forward neurons of each block."""
    blocks = encoder.encoder.layers
    return [(block.attention.num_heads, block.feed_forward.intermediate_dense.out_features) for block in blocks]


def resize(encoder: Any, wanted: Sequence[Sequence[int]]) -> None:
    """Give an encoder without weights the `sizes` of another."""
    if sizes(encoder) != [tuple(size) for size in wanted]:
        slim(encoder, [Kept(torch.arange(heads), torch.arange(neurons)) for heads, neurons in wanted])


def _outputs(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    return _linear(linear.weight[rows], linear.bias[rows])


def _inputs(linear: nn.Linear, columns: Tensor) -> nn.Linear:
    return _linear(linear.weight[:, columns], linear.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous(), weight.requires_grad)
    linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return linear
