"""GPS and bearing as tokens beside the text tokens (Sec. 3.1 and 3.2).

Both encoders are ordinary diffusers models: ``save_pretrained`` writes this module's path, so the
module never moves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from gps_guidance.geo import Bounds

TEXT_TOKEN_STD = 1.0  # CLIP's last hidden state is layer-normalised: about unit scale


def positional_encoding(x: Tensor, num_freqs: int, include_input: bool) -> Tensor:
    """NeRF's encoding: sin and cos of 2^k pi x for k = 0 .. num_freqs - 1, in x's dtype.

    x [..., C] -> [..., C * (2 num_freqs + include_input)]. Its period is 2, so that -1 and +1 meet
    unless the raw input is included.
    """
    freqs = math.pi * 2.0 ** torch.arange(num_freqs, device=x.device, dtype=x.dtype)
    phase = x[..., None] * freqs
    parts = [phase.sin(), phase.cos()]
    if include_input:
        parts.append(x[..., None])
    return torch.cat(parts, dim=-1).flatten(-2)


class _TokenMLP(nn.Sequential):
    """Two-layer MLP, optionally scaled at initialisation so that its tokens vary as text does."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, out_dim))

    @property
    def output(self) -> nn.Linear:
        """The last layer, which gives the tokens."""
        layer = self[2]
        assert isinstance(layer, nn.Linear)
        return layer

    def tokens(self, code: Tensor) -> Tensor:
        """The MLP of codes [..., C] on the CPU, on its own device and in its own precision."""
        weight = self.output.weight
        if not weight.is_meta:  # else the weights are offloaded, and their hooks move the input
            code = code.to(weight.device)
        return self(code.to(weight.dtype))

    @torch.no_grad()
    def match_scale(self, inputs: Tensor, std: float) -> None:
        """Scale the output layer so that tokens vary over ``inputs`` with deviation ``std``."""
        if self.output.weight.is_meta:  # from_pretrained builds here first; the values are loaded
            return
        spread = self(inputs).std(dim=0).mean().clamp_min(1e-6)
        self.output.weight.mul_(std / spread)
        self.output.bias.zero_()


class GPSEncoder(ModelMixin, ConfigMixin):
    """(lat, lon) in degrees -> two tokens [f(x), f(y)] beside the text tokens.

    x and y are longitude and latitude normalised to [-1, 1] over ``bounds`` (south, west, north,
    east in degrees). One MLP f is shared, plus a learned embedding of the axis: cross-attention
    ignores token order, and without it (x, y) and (y, x) would give the same image.
    ``axis_embedding=False`` and ``match_text_scale=False`` give the paper's literal text.
    ``num_photos`` and ``photo_license`` say what the model was trained on, for its card.
    """

    num_tokens = 2

    config: Any  # diffusers types it as a plain dict, but it has the arguments as attributes
    config_name: Any  # its two base classes disagree

    @register_to_config
    def __init__(
        self,
        cross_attention_dim: int = 768,
        bounds: tuple[float, float, float, float] = (-90.0, -180.0, 90.0, 180.0),
        num_freqs: int = 10,
        hidden_dim: int | None = None,
        axis_embedding: bool = True,
        match_text_scale: bool = True,
        null_text: str = "zeros",
        num_photos: int | None = None,
        photo_license: str | None = None,
    ) -> None:
        super().__init__()
        check_null_text(null_text)
        self.bounds = Bounds(*bounds)
        in_dim = 2 * num_freqs + 1
        self.mlp = _TokenMLP(in_dim, hidden_dim or cross_attention_dim, cross_attention_dim)
        if match_text_scale:
            grid = torch.linspace(-1, 1, 257)[:, None]
            self.mlp.match_scale(positional_encoding(grid, num_freqs, True), TEXT_TOKEN_STD)
        scale = TEXT_TOKEN_STD if match_text_scale else 0.02
        self.axis = nn.Parameter(torch.randn(2, cross_attention_dim) * scale * axis_embedding)
        self.axis.requires_grad_(axis_embedding)

    def forward(self, gps: Any) -> Tensor:
        """(lat, lon) [B, 2] in degrees -> tokens [B, 2, cross_attention_dim]."""
        if isinstance(gps, Tensor):
            gps = gps.detach().cpu().numpy()
        xy = torch.as_tensor(self.bounds.normalize(gps)).to(torch.float32)
        code = positional_encoding(xy.reshape(-1, 2, 1), self.config.num_freqs, True)
        tokens: Tensor = self.mlp.tokens(code)
        return tokens + self.axis if self.config.axis_embedding else tokens

    def null(self, batch_size: int) -> Tensor:
        """The tokens of "no GPS" (A.2.1): zeros [B, 2, cross_attention_dim]."""
        return _zeros(self.axis, batch_size, 2, self.config.cross_attention_dim)


class AngleEncoder(ModelMixin, ConfigMixin):
    """Bearing in degrees -> one token [B, 1, D] after the text tokens (A.2.1).

    The bearing is divided by 180 to [-1, 1] and positionally encoded without the raw input, so
    that -180 and 180 degrees are the same token. The configuration also keeps what inference must
    agree on with training: the landmark, its centre (lat, lon), the prompt, the number of bins,
    the resolution ([height, width] or one int, in pixels) and what "no text" means.
    ``num_photos`` and ``photo_license`` say what the model was trained on, for its card.
    """

    num_tokens = 1

    config: Any  # diffusers types it as a plain dict, but it has the arguments as attributes
    config_name: Any  # its two base classes disagree

    @register_to_config
    def __init__(
        self,
        cross_attention_dim: int = 768,
        num_freqs: int = 10,
        hidden_dim: int | None = None,
        match_text_scale: bool = True,
        num_bins: int = 36,
        resolution: int | tuple[int, int] = 256,
        landmark: str = "",
        center: tuple[float, float] | None = None,
        prompt: str = "A photo of {landmark}",
        null_text: str = "zeros",
        num_photos: int | None = None,
        photo_license: str | None = None,
    ) -> None:
        super().__init__()
        check_null_text(null_text)
        hidden = hidden_dim or cross_attention_dim
        self.mlp = _TokenMLP(2 * num_freqs, hidden, cross_attention_dim)
        if match_text_scale:
            circle = torch.arange(-180.0, 180.0, 1.0)[:, None] / 180.0
            self.mlp.match_scale(positional_encoding(circle, num_freqs, False), TEXT_TOKEN_STD)

    @property
    def prompt(self) -> str:
        """The fixed prompt of this landmark."""
        return self.config.prompt.format(landmark=self.config.landmark)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels at which the model was trained."""
        resolution = self.config.resolution
        if isinstance(resolution, int):
            return (resolution, resolution)
        return (int(resolution[0]), int(resolution[1]))

    @torch.no_grad()
    def silence(self) -> AngleEncoder:
        """Make the token of every bearing that of "no angle", and keep it so in training."""
        self.mlp.output.weight.zero_()
        self.mlp.output.bias.zero_()
        return self.requires_grad_(False)

    @property
    def is_silent(self) -> bool:
        """Whether a bearing changes nothing (:meth:`silence`)."""
        return not any(bool(p.any()) for p in self.mlp.output.parameters())

    def forward(self, bearing_deg: Tensor) -> Tensor:
        """Bearings [B] in degrees, any turn of the circle -> tokens [B, 1, D].

        The angle is wrapped and encoded in float64: 2^9 pi amplifies rounding 1,600 times.
        """
        turn = torch.as_tensor(bearing_deg, dtype=torch.float64, device="cpu").reshape(-1, 1)
        wrapped = torch.remainder(turn + 180.0, 360.0) / 180.0 - 1.0
        code = positional_encoding(wrapped, self.config.num_freqs, False)
        return self.mlp.tokens(code)[:, None]

    def null(self, batch_size: int) -> Tensor:
        """The token of "no angle" (A.2.1): zeros [B, 1, D]."""
        weight = self.mlp.output.weight
        return _zeros(weight, batch_size, 1, self.config.cross_attention_dim)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Plain zeros of the device and precision of a weight, of which this process may hold a part
    (``new_zeros`` would be a part as well)."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def check_null_text(null_text: str) -> None:
    """Refuse any other convention for "no text" than zero tokens or the embedding of ""."""
    if null_text not in ("zeros", "empty"):
        raise ValueError(f"null_text is {null_text!r}; it must be 'zeros' or 'empty'.")
