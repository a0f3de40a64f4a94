"""Score distillation from a diffusion model: VAE + UNet + Eq. 7 or plain guidance + Eq. 10.

The one implementation, called by the portable engine and by threestudio alike. Randomness comes
from torch's global generator, in the order: VAE posterior, time steps, noise, angle options.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gps_guidance import geo
from gps_guidance.encoders import AngleEncoder
from gps_guidance.lift import sds
from gps_guidance.lift.cameras import bearing_from_c2w
from gps_guidance.models import DiffusionModel, load_angle_model, load_model
from gps_guidance.noise import angle_guidance, rescale_guidance

logger = logging.getLogger(__name__)

SNAP_TO_BINS = ("none", "nearest", "dither")


@dataclass
class SDSGuidanceConfig:
    """What both guidances share; names, units and meaning are threestudio's.

    ``min_step_percent``, ``max_step_percent`` and ``grad_clip`` are numbers or schedules
    (:func:`gps_guidance.lift.sds.schedule`). ``half_precision_weights`` is float16 on a GPU,
    bfloat16 on a CPU. ``resolution`` is the side in pixels at which renders are encoded; null is
    the model's own.
    """

    pretrained_model_name_or_path: str = ""
    guidance_scale: float = 100.0
    grad_clip: Any = None
    half_precision_weights: bool = False
    min_step_percent: Any = 0.02
    max_step_percent: Any = 0.98
    weighting_strategy: str = "sds"
    use_img_loss: bool = False
    view_dependent_prompting: bool = True
    guidance_rescale: float = 0.0
    resolution: int | None = None
    sample_posterior: bool = True
    enable_memory_efficient_attention: bool = False
    enable_sequential_cpu_offload: bool = False
    enable_attention_slicing: bool = False
    enable_channels_last_format: bool = False


@dataclass
class GPSGuidanceConfig(SDSGuidanceConfig):
    """``gps-sds-guidance``. ``guidance_scale`` is w of Eq. 7.

    ``snap_to_bins``: the model has learned bin centres only, so that the camera's bearing is
    snapped to the "nearest" (as the paper trains), or to one of the two nearest, drawn so that the
    mean is the bearing ("dither"), or passed on ("none"). ``angle_dropout`` is the probability of a
    zero angle token; 1 is the text-only ablation. ``north_offset_deg`` is added to the bearing.
    ``lora_weights`` is the folder of a LoRA (:func:`gps_guidance.models.load_model`).
    """

    pretrained_model_name_or_path: str = "miniature-pisa"
    lora_weights: str | None = None
    view_dependent_prompting: bool = False
    north_offset_deg: float = 0.0
    snap_to_bins: str = "nearest"
    angle_dropout: float = 0.0


@dataclass
class StableDiffusionGuidanceConfig(SDSGuidanceConfig):
    """``stable-diffusion-guidance``, with threestudio's defaults.

    ``use_sjc`` is score Jacobian chaining: unit weight and, without ``var_red``, no subtracted
    noise. ``max_items_eval`` is accepted and has no effect: there is no ``guidance_eval``.
    """

    pretrained_model_name_or_path: str = "runwayml/stable-diffusion-v1-5"
    half_precision_weights: bool = True
    sqrt_anneal: bool = False
    trainer_max_steps: int = 25000
    use_sjc: bool = False
    var_red: bool = True
    token_merging: bool = False
    token_merging_params: dict[str, Any] | None = field(default_factory=dict)
    max_items_eval: int = 4


class SDSGuidance(ABC):
    """Encode, noise, predict, Eq. 10: everything but how the predictions are composed.

    Parameters never require a gradient; the only graph is that of the VAE's encoder. Not a
    Module, so that its weights stay out of checkpoints.
    """

    Config: type[SDSGuidanceConfig] = SDSGuidanceConfig
    cfg: Any
    min_step: int
    max_step: int
    grad_clip_val: float | None = None

    def __init__(self, cfg: Any, model: DiffusionModel, size: tuple[int, int],
                 device: str | torch.device) -> None:
        if cfg.weighting_strategy not in sds.WEIGHTING_STRATEGIES:
            raise ValueError(
                f"guidance.weighting_strategy is {cfg.weighting_strategy!r}; it must be one of "
                f"{', '.join(sds.WEIGHTING_STRATEGIES)}."
            )
        prediction = model.scheduler.config.prediction_type
        if prediction != "epsilon":
            raise ValueError(f"{model.path} predicts {prediction!r}; 'epsilon' is needed here.")
        self.cfg = cfg
        self.device = torch.device(device)
        self.weights_dtype = torch.float32
        if cfg.half_precision_weights:
            on_cpu = self.device.type == "cpu"
            self.weights_dtype = torch.bfloat16 if on_cpu else torch.float16
        self.size = _check_size((cfg.resolution,) * 2 if cfg.resolution else size, model)
        self.unet, self.vae = model.unet, model.vae
        if self.unet.dtype != self.weights_dtype:
            self.unet.to(self.weights_dtype)
            self.vae.to(self.weights_dtype)
        _place(self.unet, self.vae, cfg, self.device)
        self.scheduler = model.scheduler
        self.alphas_cumprod = model.scheduler.alphas_cumprod.to(self.device, torch.float32)
        self.update_step(0, 0)
        logger.info("Guidance: %s at %dx%d, %s on %s", model.path, *self.size,
                    str(self.weights_dtype).removeprefix("torch."), self.device)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set the interval of time steps and the clip for this step of training."""
        cfg = self.cfg
        low, high = self.step_percents(epoch, global_step)
        self.min_step, self.max_step = sds.timestep_range(low, high, len(self.alphas_cumprod))
        if cfg.grad_clip is not None:
            self.grad_clip_val = sds.schedule(cfg.grad_clip, epoch, global_step)

    def step_percents(self, epoch: int, global_step: int) -> tuple[float, float]:
        """The interval of time steps as parts of the chain."""
        low = sds.schedule(self.cfg.min_step_percent, epoch, global_step)
        return low, sds.schedule(self.cfg.max_step_percent, epoch, global_step)

    @abstractmethod
    def guided_noise(self, latents_noisy: Tensor, timesteps: Tensor, prompt_utils: Any,
                     batch: Mapping[str, Any]) -> Tensor:
        """e_hat [B, C, h, w] of noisy latents at ``timesteps`` [B] for a batch of cameras."""

    def __call__(self, rgb: Tensor, prompt_utils: Any, rgb_as_latents: bool = False,
                 guidance_eval: bool = False, **batch: Any) -> dict[str, Any]:
        """One step of distillation.

        ``rgb`` is [B, H, W, 3] in [0, 1] with gradient (or latents [B, H, W, 4] with
        ``rgb_as_latents``); ``batch`` holds threestudio's camera keys. Returns scalars: the losses
        ``loss_sds`` and, with ``use_img_loss``, ``loss_sds_img``; ``grad_norm``, ``min_step``,
        ``max_step``, and ``nan_grads``, the number of non-finite elements, which count as zero.
        """
        if guidance_eval:
            raise ValueError("guidance_eval is true, which is not supported: set it to false.")
        if self.cfg.use_img_loss and rgb_as_latents:
            raise ValueError("guidance.use_img_loss needs rendered images, not rgb_as_latents.")
        self._check_prompt(prompt_utils)
        with torch.autocast(self.device.type, enabled=False):  # a half-precision trainer's
            return self._distil(rgb.float(), prompt_utils, rgb_as_latents, batch)

    def _distil(self, rgb: Tensor, prompt_utils: Any, rgb_as_latents: bool,
                batch: Mapping[str, Any]) -> dict[str, Any]:
        images = self.resize(rgb, rgb_as_latents)
        latents = images if rgb_as_latents else self.encode(images)
        timesteps = torch.randint(
            self.min_step, self.max_step + 1, (len(latents),), device=latents.device
        )
        alpha_bar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        weight = sds.sds_weight(self.alphas_cumprod, timesteps, self.cfg.weighting_strategy)
        with torch.no_grad():
            noise = torch.randn_like(latents)
            latents_noisy = self.scheduler.add_noise(latents, noise, timesteps)
            noise_pred = self.guided_noise(latents_noisy, timesteps, prompt_utils, batch)
            grad, nan_grads = _zero_non_finite(self.latent_grad(noise_pred, noise, weight))
            if self.grad_clip_val is not None:
                grad = grad.clamp(-self.grad_clip_val, self.grad_clip_val)
        out: dict[str, Any] = {
            "loss_sds": sds.sds_loss(latents, grad),
            "grad_norm": grad.norm(),
            "min_step": self.min_step,
            "max_step": self.max_step,
            "nan_grads": nan_grads,
        }
        if self.cfg.use_img_loss:
            x0_hat = sds.predicted_latents(latents_noisy, noise_pred, alpha_bar)
            img_weight = sds.image_weight(weight, alpha_bar)
            out["loss_sds_img"] = self.image_loss(images, x0_hat, img_weight)
        return out

    def latent_grad(self, noise_pred: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        """The gradient with respect to the latents: Eq. 10."""
        return sds.sds_grad(noise_pred, noise, weight)

    def image_loss(self, images: Tensor, x0_hat: Tensor, weight: Tensor) -> Tensor:
        """The image term between renders and D(x0_hat), both [B, 3, H, W] in [0, 1]."""
        with torch.no_grad():
            residual, _ = _zero_non_finite(images - self.decode(x0_hat))
            if self.grad_clip_val is not None:
                limit = self.grad_clip_val / weight
                residual = residual.clamp(-limit, limit)
            decoded = images - residual
        return sds.image_loss(images, decoded, weight)

    def resize(self, rgb: Tensor, rgb_as_latents: bool = False) -> Tensor:
        """[B, H, W, C] to [B, C, h, w] at the model's size, bilinear, antialiased if it shrinks."""
        channels = self.vae.config.latent_channels if rgb_as_latents else 3
        height, width = self.size
        if rgb.ndim != 4 or rgb.shape[-1] != channels:
            raise ValueError(f"rgb has shape {list(rgb.shape)}; it must be [B, H, W, {channels}].")
        if abs(rgb.shape[1] * width - rgb.shape[2] * height) > 0.02 * rgb.shape[1] * width:
            raise ValueError(
                f"The render is {rgb.shape[1]}x{rgb.shape[2]} (height x width), the model "
                f"{height}x{width}: set data.height and data.width to that aspect ratio."
            )
        if rgb_as_latents:
            factor = _vae_factor(self.vae)
            height, width = height // factor, width // factor
        images = rgb.permute(0, 3, 1, 2)
        if images.shape[2:] == (height, width):
            return images
        shrinks = images.shape[2] > height or images.shape[3] > width
        return F.interpolate(images, (height, width), mode="bilinear", antialias=shrinks)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to scaled latents [B, C, h, w], with gradient."""
        posterior = self.vae.encode((images * 2 - 1).to(self.weights_dtype)).latent_dist
        latents = posterior.sample() if self.cfg.sample_posterior else posterior.mode()
        return (latents * self.vae.config.scaling_factor).to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to images [B, 3, H, W] in [0, 1]."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.weights_dtype)
        return (self.vae.decode(scaled).sample.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def predict_noise(self, latents_noisy: Tensor, timesteps: Tensor,
                      tokens: Tensor) -> tuple[Tensor, ...]:
        """The UNet in one call: ``tokens`` [n B, L, D] to n predictions [B, C, h, w]."""
        n = len(tokens) // len(latents_noisy)
        noise_pred = self.unet(
            latents_noisy.repeat(n, 1, 1, 1).to(self.weights_dtype),
            timesteps.repeat(n),
            encoder_hidden_states=tokens.to(self.weights_dtype),
        ).sample
        return noise_pred.to(latents_noisy.dtype).chunk(n)

    def text_embeddings(self, prompt_utils: Any, batch: Mapping[str, Any]) -> Tensor:
        """[2B, L, D] in the order (cond, uncond)."""
        return prompt_utils.get_text_embeddings(
            *_cameras(batch, "elevation", "azimuth", "camera_distances"),
            self.cfg.view_dependent_prompting,
        )

    def _check_prompt(self, prompt_utils: Any) -> None:
        seen, wanted = prompt_utils.text_embeddings.shape[-1], self.unet.config.cross_attention_dim
        if seen != wanted:
            raise ValueError(
                f"The prompt's tokens have {seen} numbers, the UNet wants {wanted}: set "
                "prompt_processor.pretrained_model_name_or_path to the guidance's model."
            )


class GPSGuidance(SDSGuidance):
    """``gps-sds-guidance``: Eq. 7 with the text and the bearing of each rendered camera.

    The unconditional branch zeroes the angle and replaces the text by the model's own "no text";
    what the prompt processor embeds for it is not used.
    """

    Config = GPSGuidanceConfig
    cfg: GPSGuidanceConfig

    def __init__(self, cfg: GPSGuidanceConfig, device: str | torch.device = "cpu") -> None:
        if cfg.snap_to_bins not in SNAP_TO_BINS:
            raise ValueError(f"guidance.snap_to_bins is {cfg.snap_to_bins!r}; it must be one of "
                             f"{', '.join(SNAP_TO_BINS)}.")
        if not 0 <= cfg.angle_dropout <= 1:
            raise ValueError(f"guidance.angle_dropout is {cfg.angle_dropout}; it lies in [0, 1].")
        model = load_angle_model(cfg.pretrained_model_name_or_path, cfg.lora_weights)
        with torch.no_grad():
            null = torch.cat([model.null_text(1), model.angle.null(1)], dim=1)
        self.gps_encoder = model.modules()["gps_encoder"].to(device)
        self.null_tokens = null.to(device)
        super().__init__(cfg, model, model.angle.size, device)

    def guided_noise(self, latents_noisy: Tensor, timesteps: Tensor, prompt_utils: Any,
                     batch: Mapping[str, Any]) -> Tensor:
        if prompt_utils.use_perp_neg:
            raise ValueError("prompt_processor.use_perp_neg is true, but gps-sds-guidance composes "
                             "by Eq. 7: set it to false.")
        text = self.text_embeddings(prompt_utils, batch)[: len(latents_noisy)]
        tokens = torch.cat([text, self.angle_tokens(*_cameras(batch, "c2w"))], dim=1)
        scale = self.cfg.guidance_scale
        if scale == 0:
            return self.predict_noise(latents_noisy, timesteps, tokens)[0]
        both = torch.cat([tokens, self.null_tokens.expand(len(tokens), -1, -1)])
        cond, uncond = self.predict_noise(latents_noisy, timesteps, both)
        noise_pred = angle_guidance(cond, uncond, scale)
        if self.cfg.guidance_rescale:
            return rescale_guidance(noise_pred, cond, self.cfg.guidance_rescale)
        return noise_pred

    def angle_tokens(self, c2w: Tensor) -> Tensor:
        """The angle token [B, 1, D] of each camera [B, 4, 4], or zeros where it is dropped."""
        dropout = self.cfg.angle_dropout
        null = self.gps_encoder.null(len(c2w))
        if dropout == 1:
            return null
        bearing = bearing_from_c2w(c2w, self.cfg.north_offset_deg)
        num_bins = self.gps_encoder.config.num_bins
        tokens = self.gps_encoder(snap_bearing(bearing, self.cfg.snap_to_bins, num_bins))
        if dropout == 0:
            return tokens
        drop = torch.rand(len(c2w), device=tokens.device) < dropout
        return torch.where(drop.view(-1, 1, 1), null, tokens)


class StableDiffusionGuidance(SDSGuidance):
    """``stable-diffusion-guidance``: text only, e(p) + s (e(p) - e(negative)), or Perp-Neg."""

    Config = StableDiffusionGuidanceConfig
    cfg: StableDiffusionGuidanceConfig

    def __init__(
        self, cfg: StableDiffusionGuidanceConfig, device: str | torch.device = "cpu"
    ) -> None:
        if cfg.use_sjc and cfg.use_img_loss:
            raise ValueError("guidance.use_sjc has no image term: set guidance.use_img_loss=false.")
        model = load_model(cfg.pretrained_model_name_or_path)
        if isinstance(model.gps_encoder, AngleEncoder):
            size = model.angle.size
        else:
            latent = model.unet.config.sample_size
            height, width = (latent, latent) if isinstance(latent, int) else latent
            size = (height * _vae_factor(model.vae), width * _vae_factor(model.vae))
        if cfg.token_merging:
            _merge_tokens(model.unet, cfg.token_merging_params)
        super().__init__(cfg, model, size, device)

    def step_percents(self, epoch: int, global_step: int) -> tuple[float, float]:
        low, high = super().step_percents(epoch, global_step)
        if not self.cfg.sqrt_anneal:
            return low, high
        # HiFA: one time step that falls with the square root of the progress
        top = self.cfg.max_step_percent
        top = top if isinstance(top, (int, float)) else top[1]
        now = top - (top - low) * (global_step / self.cfg.trainer_max_steps) ** 0.5
        return now, now

    def guided_noise(self, latents_noisy: Tensor, timesteps: Tensor, prompt_utils: Any,
                     batch: Mapping[str, Any]) -> Tensor:
        scale = self.cfg.guidance_scale
        if prompt_utils.use_perp_neg:
            tokens, neg_weights = prompt_utils.get_text_embeddings_perp_neg(
                *_cameras(batch, "elevation", "azimuth", "camera_distances"),
                self.cfg.view_dependent_prompting,
            )
            text, uncond, *negatives = self.predict_noise(latents_noisy, timesteps, tokens)
            noise_pred = sds.perp_neg_guidance(
                text, uncond, torch.stack(negatives), neg_weights, scale
            )
        else:
            tokens = self.text_embeddings(prompt_utils, batch)
            if scale == 0:
                tokens = tokens[: len(latents_noisy)]
            text, *rest = self.predict_noise(latents_noisy, timesteps, tokens)
            noise_pred = angle_guidance(text, rest[0], scale) if rest else text
        if self.cfg.guidance_rescale:
            return rescale_guidance(noise_pred, text, self.cfg.guidance_rescale)
        return noise_pred

    def latent_grad(self, noise_pred: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        """Eq. 10, or with ``use_sjc`` score Jacobian chaining.

        With x = z + sigma e, its -(D(x) - z) / sigma is e_hat - e, and -(D(x) - x) / sigma, without
        variance reduction, is e_hat.
        """
        if not self.cfg.use_sjc:
            return super().latent_grad(noise_pred, noise, weight)
        return sds.sds_grad(noise_pred, noise * float(self.cfg.var_red), torch.ones_like(weight))

    def image_loss(self, images: Tensor, x0_hat: Tensor, weight: Tensor) -> Tensor:
        """threestudio halves the square and sums over pixels where ours takes the mean."""
        return super().image_loss(images, x0_hat, weight) * (0.5 * images[0].numel())


def snap_bearing(bearing_deg: Tensor, snap: str, num_bins: int) -> Tensor:
    """Bearings [B] to the bin centres that the angle model knows; ``snap`` of SNAP_TO_BINS."""
    if snap == "none":
        return bearing_deg
    if snap == "dither":
        # uniform over one bin, then nearest: each neighbour with probability 1 - distance / width
        offset = torch.rand(bearing_deg.shape, device=bearing_deg.device) - 0.5
        bearing_deg = bearing_deg + offset * (360.0 / num_bins)
    bins = geo.bearing_bin(bearing_deg.detach().cpu().numpy(), num_bins)
    return torch.as_tensor(geo.bin_bearing_deg(bins, num_bins), device=bearing_deg.device)


def _cameras(batch: Mapping[str, Any], *keys: str) -> list[Tensor]:
    """These entries of a camera batch, or a ValueError naming the missing one."""
    for key in keys:
        if batch.get(key) is None:
            raise ValueError(f"The camera batch has no {key!r} (it has {sorted(batch)}): use "
                             "data_type random-camera-datamodule, or add it to your batch.")
    return [batch[key] for key in keys]


def _zero_non_finite(tensor: Tensor) -> tuple[Tensor, int]:
    """``tensor`` with zeros for NaN and infinity, and how many there were."""
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return tensor, 0
    return torch.where(finite, tensor, 0.0), int((~finite).sum())


def _vae_factor(vae: Any) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _check_size(size: tuple[int, int], model: DiffusionModel) -> tuple[int, int]:
    """(height, width) in pixels if VAE and UNet can halve it as often as they do."""
    factor = _vae_factor(model.vae) * 2 ** (len(model.unet.config.block_out_channels) - 1)
    if any(side % factor or side <= 0 for side in size):
        raise ValueError(f"guidance.resolution is {size[0]}x{size[1]} for {model.path}; each side "
                         f"must be a multiple of {factor} pixels.")
    return size


def _place(unet: Any, vae: Any, cfg: Any, device: torch.device) -> None:
    """Move the networks to ``device`` with the memory options of the config."""
    if cfg.enable_memory_efficient_attention:
        logger.info("enable_memory_efficient_attention: PyTorch's fused attention is always used.")
    if cfg.enable_attention_slicing:
        unet.set_attention_slice(1)
    if cfg.enable_channels_last_format:
        unet.to(memory_format=torch.channels_last)
    if cfg.enable_sequential_cpu_offload and device.type != "cpu":
        from accelerate import cpu_offload

        cpu_offload(unet, device)
        cpu_offload(vae, device)
        return
    unet.to(device)
    vae.to(device)


def _merge_tokens(unet: Any, params: Mapping[str, Any] | None) -> None:
    try:
        import tomesd  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(
            "guidance.token_merging is true, but the package tomesd is not installed: run "
            "`pip install tomesd`, or set it to false."
        ) from error
    tomesd.apply_patch(unet, **(params or {}))


GUIDANCES: dict[str, type[SDSGuidance]] = {
    "gps-sds-guidance": GPSGuidance,
    "stable-diffusion-guidance": StableDiffusionGuidance,
}
