"""Score distillation (Eq. 10): schedules, weights, gradient, loss. Tensors in, tensors out.

Shapes: latents and noise predictions [B, C, h, w], images [B, 3, H, W] in [0, 1], timesteps [B],
weights and alphas_cumprod of a batch [B, 1, 1, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WEIGHTING_STRATEGIES = ("sds", "uniform", "fantasia3d")


def schedule(value: Any, epoch: int, global_step: int) -> float:
    """The value at this point of training of threestudio's schedule notation.

    A number is constant; ``[start, v0, v1, end]`` goes linearly from v0 to v1 and is held outside;
    ``[v0, v1, end]`` starts at 0; ``[s0, v0, v1, s1, v2, s2, ...]`` has several segments. An int
    end counts steps, a float end counts epochs. Anything else raises ValueError.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    try:
        numbers = [0, *value] if len(value) == 3 else list(value)
        knots = [(numbers[0], float(numbers[1]))]
        knots += [(end, float(v)) for v, end in zip(numbers[2::2], numbers[3::2], strict=True)]
        increasing = all(a[0] < b[0] for a, b in zip(knots, knots[1:], strict=False))
    except (TypeError, ValueError, IndexError):
        increasing = False
    if not increasing or len(knots) < 2:
        raise ValueError(
            f"schedule {value!r} must be a number, [v0, v1, end], [start, v0, v1, end] or "
            "[start, v0, v1, end1, v2, end2, ...] with increasing ends."
        )
    now = epoch if isinstance(knots[-1][0], float) else global_step
    (start, v0), (end, v1) = knots[0], knots[1]
    for left, right in zip(knots[1:], knots[2:], strict=False):
        if now >= left[0]:
            (start, v0), (end, v1) = left, right
    return v0 + (v1 - v0) * min(max((now - start) / (end - start), 0.0), 1.0)


def timestep_range(min_percent: float, max_percent: float, num_timesteps: int) -> tuple[int, int]:
    """Smallest and largest time step to draw, both inclusive, for a part of [0, 1] of the chain."""
    if not 0 <= min_percent <= max_percent <= 1:
        raise ValueError(
            f"min_step_percent {min_percent:g} and max_step_percent {max_percent:g} must satisfy "
            "0 <= min <= max <= 1 at every step; check both schedules."
        )
    low, high = (int(num_timesteps * p + 1e-6) for p in (min_percent, max_percent))
    return min(low, num_timesteps - 1), min(high, num_timesteps - 1)


def sds_weight(alphas_cumprod: Tensor, timesteps: Tensor, strategy: str = "sds") -> Tensor:
    """w(t) of Eq. 10 as [B, 1, 1, 1], from alphas_cumprod [T] and timesteps [B].

    ``sds``: sigma_t^2 = 1 - alpha_bar_t; ``uniform``: 1; ``fantasia3d``: sqrt(alpha_bar_t) times
    sigma_t^2.
    """
    alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    if strategy == "sds":
        return 1 - alpha_bar
    if strategy == "uniform":
        return torch.ones_like(alpha_bar)
    if strategy == "fantasia3d":
        return alpha_bar.sqrt() * (1 - alpha_bar)
    raise ValueError(
        f"weighting_strategy is {strategy!r}; it must be one of {', '.join(WEIGHTING_STRATEGIES)}."
    )


def sds_grad(noise_pred: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Eq. 10 up to dx/dtheta: w(t) (e_hat - e), the gradient with respect to the latents."""
    return weight * (noise_pred - noise)


class _GradientOf(torch.autograd.Function):
    """A scalar whose gradient is given; ``latents - (latents - grad)`` would round in float32."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad / len(latents))
        return 0.5 * grad.square().sum() / len(latents)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad_outputs[0] * grad, None


def sds_loss(latents: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose gradient with respect to ``latents`` [B, ...] is exactly ``grad`` / B.

    Its value is |grad|^2 / 2B, as threestudio logs it. ``grad`` is a constant.
    """
    return _GradientOf.apply(latents, grad.detach())


def predicted_latents(latents_noisy: Tensor, noise_pred: Tensor, alpha_bar: Tensor) -> Tensor:
    """x0_hat = (x_t - sqrt(1 - alpha_bar) e_hat) / sqrt(alpha_bar)."""
    return (latents_noisy - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()


def image_weight(weight: Tensor, alpha_bar: Tensor) -> Tensor:
    """The weight of the image term: w(t) sqrt(alpha_bar / (1 - alpha_bar)).

    A latent error is sqrt(alpha_bar / (1 - alpha_bar)) times the noise error; with w(t) = sigma_t^2
    this is sqrt(alpha_bar (1 - alpha_bar)).
    """
    return weight * (alpha_bar / (1 - alpha_bar)).sqrt()


def image_loss(images: Tensor, decoded: Tensor, weight: Tensor) -> Tensor:
    """mean(weight (images - decoded)^2), the image term that HiFA adds to score distillation.

    ``images`` are the renders and ``decoded`` = D(x0_hat), a constant; both [B, 3, H, W] in [0, 1].
    """
    return (weight * (images - decoded.detach()).square()).mean()


def perp_neg_guidance(noise_pred_text: Tensor, noise_pred_uncond: Tensor, noise_preds_neg: Tensor,
                      neg_weights: Tensor, guidance_scale: float) -> Tensor:
    """Perp-Neg (Armandpour et al., 2023): uncond + s (d + sum_i w_i d_i^perp), d = text - uncond.

    ``noise_preds_neg`` [N, B, C, h, w] holds the prediction of each negative prompt, d_i its
    difference to uncond, of which the part perpendicular to d counts; ``neg_weights`` is [B, N].
    """
    positive = noise_pred_text - noise_pred_uncond
    dims = (1, 2, 3)
    norm = positive.square().sum(dims, keepdim=True).clamp_min(1e-6)
    total = positive
    for noise_pred_neg, weight in zip(noise_preds_neg, neg_weights.unbind(1), strict=True):
        negative = noise_pred_neg - noise_pred_uncond
        parallel = (negative * positive).sum(dims, keepdim=True) / norm * positive
        total = total + weight.view(-1, 1, 1, 1) * (negative - parallel)
    return noise_pred_uncond + guidance_scale * total
