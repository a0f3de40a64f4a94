"""How noise predictions are composed: Eq. 4, 7 and 8. Tensors in, tensor out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def dual_guidance_weights(
    guidance_scale: float, gps_guidance_scale: float
) -> tuple[float, float, float]:
    """Eq. 4 sorted by prediction: the weights of e(0,0), e(p,0) and e(p,g), which sum to 1.

    ``guidance_scale`` is w_p, ``gps_guidance_scale`` is w_g. A prediction whose weight is 0 need
    not be computed.
    """
    return (1 - guidance_scale, guidance_scale - gps_guidance_scale, gps_guidance_scale)


def dual_guidance(
    noise_pred_uncond: Tensor | None,
    noise_pred_text: Tensor | None,
    noise_pred_text_gps: Tensor | None,
    guidance_scale: float,
    gps_guidance_scale: float,
) -> Tensor:
    """Eq. 4: e(0,0) + w_p (e(p,0) - e(0,0)) + w_g (e(p,g) - e(p,0)).

    All tensors share one shape; ``guidance_scale`` is w_p, ``gps_guidance_scale`` is w_g. A
    prediction may be None where :func:`dual_guidance_weights` gives it the weight 0.
    """
    weights = dual_guidance_weights(guidance_scale, gps_guidance_scale)
    predictions = (noise_pred_uncond, noise_pred_text, noise_pred_text_gps)
    total: Tensor | None = None
    for weight, prediction in zip(weights, predictions, strict=True):
        if weight == 0:
            continue
        assert prediction is not None, "a prediction with a weight is missing"
        term = prediction if weight == 1 else weight * prediction
        total = term if total is None else total + term
    assert total is not None, "the weights sum to 1"
    return total


def angle_guidance(noise_pred: Tensor, noise_pred_uncond: Tensor, guidance_scale: float) -> Tensor:
    """Eq. 7: (1 + w) e(p, g') - w e(0, 0), where ``guidance_scale`` is w.

    diffusers' scale s of ``uncond + s (cond - uncond)`` is 1 + w.
    """
    return noise_pred + guidance_scale * (noise_pred - noise_pred_uncond)


def area_noise(noise_preds: Iterable[Tensor]) -> Tensor:
    """The mean over locations that Eq. 8 puts in the place of e(p, g) in Eq. 4.

    ``noise_preds`` yields chunks [m_k, ...] with one prediction for each location; returns the
    mean [...] over all of them. Only one chunk is held at a time. Summed in float64, so that the
    result does not depend on the order of the locations nor on the chunk size.
    """
    total: Tensor | None = None
    count = 0
    for chunk in noise_preds:
        wide = torch.float32 if chunk.device.type == "mps" else torch.float64  # mps has no float64
        part = chunk.to(wide).sum(dim=0)
        total = part if total is None else total + part
        count += chunk.shape[0]
        dtype = chunk.dtype
    if total is None:
        raise ValueError("area_noise needs the prediction of at least one location, got none.")
    return (total / count).to(dtype)


def rescale_guidance(noise_pred: Tensor, noise_pred_cond: Tensor, rescale: float) -> Tensor:
    """Blend, by ``rescale`` in [0, 1], towards a prediction that varies as the conditional one.

    Lin et al. (2023), "Common Diffusion Noise Schedules and Sample Steps are Flawed", Sec. 3.4.
    """
    dims = list(range(1, noise_pred.ndim))
    ratio = noise_pred_cond.std(dims, keepdim=True) / noise_pred.std(dims, keepdim=True)
    return noise_pred * (rescale * ratio + 1 - rescale)
