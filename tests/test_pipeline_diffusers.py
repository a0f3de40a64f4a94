"""The rest of diffusers goes on working: schedulers, adapters, memory options, compilation."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from conftest import TOKEN_DIM
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from gps_guidance.pipeline import StableDiffusionGPSPipeline

CENTRE = (43.72, 10.40)


@pytest.fixture
def pipe(tiny_gps_model):
    pipe = StableDiffusionGPSPipeline.from_pretrained(tiny_gps_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_of(pipe, **kwargs):
    given = {"prompt": "front view", "gps": CENTRE, "num_inference_steps": 4, "output_type": "np",
             "generator": torch.Generator().manual_seed(0), **kwargs}
    return pipe(**given).images


def schedulers():
    config = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                           clip_sample=False, steps_offset=1).config
    pipe = StableDiffusionPipeline(None, None, None, None, DDIMScheduler.from_config(config), None,
                                   None, requires_safety_checker=False)
    return {kind.__name__: (kind, config) for kind in pipe.scheduler.compatibles}


SCHEDULERS = schedulers()


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_compatible_scheduler(pipe, name):
    kind, config = SCHEDULERS[name]
    own_noise = {"noise_sampler_seed": 0} if "SDE" in name else {}  # its noise has no generator
    pipe.scheduler = kind.from_config(config, **own_noise)
    first, again = image_of(pipe, eta=0.5), image_of(pipe, eta=0.5)
    assert np.isfinite(first).all() and np.array_equal(first, again)
    assert not np.array_equal(first, image_of(pipe, gps=(43.71, 10.39), eta=0.5))


def test_with_all_weights_at_text_it_is_stable_diffusion(tiny_gps_model, pipe):
    """Without a place, a zero token beside the text's is all that differs from diffusers' own."""
    theirs = StableDiffusionPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler, None, None,
        requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8)
    text, _ = pipe.encode_prompt("front view", "cpu", 1, False)
    tokens = torch.cat([text, torch.zeros(1, 2, TOKEN_DIM)], dim=1)
    expected = theirs(prompt_embeds=tokens, negative_prompt_embeds=torch.zeros_like(tokens),
                      latents=noise, num_inference_steps=4, guidance_scale=3.5,
                      output_type="np").images
    found = image_of(pipe, gps=None, latents=noise)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_checkpoints_that_predict_v(pipe):
    """Stable Diffusion 2: Eq. 4 composes v as it composes noise, the scheduler tells them apart."""
    noise = image_of(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config,
                                               prediction_type="v_prediction")
    assert np.isfinite(image_of(pipe)).all() and not np.allclose(image_of(pipe), noise)


def test_guidance_rescale(pipe):
    assert not np.allclose(image_of(pipe), image_of(pipe, guidance_rescale=0.7))


def test_clip_skip_and_attention_kwargs(pipe):
    assert not np.allclose(image_of(pipe), image_of(pipe, clip_skip=1))
    assert np.array_equal(image_of(pipe), image_of(pipe, cross_attention_kwargs={"scale": 1.0}))


def test_custom_timesteps_and_sigmas(pipe):
    from diffusers import EulerDiscreteScheduler

    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    by_time = image_of(pipe, timesteps=[900, 500, 100])
    pipe.scheduler.set_timesteps(timesteps=[900, 500, 100])
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert np.abs(image_of(pipe, sigmas=sigmas) - by_time).mean() < 0.01  # times are rounded


# --- memory -------------------------------------------------------------------------------------


def test_slicing_and_tiling_leave_the_image(pipe):
    expected = image_of(pipe, gps=[CENTRE, CENTRE])
    pipe.vae.enable_slicing()
    np.testing.assert_allclose(image_of(pipe, gps=[CENTRE, CENTRE]), expected, atol=1e-5)
    pipe.vae.disable_slicing()
    pipe.unet.set_attn_processor(AttnProcessor())
    np.testing.assert_allclose(image_of(pipe, gps=[CENTRE, CENTRE]), expected, atol=1e-4)
    pipe.enable_attention_slicing(1)
    np.testing.assert_allclose(image_of(pipe, gps=[CENTRE, CENTRE]), expected, atol=1e-4)
    pipe.disable_attention_slicing()
    pipe.vae.enable_tiling()
    tiled = image_of(pipe, width=64)
    assert tiled.shape == (1, 32, 64, 3) and np.isfinite(tiled).all()


def test_offloaded_weights(pipe):
    """As ``enable_sequential_cpu_offload`` does on a GPU: weights stay away until they are used."""
    expected = image_of(pipe)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.gps_encoder)
    for part in parts:
        cpu_offload(part, "cpu")
    assert pipe.gps_encoder.mlp.output.weight.is_meta
    np.testing.assert_allclose(image_of(pipe), expected, atol=1e-5)
    for part in parts:
        remove_hook_from_module(part, recurse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_on_a_gpu(pipe, method):
    expected = image_of(pipe)
    getattr(pipe, method)()
    np.testing.assert_allclose(image_of(pipe), expected, atol=1e-2)


def test_peak_rows_do_not_grow_with_the_area(pipe):
    """Memory is bounded by the rows of one call of the UNet."""
    from shapely.geometry import box

    rows = []
    pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for count in (16, 256):
        image_of(pipe, gps=None, area=box(10.39, 43.71, 10.41, 43.73), num_locations=count,
                 num_inference_steps=1)
    assert max(rows) == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, dtype):
    expected = image_of(pipe)
    pipe.to(dtype, silence_dtype_warnings=True)
    assert pipe.gps_encoder.dtype == dtype
    assert np.abs(image_of(pipe) - expected).mean() < 0.05


def test_the_unet_compiles_whole(pipe):
    expected = image_of(pipe)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    np.testing.assert_allclose(image_of(pipe), expected, atol=1e-4)


# --- adapters -----------------------------------------------------------------------------------


def test_textual_inversion(pipe, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path / "stone.safetensors"
    save_file({"<stone>": torch.randn(2, TOKEN_DIM)}, path)
    before = image_of(pipe, prompt="a <stone>")
    pipe.load_textual_inversion(str(path), token="<stone>")
    assert pipe.tokenizer.convert_tokens_to_ids("<stone>_1") > 0
    assert not np.allclose(image_of(pipe, prompt="a <stone>"), before)


def ip_adapter(unet, image_dim):
    """Random weights in the format of IP-Adapter files."""
    torch.manual_seed(0)
    cross, count = unet.config.cross_attention_dim, 4
    layers = {}
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for key, name in zip(range(1, 2 * len(names), 2), names, strict=True):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        layers |= {f"{key}.to_{part}_ip.weight": torch.randn(width, cross) for part in "kv"}
    proj = torch.nn.Linear(image_dim, cross * count)
    return {"ip_adapter": layers, "image_proj": {
        "proj.weight": proj.weight.data, "proj.bias": proj.bias.data,
        "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}}


def test_ip_adapter(pipe):
    from PIL import Image

    expected = image_of(pipe)
    pipe.unet._load_ip_adapter_weights(ip_adapter(pipe.unet, 8))
    pipe.set_ip_adapter_scale(0.0)
    embeds = [torch.cat([torch.zeros(1, 1, 8), torch.ones(1, 1, 8)])]
    np.testing.assert_allclose(image_of(pipe, ip_adapter_image_embeds=embeds), expected, atol=1e-5)
    pipe.set_ip_adapter_scale(5.0)
    with_embeds = image_of(pipe, ip_adapter_image_embeds=embeds)
    assert not np.allclose(with_embeds, expected)
    two = image_of(pipe, ip_adapter_image_embeds=embeds, gps=[CENTRE, (43.71, 10.39)])
    assert two.shape[0] == 2
    alone = image_of(pipe, ip_adapter_image_embeds=[torch.ones(1, 1, 8)], guidance_scale=1)
    assert np.isfinite(alone).all()
    vision = CLIPVisionConfig(hidden_size=8, projection_dim=8, num_hidden_layers=1,
                              num_attention_heads=2, image_size=32, patch_size=16,
                              intermediate_size=8)
    pipe.register_modules(image_encoder=CLIPVisionModelWithProjection(vision).eval(),
                          feature_extractor=CLIPImageProcessor(crop_size=32, size=32))
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    assert not np.allclose(*(image_of(pipe, ip_adapter_image=image) for image in (red, blue)))


def test_the_safety_checker_is_asked_and_optional(tiny_gps_model, pipe):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    config = CLIPConfig(
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 32, "patch_size": 16, "intermediate_size": 8},
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "intermediate_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    thresholds = checker.concept_embeds_weights.data  # of a cosine
    pipe.register_modules(safety_checker=checker,
                          feature_extractor=CLIPImageProcessor(crop_size=32, size=32))
    for threshold, harmful in ((2.0, False), (-2.0, True)):
        thresholds.fill_(threshold)
        checker.special_care_embeds_weights.data.fill_(2.0)
        out = pipe("front view", gps=CENTRE, num_inference_steps=1, output_type="np")
        assert out.nsfw_content_detected == [harmful]
        assert bool(out.images.any()) is not harmful
