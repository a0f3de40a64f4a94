"""How noise predictions are composed: Eq. 4, 7 and 8. Tensors in, tensor out."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def dual_guidance(
    noise_pred_uncond: Tensor,
    noise_pred_text: Tensor,
    noise_pred_text_gps: Tensor,
    guidance_scale: float,
    gps_guidance_scale: float,
) -> Tensor:
    """Eq. 4: e(0,0) + w_p (e(p,0) - e(0,0)) + w_g (e(p,g) - e(p,0)).

    All tensors share one shape; ``guidance_scale`` is w_p, ``gps_guidance_scale`` is w_g.
    """
    return (
        noise_pred_uncond
        + guidance_scale * (noise_pred_text - noise_pred_uncond)
        + gps_guidance_scale * (noise_pred_text_gps - noise_pred_text)
    )


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
        part = chunk.double().sum(dim=0)
        total = part if total is None else total + part
        count += chunk.shape[0]
        dtype = chunk.dtype
    if total is None:
        raise ValueError("area_noise needs the prediction of at least one location, got none.")
    return (total / count).to(dtype)
