"""The number of a model's parameters, for every table, plot and page."""

from typing import NamedTuple

import torch
from torch import nn

from speechdistill.models.networks.conv_transformer import ConvTransformer, ConvTransformerConfig


class Parameters(NamedTuple):
    """How many training changes, how many the model needs to score, and how many of these are not zero."""

    trainable: int
    stored: int
    nonzero: int

    def above(self, frozen: "Parameters") -> "Parameters":
        """Those of a head together with those of its encoder, which training leaves as they are."""
        return Parameters(self.trainable, self.stored + frozen.stored, self.nonzero + frozen.nonzero)


def count(network: nn.Module) -> Parameters:
    """Those of a network; statistics of BatchNorm and position codes are none.

    On the meta device, where there are no values, none is zero.
    """
    parameters = list(network.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    nonzero = sum(p.numel() if p.is_meta else int(p.count_nonzero()) for p in parameters)
    return Parameters(trainable, sum(parameter.numel() for parameter in parameters), nonzero)


def of_student(config: ConvTransformerConfig) -> Parameters:
    """Those of a student of this size."""
    with torch.device("meta"):
        return count(ConvTransformer(config))


def of_teacher(teacher: object) -> Parameters | None:
    """Those of a teacher's network, or of its scorer's; None if that is not torch's."""
    parts = [*vars(teacher).values(), *vars(getattr(teacher, "scorer", teacher)).values()]
    networks = [value for value in parts if isinstance(value, nn.Module)]
    if not networks:
        return None
    if isinstance(networks[0], ConvTransformer):  # a scorer has replaced its convolutions
        return of_student(networks[0].config)
    return count(networks[0])
