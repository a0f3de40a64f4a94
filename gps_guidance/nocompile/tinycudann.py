"""Stand-in for ``tinycudann``: the encodings and MLPs of the portable engine under its names.

Same functions and output sizes; not its memory layout, so that a checkpoint of one cannot be read
with the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gps_guidance.lift import networks


class Encoding(nn.Module):
    """Points [N, n_input_dims] in [0, 1] -> codes [N, n_output_dims] of ``dtype``."""

    def __init__(self, n_input_dims: int, encoding_config: Mapping[str, Any], seed: int = 1337,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.n_input_dims, self.dtype = n_input_dims, dtype or torch.float32
        self.encoding = networks.Encoding(n_input_dims, encoding_config)
        self.n_output_dims = self.encoding.n_output_dims

    def forward(self, x: Tensor) -> Tensor:
        code: Tensor = self.encoding(x)
        return code.to(self.dtype)


class Network(networks.MLP):
    """Bias-free ReLU MLP [N, n_input_dims] -> [N, n_output_dims]; ValueError for another one."""

    def __init__(self, n_input_dims: int, n_output_dims: int, network_config: Mapping[str, Any],
                 seed: int = 1337) -> None:
        name = network_config.get("activation", "ReLU")
        if str(name).lower() != "relu":
            raise ValueError(f"activation {name!r}: without tinycudann there is ReLU alone between "
                             "layers. Install tinycudann, or take otype VanillaMLP.")
        super().__init__(n_input_dims, n_output_dims, network_config)
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims


class NetworkWithInputEncoding(nn.Sequential):
    """An encoding, then an MLP."""

    def __init__(self, n_input_dims: int, n_output_dims: int, encoding_config: Mapping[str, Any],
                 network_config: Mapping[str, Any], seed: int = 1337) -> None:
        encoding = Encoding(n_input_dims, encoding_config)
        super().__init__(encoding, Network(encoding.n_output_dims, n_output_dims, network_config))
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims


def free_temporary_memory() -> None:
    """Nothing to free: torch keeps the memory."""
