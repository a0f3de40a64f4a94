"""``StableDiffusionGPSPipeline``: images from text and a place, an area or a bearing (Eq. 4, 7, 8).

A Stable Diffusion pipeline of diffusers with one more component, ``gps_encoder``. Everything that
does not concern the place is inherited; only the denoising loop is written again, because it
composes three kinds of predictions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    StableDiffusionPipeline,
    retrieve_timesteps,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import replace_example_docstring
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from gps_guidance.card import write_card
from gps_guidance.compose import Conditions, guided_noise
from gps_guidance.encoders import AngleEncoder
from gps_guidance.lora import GPSLoraLoaderMixin
from gps_guidance.models import bundled_model
from gps_guidance.parts import PARTS, components_beside
from gps_guidance.place import (
    Encoder,
    batch_size_of,
    check_numbers,
    encode_place,
    given_place,
    sample_locations,
    spare_seed,
)
from gps_guidance.texts import NullTextMixin

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from gps_guidance.pipeline import StableDiffusionGPSPipeline

        >>> pipe = StableDiffusionGPSPipeline.from_pretrained("miniature-pisa")
        >>> pipe.set_progress_bar_config(disable=True)

        >>> image = pipe(bearing_deg=90, num_inference_steps=10).images[0]
        >>> image.size
        (64, 64)
        ```
"""


@dataclass
class StableDiffusionGPSPipelineOutput(StableDiffusionPipelineOutput):
    """
    Output class for the GPS pipeline.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The generated images.
        nsfw_content_detected (`list[bool]`, *optional*):
            What the safety checker says of each image; `None` without one.
        locations (`np.ndarray`, *optional*):
            For an area, the points `(lat, lon)` in degrees over which noise was averaged, shape
            `(num_locations, 2)`.
    """

    locations: np.ndarray | None = None


class StableDiffusionGPSPipeline(GPSLoraLoaderMixin, NullTextMixin, StableDiffusionPipeline):
    r"""
    Pipeline for generating images from text and a place.

    This model inherits from [`StableDiffusionPipeline`]. Check the superclass documentation for
    the generic methods, and for loading textual inversions, LoRAs and IP-Adapters. LoRA files also
    carry the `gps_encoder`.

    Args:
        vae ([`AutoencoderKL`]):
            Variational auto-encoder between images and latents.
        text_encoder ([`~transformers.CLIPTextModel`]):
            Frozen text encoder.
        tokenizer ([`~transformers.CLIPTokenizer`]):
            Its tokenizer.
        unet ([`UNet2DConditionModel`]):
            Denoises latents, given the text tokens followed by those of the place.
        scheduler ([`SchedulerMixin`]):
            Any of `StableDiffusionPipeline.compatibles`.
        gps_encoder ([`~gps_guidance.encoders.GPSEncoder`] or [`~gps_guidance.encoders.AngleEncoder`]):
            Encodes positions in a city, or bearings around a landmark.
        safety_checker ([`StableDiffusionSafetyChecker`]):
            Finds images that may be harmful; can be `None`.
        feature_extractor ([`~transformers.CLIPImageProcessor`]):
            Prepares images for the `safety_checker` and for IP-Adapters; can be `None`.
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`], *optional*):
            Encodes the images of IP-Adapters.
    """  # noqa: E501

    text_encoder: Any  # components are attributes that diffusers sets
    unet: Any
    vae: Any
    scheduler: Any
    gps_encoder: Any
    image_processor: Any
    vae_scale_factor: int
    _guidance_scale: float
    _gps_guidance_scale: float

    model_cpu_offload_seq = "text_encoder->image_encoder->gps_encoder->unet->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "gps_embeds"]

    def __init__(
        self, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel, scheduler: KarrasDiffusionSchedulers, gps_encoder: Encoder,
        safety_checker: StableDiffusionSafetyChecker, feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ) -> None:  # from_pipe takes over what has these types
        super().__init__(
            vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor,
            image_encoder, requires_safety_checker,  # type: ignore[arg-type]  # it may be None
        )
        self.register_modules(gps_encoder=gps_encoder)
        if unet is None or gps_encoder is None:
            return
        tokens = gps_encoder.config.cross_attention_dim
        wanted = self.unet.config.cross_attention_dim
        if tokens != wanted:
            raise ValueError(f"The gps_encoder's tokens have {tokens} numbers, the UNet wants "
                             f"{wanted}: make it with cross_attention_dim={wanted}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        r"""
        Load a pipeline from a folder, the Hub, or by the name of a bundled model.

        A Stable Diffusion checkpoint has no `gps_encoder`: pass one. Weights are read from
        safetensors, in float32 unless `dtype` says otherwise. The rest is as in
        [`DiffusionPipeline.from_pretrained`].
        """
        source = pretrained_model_name_or_path
        if not os.path.isdir(source):
            source = bundled_model(source) or source
        options = {"use_safetensors": True, **kwargs}
        if "torch_dtype" not in kwargs:
            options.setdefault("dtype", torch.float32)
        if os.path.isdir(source):
            names = (*PARTS, "gps_encoder", *cls._optional_components)
            options |= components_beside(Path(source), super().from_pretrained, names, options)
        try:
            return super().from_pretrained(source, **options)
        except ValueError as error:
            if "gps_encoder" in kwargs or "gps_encoder" not in str(error):
                raise
            raise ValueError(
                f"{source} has no gps_encoder. Give one: gps_encoder=GPSEncoder(...) of "
                "gps_guidance.encoders to train, or a trained one by GPSEncoder.from_pretrained."
            ) from error

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As [`DiffusionPipeline.save_pretrained`], with a model card where there is none."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_card(save_directory, self.gps_encoder)

    def _upload_folder(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        write_card(working_dir, self.gps_encoder)  # diffusers has put an empty card there
        return super()._upload_folder(working_dir, *args, **kwargs)

    @property
    def gps_guidance_scale(self) -> float:
        """w_g of Eq. 4 of the present call."""
        return self._gps_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional prediction has a weight in Eq. 4."""
        return self._guidance_scale != 1 and self.unet.config.time_cond_proj_dim is None

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels at which the model was trained."""
        if isinstance(self.gps_encoder, AngleEncoder):
            return self.gps_encoder.size
        latent = self.unet.config.sample_size
        height, width = (latent, latent) if isinstance(latent, int) else latent
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        gps: Any = None,
        bearing_deg: Any = None,
        area: Any = None,
        streets: Any = None,
        num_locations: int = 64,
        location_batch_size: int = 16,
        locations_per_step: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        gps_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        gps_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StableDiffusionGPSPipelineOutput | tuple[Any, ...]:
        r"""
        The call function to the pipeline for generation.

        Noise predictions e are composed by Eq. 4 of the paper, where p is the prompt and g the
        place: `e(0,0) + w_p (e(p,0) - e(0,0)) + w_g (e(p,g) - e(p,0))`, with `guidance_scale` for
        w_p and `gps_guidance_scale` for w_g. For an area, e(p,g) is the mean over its locations
        (Eq. 8). Predictions whose weight is zero are not computed.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to show. A model of a landmark has its own prompt, taken where none is given;
                otherwise a place without a prompt gives images of the place alone.
            gps (`tuple[float, float]`, `list`, `np.ndarray` or `torch.Tensor`, *optional*):
                One `(lat, lon)` in degrees, or several, shape `(places, 2)`. One prompt goes with
                many places, many prompts with one place, or as many as there are places.
            bearing_deg (`float`, `list`, `np.ndarray` or `torch.Tensor`, *optional*):
                For a model of a landmark: the direction from which it is seen, in degrees clockwise
                from true north, one or several. The nearest bin that the model has learned is used.
            area (`dict`, `str`, `Path`, a shapely geometry or a list of `(lat, lon)`, *optional*):
                One image for a whole area: a GeoJSON polygon (in GeoJSON's order, `(lon, lat)`), a
                file that holds one, or the corners of a polygon. Points are spread evenly over it.
            streets (`dict`, `str`, `Path` or a graph of osmnx, *optional*):
                Spread the points along these streets (GeoJSON lines or GraphML) instead, within the
                `area` where there is one.
            num_locations (`int`, *optional*, defaults to 64):
                M of Eq. 8, the number of points of an area.
            location_batch_size (`int`, *optional*, defaults to 16):
                How many predictions of the batch go through the UNet at once. Bounds the memory, not
                the result.
            locations_per_step (`int`, *optional*):
                Average over a fresh random sample of that many points at each step, an unbiased
                estimate of Eq. 8. `None` takes all of them at every step.
            height (`int`, *optional*, defaults to that of the model):
                The height in pixels of the generated image.
            width (`int`, *optional*, defaults to that of the model):
                The width in pixels of the generated image.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of denoising steps.
            timesteps (`list[int]`, *optional*):
                Custom time steps, for schedulers that take them, in descending order.
            sigmas (`list[float]`, *optional*):
                Custom sigmas, for schedulers that take them.
            guidance_scale (`float`, *optional*, defaults to 3.5):
                w_p of Eq. 4, the weight of the text.
            gps_guidance_scale (`float`, *optional*):
                w_g of Eq. 4, the weight of the place. Defaults to 7.5, the paper's, for a model of a
                city. For a model of a landmark it defaults to `guidance_scale`: with both equal to
                1 + w, Eq. 4 is Eq. 7 with the weight w.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                The part of the steps that is guided; before and after it only e(p,g) is computed.
            negative_prompt (`str` or `list[str]`, *optional*):
                Text of the unconditional prediction, instead of the model's own "no text".
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                The number of images for each prompt or place.
            eta (`float`, *optional*, defaults to 0.0):
                η of the DDIM paper, for schedulers that have it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes generation deterministic: the initial noise, the points of an area, and the
                noise of schedulers that add some.
            latents (`torch.Tensor`, *optional*):
                Initial noise, shape `(images, channels, height / factor, width / factor)`.
            prompt_embeds (`torch.Tensor`, *optional*):
                Text tokens instead of a `prompt`, shape `(prompts, tokens, dim)`.
            negative_prompt_embeds (`torch.Tensor`, *optional*):
                Text tokens instead of a `negative_prompt`.
            gps_embeds (`torch.Tensor`, *optional*):
                Tokens of the `gps_encoder` instead of a place, shape `(places, tokens, dim)`.
            ip_adapter_image (`PipelineImageInput`, *optional*):
                Image for an IP-Adapter.
            ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*):
                Its embeddings, one tensor an adapter, the negative ones first where `guidance_scale`
                is not 1.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Return a [`StableDiffusionGPSPipelineOutput`] instead of a tuple.
            cross_attention_kwargs (`dict`, *optional*):
                Passed to the attention processors.
            guidance_rescale (`float`, *optional*, defaults to 0.0):
                How far the prediction is brought to the deviation of the conditional one, from
                [Common Diffusion Noise Schedules and Sample Steps are
                Flawed](https://huggingface.co/papers/2305.08891).
            clip_skip (`int`, *optional*):
                Number of the text encoder's last layers to skip.
            callback_on_step_end (`Callable`, `PipelineCallback`, `MultiPipelineCallbacks`, *optional*):
                Called after each step as `callback_on_step_end(pipeline, step, timestep,
                callback_kwargs)`; it may return other values of the tensors.
            callback_on_step_end_tensor_inputs (`list`, *optional*):
                The tensors in `callback_kwargs`, of `._callback_tensor_inputs`.

        Examples:

        Returns:
            [`StableDiffusionGPSPipelineOutput`] or `tuple`:
                With `return_dict`, the output class, otherwise the tuple `(images,
                nsfw_content_detected, locations)`.
        """  # noqa: E501
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if height is None or width is None:
            height, width = (given or own for given, own in
                             zip((height, width), self.default_size, strict=True))
        landmark = isinstance(self.gps_encoder, AngleEncoder)
        somewhere = any(x is not None for x in (gps, bearing_deg, area, streets, gps_embeds))
        if landmark and prompt is None and prompt_embeds is None and bearing_deg is not None:
            prompt = self.gps_encoder.prompt
        without_text = somewhere and prompt is None and prompt_embeds is None
        textless = without_text and negative_prompt is None and negative_prompt_embeds is None

        # 1. Check inputs
        self.check_inputs(
            "" if without_text else prompt, height, width, None, negative_prompt, prompt_embeds,
            negative_prompt_embeds, ip_adapter_image, ip_adapter_image_embeds,
            callback_on_step_end_tensor_inputs,
        )
        check_numbers(guidance_interval, location_batch_size, locations_per_step)

        self._guidance_scale = guidance_scale
        if gps_guidance_scale is None:
            gps_guidance_scale = guidance_scale if landmark else 7.5
        self._gps_guidance_scale = gps_guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 2. Encode the place and the texts
        rng = np.random.default_rng(spare_seed(generator))
        place = encode_place(self.gps_encoder, gps, bearing_deg, area, streets, num_locations, rng)
        if gps_embeds is not None:
            place = given_place(place, gps_embeds, self.gps_encoder)
        batch_size = batch_size_of(prompt, prompt_embeds, place)
        lora_scale = (cross_attention_kwargs or {}).get("scale")
        prompt_embeds, negative_prompt_embeds = self.encode_texts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, batch_size,
            num_images_per_prompt, clip_skip, lora_scale,
        )
        gps_embeds = None
        if place is not None:
            gps_embeds = place.embeds.to(device, prompt_embeds.dtype)
            if len(gps_embeds) > 1:
                gps_embeds = gps_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        num_images = batch_size * num_images_per_prompt
        images = self._adapter_images(ip_adapter_image, ip_adapter_image_embeds, num_images)

        # 3. Prepare time steps, initial noise and the scheduler's arguments
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )
        latents = self.prepare_latents(
            num_images, self.unet.config.in_channels, height, width, prompt_embeds.dtype, device,
            generator, latents,
        )
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        timestep_cond = self._guidance_embedding(num_images, latents)

        # 4. Denoise
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                places = gps_embeds
                if places is not None and locations_per_step is not None:
                    places = places[:, sample_locations(places.shape[1], locations_per_step, rng)]
                scales = self._scales(i / len(timesteps), guidance_interval, places is not None,
                                      textless)
                noise_pred = guided_noise(
                    self.unet, self.scheduler.scale_model_input(latents, t), t,
                    Conditions(prompt_embeds, negative_prompt_embeds, places, *images), scales,
                    self.gps_encoder.num_tokens, location_batch_size, self.guidance_rescale,
                    timestep_cond=timestep_cond, cross_attention_kwargs=cross_attention_kwargs,
                )
                latents = self.scheduler.step(
                    noise_pred, t, latents, **extra_step_kwargs, return_dict=False
                )[0]

                if callback_on_step_end is not None:
                    tensors: dict[str, Any] = {
                        "latents": latents, "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds, "gps_embeds": gps_embeds,
                    }
                    chosen = {k: tensors[k] for k in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, chosen)
                    latents, gps_embeds = tensors["latents"], tensors["gps_embeds"]
                    prompt_embeds = tensors["prompt_embeds"]
                    negative_prompt_embeds = tensors["negative_prompt_embeds"]
                last_of_step = (i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                if i == len(timesteps) - 1 or last_of_step:
                    progress_bar.update()

        # 5. Decode
        if output_type == "latent":
            image, has_nsfw_concept = latents, None
        else:
            scaled = latents / self.vae.config.scaling_factor
            image = self.vae.decode(scaled, return_dict=False, generator=generator)[0]
            image, has_nsfw_concept = self.run_safety_checker(image, device, prompt_embeds.dtype)
        unharmful = [not nsfw for nsfw in has_nsfw_concept or [False] * num_images]
        image = self.image_processor.postprocess(
            image, output_type=output_type, do_denormalize=unharmful
        )
        self.maybe_free_model_hooks()
        locations = None if place is None else place.locations
        if not return_dict:
            return (image, has_nsfw_concept, locations)
        return StableDiffusionGPSPipelineOutput(image, has_nsfw_concept, locations)

    def _scales(self, progress: float, interval: tuple[float, float], somewhere: bool,
                textless: bool) -> tuple[float, float]:
        """(w_p, w_g) at a part in [0, 1) of the steps.

        Without a place e(p,g) has no weight; without text e(p,0) is e(0,0), and one of them is
        enough; a UNet that embeds the guidance scale needs no e(0,0).
        """
        guided = interval[0] <= progress < interval[1]
        text = self._guidance_scale if guided and not textless else 1.0
        if self.unet.config.time_cond_proj_dim is not None:
            text = 1.0
        place = self._gps_guidance_scale if guided else 1.0
        return text, place if somewhere else 0.0

    def _guidance_embedding(self, num_images: int, latents: Tensor) -> Tensor | None:
        """The embedding of the guidance scale, for UNets that were distilled to take it."""
        if self.unet.config.time_cond_proj_dim is None:
            return None
        scale = torch.tensor(self.guidance_scale - 1).repeat(num_images)
        embedding = self.get_guidance_scale_embedding(scale, self.unet.config.time_cond_proj_dim)
        return embedding.to(latents.device, latents.dtype)

    def _adapter_images(self, image: Any, embeds: list[Tensor] | None, num_images: int
                        ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """An IP-Adapter's embeddings for conditional and for unconditional branches."""
        if image is None and embeds is None:
            return (), ()
        both = self.prepare_ip_adapter_image_embeds(
            image, embeds, self._execution_device, num_images, self.do_classifier_free_guidance
        )
        if not self.do_classifier_free_guidance:
            return both, [torch.zeros_like(one) for one in both]
        negative, positive = zip(*(one.chunk(2) for one in both), strict=True)
        return positive, negative
