"""The number of a model's parameters, for every table, plot and page."""

from typing import NamedTuple

import torch
from torch import nn

from speechdistill.models.networks.conv_transformer import ConvTransformer, ConvTransformerConfig


class Parameters(NamedTuple):
    """The number of parameters that training changes, that scoring needs, and of the latter that are not zero."""

    trainable: int
    stored: int
    nonzero: int

    def above(self, frozen: "Parameters") -> "Parameters":
        """Add those of the encoder that training leaves frozen below a head."""
        return Parameters(self.trainable, self.stored + frozen.stored, self.nonzero + frozen.nonzero)


def count(network: nn.Module) -> Parameters:
    """Count a network's parameters, without BatchNorm statistics and position codes.

    Parameters on the meta device have no values and count as nonzero.
    """
    parameters = list(network.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    nonzero = sum(p.numel() if p.is_meta else int(p.count_nonzero()) for p in parameters)
    return Parameters(trainable, sum(parameter.numel() for parameter in parameters), nonzero)


def of_student(config: ConvTransformerConfig) -> Parameters:
    """Count the parameters of a student of this size."""
    with torch.device("meta"):
        return count(ConvTransformer(config))
