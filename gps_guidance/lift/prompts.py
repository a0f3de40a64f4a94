"""Prompts of a 3D run: embedded once, in this process, and looked up by camera.

The keys and their meaning are threestudio's. Embeddings are never cached on disk, so that a model
retrained in place cannot meet stale ones.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from gps_guidance.encoders import AngleEncoder
from gps_guidance.lora import merge_lora
from gps_guidance.models import DiffusionModel, angle_config, load_angle_encoder, resolve_model
from gps_guidance.parts import part_folder

logger = logging.getLogger(__name__)

VIEWS = ("side", "front", "back", "overhead")
SIDE, FRONT, BACK, OVERHEAD = range(4)
Decay = tuple[float, float, float]


@dataclass
class PromptProcessorConfig:
    """threestudio's keys and defaults.

    ``use_cache`` and ``spawn`` are accepted and have no effect: the prompts are embedded in this
    process at every start, in well under a second.
    """

    prompt: str | None = "a hamburger"
    prompt_front: str | None = None
    prompt_side: str | None = None
    prompt_back: str | None = None
    prompt_overhead: str | None = None
    negative_prompt: str = ""
    pretrained_model_name_or_path: str = "runwayml/stable-diffusion-v1-5"
    overhead_threshold: float = 60.0
    front_threshold: float = 45.0
    back_threshold: float = 45.0
    view_dependent_prompt_front: bool = False
    use_cache: bool = True
    spawn: bool = True
    use_perp_neg: bool = False
    perp_neg_f_sb: Decay = (1.0, 0.5, -0.606)
    perp_neg_f_fsb: Decay = (1.0, 0.5, 0.967)
    perp_neg_f_fs: Decay = (4.0, 0.5, -2.426)
    perp_neg_f_sf: Decay = (4.0, 0.5, -2.426)
    use_prompt_debiasing: bool = False
    pretrained_model_name_or_path_prompt_debiasing: str = "bert-base-uncased"
    prompt_debiasing_mask_ids: list[int] | None = None


@dataclass
class GPSPromptProcessorConfig(PromptProcessorConfig):
    """As threestudio's, but ``prompt: null`` means the prompt the angle model was trained on.

    ``lora_weights`` is the guidance's.
    """

    prompt: str | None = None
    pretrained_model_name_or_path: str = "miniature-pisa"
    lora_weights: str | None = None


def wrap_azimuth_deg(azimuth: Tensor) -> Tensor:
    """Any azimuth in degrees to [-180, 180)."""
    return (azimuth + 180) % 360 - 180


def view_index(cfg: PromptProcessorConfig, elevation: Tensor, azimuth: Tensor) -> Tensor:
    """Index into VIEWS [B] of cameras at ``elevation`` and ``azimuth`` [B], in degrees.

    Front is around azimuth 0; overhead wins over the others.
    """
    turn = wrap_azimuth_deg(azimuth).abs()
    index = torch.full_like(azimuth, SIDE, dtype=torch.long)
    index[turn < cfg.front_threshold] = FRONT
    index[turn > 180 - cfg.back_threshold] = BACK
    index[elevation > cfg.overhead_threshold] = OVERHEAD
    return index


def view_prompts(cfg: PromptProcessorConfig, prompt: str) -> list[str]:
    """The prompt of each of VIEWS: ``prompt_<view>`` where given, else the prompt and the view."""
    prompts = []
    for view in VIEWS:
        if cfg.view_dependent_prompt_front:
            text = f"{'backside' if view == 'back' else view} view of {prompt}"
        else:
            text = f"{prompt}, {view} view"
        prompts.append(getattr(cfg, f"prompt_{view}") or text)
    return prompts


def perp_neg_weight(decay: Decay, r: Tensor) -> Tensor:
    """-(a exp(-b r) + c), the weight of a negative prompt at interpolation ``r``."""
    a, b, c = decay
    return -(a * torch.exp(-b * r) + c)


@dataclass
class PromptUtils:
    """Embedded prompts: what a guidance asks for the text tokens of a batch of cameras.

    ``text_embeddings`` and ``uncond_text_embeddings`` are [1, L, D]; ``text_embeddings_vd``
    [4, L, D] follows VIEWS. Elevation and azimuth are [B] in degrees.
    """

    cfg: PromptProcessorConfig
    prompt: str
    prompts_vd: list[str]
    text_embeddings: Tensor
    uncond_text_embeddings: Tensor
    text_embeddings_vd: Tensor

    @property
    def use_perp_neg(self) -> bool:
        return self.cfg.use_perp_neg

    def get_text_embeddings(self, elevation: Tensor, azimuth: Tensor, camera_distances: Tensor,
                            view_dependent_prompting: bool = True) -> Tensor:
        """[2B, L, D] in the order (cond, uncond), threestudio's and the reverse of diffusers'."""
        batch_size = len(elevation)
        if view_dependent_prompting:
            text = self.text_embeddings_vd[view_index(self.cfg, elevation, azimuth)]
        else:
            text = self.text_embeddings.expand(batch_size, -1, -1)
        return torch.cat([text, self.uncond_text_embeddings.expand(batch_size, -1, -1)])

    def get_text_embeddings_perp_neg(
        self, elevation: Tensor, azimuth: Tensor, camera_distances: Tensor,
        view_dependent_prompting: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Perp-Neg: ([4B, L, D] in the order cond, uncond, negative 1, negative 2; weights [B, 2]).

        Between two views the positive prompt is interpolated, and both neighbours are negatives
        whose weight fades where the camera reaches them.
        """
        if not view_dependent_prompting:
            raise ValueError("use_perp_neg needs guidance.view_dependent_prompting: true.")
        cfg = self.cfg
        side, front, back, overhead = self.text_embeddings_vd
        turn = wrap_azimuth_deg(azimuth).abs() / 90
        in_front = turn < 1
        r = torch.where(in_front, 1 - turn, 2 - turn)
        rows, pick = r.view(-1, 1, 1), in_front.view(-1, 1, 1)
        text = torch.where(pick, rows * front + (1 - rows) * side, rows * side + (1 - rows) * back)
        first = torch.where(pick, front, side)
        second = torch.where(pick, side, front)
        w_front = [perp_neg_weight(cfg.perp_neg_f_fs, r), perp_neg_weight(cfg.perp_neg_f_sf, 1 - r)]
        w_back = [perp_neg_weight(cfg.perp_neg_f_sb, r), perp_neg_weight(cfg.perp_neg_f_fsb, r)]
        weights = torch.where(in_front[:, None], torch.stack(w_front, 1), torch.stack(w_back, 1))

        above = view_index(cfg, elevation, azimuth) == OVERHEAD
        text = torch.where(above.view(-1, 1, 1), overhead, text)
        weights = torch.where(above[:, None], 0.0, weights)
        uncond = self.uncond_text_embeddings.expand(len(elevation), -1, -1)
        return torch.cat([text, uncond, first, second]), weights


class PromptProcessor:
    """``stable-diffusion-prompt-processor``: embeds the prompts of a config; call it for them."""

    Config: type[PromptProcessorConfig] = PromptProcessorConfig

    def __init__(self, cfg: PromptProcessorConfig, device: str | torch.device = "cpu") -> None:
        if cfg.use_prompt_debiasing:
            raise ValueError(
                "prompt_processor.use_prompt_debiasing is true, which is not supported: set it to "
                "false and write prompt_front, prompt_side, prompt_back and prompt_overhead."
            )
        self.cfg = cfg
        model = _load_text_model(cfg.pretrained_model_name_or_path,
                                 getattr(cfg, "lora_weights", None), device)
        self.prompt = self._prompt(model)
        self.prompts_vd = view_prompts(cfg, self.prompt)
        logger.info("Prompt: %r; by view: %s", self.prompt, self.prompts_vd)
        with torch.no_grad():
            text = model.encode_text([self.prompt, *self.prompts_vd]).float()
            uncond = self._uncond_embeddings(model).float()
        self.utils = PromptUtils(cfg, self.prompt, self.prompts_vd, text[:1], uncond, text[1:])

    def _prompt(self, model: DiffusionModel) -> str:
        prompt = self.cfg.prompt
        if not prompt:
            raise ValueError("prompt_processor.prompt is empty; write what the image shows.")
        if prompt.startswith("lib:"):
            raise ValueError(
                f"prompt_processor.prompt is {prompt!r}; there is no prompt library: write it out."
            )
        return prompt

    def _uncond_embeddings(self, model: DiffusionModel) -> Tensor:
        return model.encode_text([self.cfg.negative_prompt])

    def __call__(self) -> PromptUtils:
        return self.utils


class GPSPromptProcessor(PromptProcessor):
    """``gps-prompt-processor``: the angle model's own prompt, and its own meaning of "no text"."""

    Config = GPSPromptProcessorConfig

    def __init__(self, cfg: GPSPromptProcessorConfig, device: str | torch.device = "cpu") -> None:
        if cfg.negative_prompt:
            raise ValueError(
                f"prompt_processor.negative_prompt is {cfg.negative_prompt!r}, but Eq. 7 has none: "
                "its unconditional branch is fixed by the model. Leave the key empty."
            )
        super().__init__(cfg, device)

    def _prompt(self, model: DiffusionModel) -> str:
        if not isinstance(model.gps_encoder, AngleEncoder):
            raise ValueError(
                f"prompt_processor.pretrained_model_name_or_path is {model.path!r}, which is not "
                "an angle model; use stable-diffusion-prompt-processor for a text model."
            )
        if self.cfg.prompt is None:
            return model.angle.prompt
        if self.cfg.prompt != model.angle.prompt:
            logger.warning("The angle model was trained on the prompt %r.", model.angle.prompt)
        return super()._prompt(model)

    def _uncond_embeddings(self, model: DiffusionModel) -> Tensor:
        return model.null_text(1)


def _load_text_model(name_or_path: str, lora_weights: str | None, device: str | torch.device
                     ) -> DiffusionModel:
    """Only the text half of a model folder, frozen: a UNet is not read to embed a prompt."""
    folder = resolve_model(name_or_path)
    folders = {part: part_folder(folder, part) for part in ("text_encoder", "tokenizer")}
    for part, there in folders.items():
        if not there.is_dir():
            raise ValueError(f"{folder} is not a complete model folder: {part} is missing.")
    text_encoder: Any = CLIPTextModel.from_pretrained(
        folders["text_encoder"], use_safetensors=True, dtype=torch.float32
    )
    if lora_weights is not None:
        merge_lora({"text_encoder": text_encoder}, lora_weights)
    is_angle = angle_config(folder, lora_weights) is not None
    return DiffusionModel(
        unet=None,
        vae=None,
        text_encoder=text_encoder.to(device).requires_grad_(False).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folders["tokenizer"]),
        scheduler=None,
        gps_encoder=load_angle_encoder(folder, lora_weights) if is_angle else None,
        path=str(name_or_path),
    )


PROMPT_PROCESSORS: dict[str, type[PromptProcessor]] = {
    "stable-diffusion-prompt-processor": PromptProcessor,
    "gps-prompt-processor": GPSPromptProcessor,
}
