"""Both guidances on tiny models of the real classes: exact laws, no mocks."""

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from gps_guidance.lift.guidance import (
    GUIDANCES,
    GPSGuidance,
    GPSGuidanceConfig,
    StableDiffusionGuidance,
    StableDiffusionGuidanceConfig,
    snap_bearing,
)
from gps_guidance.lift.prompts import (
    GPSPromptProcessor,
    GPSPromptProcessorConfig,
    PromptProcessor,
    PromptProcessorConfig,
)
from gps_guidance.models import load_angle_model


def cameras(*azimuths):
    """A batch of cameras at these azimuths (degrees counter-clockwise from east), elevation 0."""
    azimuth = torch.tensor(azimuths)
    c2w = torch.eye(4).repeat(len(azimuths), 1, 1)
    c2w[:, 0, 3] = 2.5 * torch.cos(torch.deg2rad(azimuth))
    c2w[:, 1, 3] = 2.5 * torch.sin(torch.deg2rad(azimuth))
    return {
        "c2w": c2w,
        "azimuth": azimuth,
        "elevation": torch.zeros(len(azimuths)),
        "camera_distances": torch.full((len(azimuths),), 2.5),
    }


def renders(batch_size, side=32):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(batch_size, side, side, 3, generator=generator).requires_grad_(True)


@pytest.fixture(scope="module")
def gps_prompt(tiny_angle_model):
    cfg = GPSPromptProcessorConfig(pretrained_model_name_or_path=str(tiny_angle_model))
    return GPSPromptProcessor(cfg)()


@pytest.fixture(scope="module")
def sd_prompt(tiny_sd_model):
    cfg = PromptProcessorConfig(
        prompt="A photo of Pisa", pretrained_model_name_or_path=str(tiny_sd_model)
    )
    return PromptProcessor(cfg)()


@pytest.fixture
def gps(tiny_angle_model):
    def make(**values):
        values = {"guidance_scale": 3.0, **values}
        return GPSGuidance(GPSGuidanceConfig(str(tiny_angle_model), **values))

    return make


@pytest.fixture
def sd(tiny_sd_model):
    def make(**values):
        values = {"guidance_scale": 3.0, "half_precision_weights": False, **values}
        return StableDiffusionGuidance(StableDiffusionGuidanceConfig(str(tiny_sd_model), **values))

    return make


def step(guidance, prompt, rgb, batch, seed=0, **kwargs):
    torch.manual_seed(seed)
    out = guidance(rgb, prompt, **batch, **kwargs)
    terms = [out[k] for k in out if k.startswith("loss_")]
    (grad,) = torch.autograd.grad(sum(terms), rgb)
    return out, grad


@pytest.mark.parametrize("kind", ["gps", "sd"])
def test_one_step_reaches_the_pixels_and_nothing_else(kind, request):
    guidance = request.getfixturevalue(kind)()
    prompt = request.getfixturevalue(f"{kind}_prompt")
    inputs = []
    hook = guidance.unet.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    out, grad = step(guidance, prompt, renders(3), cameras(0.0, 100.0, 260.0))
    hook.remove()
    assert grad.shape == (3, 32, 32, 3) and torch.isfinite(grad).all() and grad.abs().sum() > 0
    assert out["nan_grads"] == 0 and (out["min_step"], out["max_step"]) == (20, 980)
    assert "loss_sds_img" not in out
    assert all(isinstance(v, (int, float)) or v.ndim == 0 for v in out.values())
    # one call with both branches stacked, outside the graph
    assert [tuple(x.shape) for x in inputs] == [(6, 4, 8, 8)] and not inputs[0].requires_grad
    modules = [guidance.unet, guidance.vae]
    assert not any(p.requires_grad for m in modules for p in m.parameters())


def test_gradient_is_eq_10_with_eq_7(gps, gps_prompt, tiny_angle_model):
    """The latents' gradient, recomputed from the paper's formulas with the model's own parts."""
    guidance = gps(sample_posterior=False)
    batch, rgb = cameras(37.0, 200.0), renders(2)
    latents = guidance.encode(guidance.resize(rgb)).detach().requires_grad_(True)
    torch.manual_seed(5)
    guidance_rgb = latents.permute(0, 2, 3, 1)
    out = guidance(guidance_rgb, gps_prompt, **batch, rgb_as_latents=True)
    (got,) = torch.autograd.grad(out["loss_sds"], latents)

    model = load_angle_model(tiny_angle_model)
    torch.manual_seed(5)
    t = torch.randint(20, 981, (2,))
    noise = torch.randn_like(latents)
    bearing = torch.tensor([50.0, 250.0])  # 90 - azimuth, nearest multiple of 10
    with torch.no_grad():
        alpha_bar = model.scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        text = model.encode_text([model.angle.prompt]).expand(2, -1, -1)
        tokens = torch.cat([text, model.angle(bearing)], dim=1)
        cond = model.unet(noisy, t, tokens).sample
        uncond = model.unet(noisy, t, torch.zeros_like(tokens)).sample
        grad = (1 - alpha_bar) * ((1 + 3.0) * cond - 3.0 * uncond - noise)
    torch.testing.assert_close(got, grad / 2, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(out["grad_norm"], grad.norm(), atol=1e-5, rtol=1e-4)


def test_scale_zero_computes_one_branch_and_is_exact(gps, gps_prompt):
    batch, rgb = cameras(10.0, 20.0), renders(2)
    rows = []
    guidance = gps(guidance_scale=0.0)
    guidance.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    _, exact = step(guidance, gps_prompt, rgb, batch)
    _, nearly = step(gps(guidance_scale=1e-12), gps_prompt, rgb, batch)
    assert rows == [2]
    torch.testing.assert_close(exact, nearly, atol=1e-7, rtol=1e-4)


def test_bearing_steers_and_angle_dropout_removes_it(gps, gps_prompt):
    rgb = renders(1)
    _, east = step(gps(), gps_prompt, rgb, cameras(0.0))
    _, west = step(gps(), gps_prompt, rgb, cameras(180.0))
    _, full_turn = step(gps(), gps_prompt, rgb, cameras(360.0))
    assert (east - west).abs().max() > 1e-6 and torch.equal(east, full_turn)
    off = gps(angle_dropout=1.0)
    _, east = step(off, gps_prompt, rgb, cameras(0.0))
    _, west = step(off, gps_prompt, rgb, cameras(180.0))
    assert torch.equal(east, west)


def test_angle_dropout_drops_that_part_of_the_tokens(gps):
    torch.manual_seed(0)
    tokens = gps(angle_dropout=0.25).angle_tokens(cameras(*[30.0] * 400)["c2w"])
    dropped = (tokens == 0).all(dim=(1, 2)).float().mean().item()
    assert 0.17 < dropped < 0.33


def test_north_offset_turns_the_bearing(gps, gps_prompt):
    rgb = renders(1)
    _, turned = step(gps(north_offset_deg=30.0), gps_prompt, rgb, cameras(50.0))
    _, plain = step(gps(), gps_prompt, rgb, cameras(20.0))
    assert torch.equal(turned, plain)


def test_snap_bearing():
    bearings = torch.tensor([4.0, 6.0, 355.5, 181.0], dtype=torch.float64)
    assert snap_bearing(bearings, "none", 36) is bearings
    assert snap_bearing(bearings, "nearest", 36).tolist() == [0.0, 10.0, 0.0, 180.0]
    torch.manual_seed(0)
    drawn = snap_bearing(torch.full((4000,), 13.0, dtype=torch.float64), "dither", 36)
    assert sorted(set(drawn.tolist())) == [10.0, 20.0]
    assert drawn.mean().item() == pytest.approx(13.0, abs=0.3)


def test_no_text_and_no_angle_are_zero_tokens(gps):
    guidance = gps()
    assert guidance.null_tokens.shape == (1, 17, 16) and not guidance.null_tokens.any()


@pytest.mark.parametrize("side", [16, 32, 80])
def test_any_render_size_is_encoded_at_the_models_own(gps, gps_prompt, side):
    guidance, seen = gps(), []
    guidance.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    _, grad = step(guidance, gps_prompt, renders(1, side), cameras(0.0))
    assert seen == [(32, 32)] and grad.shape == (1, side, side, 3)


def test_resolution_can_be_set(gps, gps_prompt):
    guidance = gps(resolution=16)
    assert guidance.resize(renders(1)).shape == (1, 3, 16, 16)
    step(guidance, gps_prompt, renders(1), cameras(0.0))
    with pytest.raises(ValueError, match="multiple of 8"):
        gps(resolution=20)


def test_stretched_renders_are_refused(gps, gps_prompt):
    with pytest.raises(ValueError, match="32x64 .*data.height"):
        gps()(torch.rand(1, 32, 64, 3), gps_prompt, **cameras(0.0))
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
        gps()(torch.rand(1, 3, 32, 32), gps_prompt, **cameras(0.0))


def test_the_schedule_of_the_paper(gps):
    guidance = gps(min_step_percent=[0, 0.98, 0.02, 8000], max_step_percent=[0, 0.98, 0.50, 8000])
    seen = []
    for global_step in (0, 2000, 8000, 10000):
        guidance.update_step(0, global_step)
        seen.append((guidance.min_step, guidance.max_step))
    assert seen == [(980, 980), (740, 860), (20, 500), (20, 500)]


def test_grad_clip_follows_its_schedule(gps, gps_prompt):
    guidance, batch, rgb = gps(grad_clip=[0, 0.02, 0.002, 100]), cameras(0.0), renders(1)
    clipped = step(guidance, gps_prompt, rgb, batch)[0]["grad_norm"]
    assert 0 < clipped <= 0.02 * math.sqrt(4 * 8 * 8) * 1.001
    guidance.update_step(0, 100)
    tighter = step(guidance, gps_prompt, rgb, batch)[0]["grad_norm"]
    assert tighter <= 0.002 * math.sqrt(4 * 8 * 8) * 1.001


def test_non_finite_predictions_are_zeroed_and_counted(gps, gps_prompt):
    def spoil(_, __, output):
        output.sample[0, 0, 0, 0] = math.nan
        output.sample[0, 0, 0, 1] = math.inf

    guidance = gps(use_img_loss=True)
    guidance.unet.register_forward_hook(spoil)
    out, grad = step(guidance, gps_prompt, renders(1), cameras(0.0))
    assert out["nan_grads"] == 2
    assert torch.isfinite(grad).all() and torch.isfinite(out["grad_norm"])


def test_image_term_is_the_mean_of_hifa(gps, gps_prompt):
    batch, rgb = cameras(0.0, 90.0), renders(2)
    guidance = gps(use_img_loss=True, sample_posterior=False, guidance_scale=0.0)
    out, _ = step(guidance, gps_prompt, rgb, batch)
    torch.manual_seed(0)
    with torch.no_grad():
        images = rgb.permute(0, 3, 1, 2)
        latents = guidance.encode(images)
        t = torch.randint(20, 981, (2,))
        noise = torch.randn_like(latents)
        ab = guidance.alphas_cumprod[t].view(2, 1, 1, 1)
        noisy = ab.sqrt() * latents + (1 - ab).sqrt() * noise
        e_hat = guidance.guided_noise(noisy, t, gps_prompt, batch)
        x0_hat = (noisy - (1 - ab).sqrt() * e_hat) / ab.sqrt()
        decoded = guidance.vae.decode(x0_hat / 0.5).sample
        decoded = (decoded / 2 + 0.5).clamp(0, 1)
        expected = ((ab * (1 - ab)).sqrt() * (images - decoded).square()).mean()
    torch.testing.assert_close(out["loss_sds_img"], expected, atol=1e-6, rtol=1e-4)


def test_image_term_of_stable_diffusion_sums_over_pixels(sd, sd_prompt):
    """threestudio: the gradient at a pixel is sqrt(ab (1 - ab)) (image - decoded) / B."""
    rgb, batch = renders(1), cameras(0.0)
    guidance = sd(use_img_loss=True, sample_posterior=False, min_step_percent=0.5,
                  max_step_percent=0.5)
    torch.manual_seed(0)
    out = guidance(rgb, sd_prompt, **batch)
    (grad,) = torch.autograd.grad(out["loss_sds_img"], rgb)
    ab = guidance.alphas_cumprod[500]
    limit = (ab * (1 - ab)).sqrt().item()
    assert 0 < grad.abs().max() <= limit
    guidance.grad_clip_val = limit / 10
    torch.manual_seed(0)
    out = guidance(rgb, sd_prompt, **batch)
    (clipped,) = torch.autograd.grad(out["loss_sds_img"], rgb)
    torch.testing.assert_close(clipped, grad.clamp(-limit / 10, limit / 10), atol=1e-7, rtol=1e-4)


def test_images_are_decoded_only_for_the_image_term(gps, gps_prompt):
    calls = []
    for use_img_loss in (False, True):
        guidance = gps(use_img_loss=use_img_loss)
        guidance.vae.decoder.register_forward_pre_hook(
            lambda *_: calls.append(torch.is_grad_enabled())
        )
        out, _ = step(guidance, gps_prompt, renders(1), cameras(0.0))
        assert ("loss_sds_img" in out) == use_img_loss
    assert calls == [False]


def test_same_seed_same_step(gps, gps_prompt):
    guidance, rgb, batch = gps(), renders(2), cameras(0.0, 40.0)
    first, second = (step(guidance, gps_prompt, rgb, batch, seed=9)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_half_precision_on_the_cpu_is_bfloat16(gps, gps_prompt):
    guidance = gps(half_precision_weights=True)
    assert guidance.unet.dtype == guidance.vae.dtype == torch.bfloat16
    out, grad = step(guidance, gps_prompt, renders(1), cameras(0.0))
    assert out["loss_sds"].dtype == grad.dtype == torch.float32
    _, full = step(gps(), gps_prompt, renders(1), cameras(0.0))
    assert torch.cosine_similarity(grad.flatten(), full.flatten(), dim=0) > 0.98


def test_a_half_precision_trainer_does_not_change_the_step(gps, gps_prompt):
    guidance, rgb = gps(), renders(1)
    _, plain = step(guidance, gps_prompt, rgb, cameras(0.0))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = guidance(rgb, gps_prompt, **cameras(0.0))
    (mixed,) = torch.autograd.grad(out["loss_sds"], rgb)
    assert torch.equal(plain, mixed)


def test_memory_options_do_not_change_the_step(sd, sd_prompt):
    _, plain = step(sd(), sd_prompt, renders(1), cameras(0.0))
    names = ("memory_efficient_attention", "sequential_cpu_offload", "attention_slicing",
             "channels_last_format")
    options = {f"enable_{name}": True for name in names}
    _, tuned = step(sd(**options), sd_prompt, renders(1), cameras(0.0))
    torch.testing.assert_close(tuned, plain, atol=1e-6, rtol=1e-3)


def test_stable_diffusion_has_all_keys_of_threestudio():
    keys = {
        "pretrained_model_name_or_path", "enable_memory_efficient_attention",
        "enable_sequential_cpu_offload", "enable_attention_slicing", "enable_channels_last_format",
        "guidance_scale", "grad_clip", "half_precision_weights", "min_step_percent",
        "max_step_percent", "sqrt_anneal", "trainer_max_steps", "use_img_loss", "use_sjc",
        "var_red", "weighting_strategy", "token_merging", "token_merging_params",
        "view_dependent_prompting", "max_items_eval",
    }
    assert keys <= {f.name for f in fields(StableDiffusionGuidanceConfig)}
    defaults = StableDiffusionGuidanceConfig()
    assert (defaults.guidance_scale, defaults.half_precision_weights) == (100.0, True)
    assert {name: cls.Config for name, cls in GUIDANCES.items()} == {
        "gps-sds-guidance": GPSGuidanceConfig,
        "stable-diffusion-guidance": StableDiffusionGuidanceConfig,
    }


def test_sjc_is_uniform_sds_and_without_reduction_the_plain_prediction(sd, sd_prompt):
    rgb, batch = renders(2), cameras(0.0, 90.0)
    _, sjc = step(sd(use_sjc=True), sd_prompt, rgb, batch)
    _, uniform = step(sd(weighting_strategy="uniform"), sd_prompt, rgb, batch)
    assert torch.equal(sjc, uniform)
    _, plain = step(sd(use_sjc=True, var_red=False), sd_prompt, rgb, batch)
    assert (plain - sjc).abs().max() > 1e-6


def test_sqrt_anneal_draws_one_falling_step(sd):
    guidance = sd(sqrt_anneal=True, trainer_max_steps=100)
    seen = []
    for global_step in (0, 25, 100):
        guidance.update_step(0, global_step)
        assert guidance.min_step == guidance.max_step
        seen.append(guidance.max_step)
    assert seen == [980, 500, 20]


def test_perp_neg_runs_four_branches_in_one_call(sd, tiny_sd_model):
    cfg = PromptProcessorConfig(prompt="tower", use_perp_neg=True,
                                pretrained_model_name_or_path=str(tiny_sd_model))
    guidance, rows = sd(), []
    guidance.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    out, grad = step(guidance, PromptProcessor(cfg)(), renders(2), cameras(30.0, 200.0))
    assert rows == [8] and torch.isfinite(grad).all() and out["grad_norm"] > 0


def test_views_of_a_batch_do_not_mix_under_perp_neg(sd, tiny_sd_model):
    """Each camera's prediction is that of the camera alone."""
    cfg = PromptProcessorConfig(prompt="tower", use_perp_neg=True,
                                pretrained_model_name_or_path=str(tiny_sd_model))
    guidance, prompt = sd(), PromptProcessor(cfg)()
    torch.manual_seed(0)
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 700])
    both = guidance.guided_noise(noisy, t, prompt, cameras(30.0, 200.0))
    second = guidance.guided_noise(noisy[1:], t[1:], prompt, cameras(200.0))
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=1e-4)


def test_guidance_rescale_brings_the_deviation_back(gps, gps_prompt):
    torch.manual_seed(0)
    noisy, t, batch = torch.randn(2, 4, 8, 8), torch.tensor([100, 700]), cameras(0.0, 90.0)
    cond = gps(guidance_scale=0.0).guided_noise(noisy, t, gps_prompt, batch)
    rescaled = gps(guidance_scale=7.0, guidance_rescale=1.0).guided_noise(
        noisy, t, gps_prompt, batch
    )
    torch.testing.assert_close(rescaled.std((1, 2, 3)), cond.std((1, 2, 3)))


def test_wrong_options_are_refused(gps, sd, gps_prompt):
    for key, value in [("weighting_strategy", "sigma"), ("snap_to_bins", "yes"),
                       ("angle_dropout", 1.5)]:
        with pytest.raises(ValueError, match=f"guidance.{key} is {value!r}"):
            gps(**{key: value})
    with pytest.raises(ValueError, match="use_sjc"):
        sd(use_sjc=True, use_img_loss=True)
    with pytest.raises(ValueError, match="guidance_eval"):
        gps()(renders(1), gps_prompt, guidance_eval=True, **cameras(0.0))
    with pytest.raises(ValueError, match="rgb_as_latents"):
        gps(use_img_loss=True)(torch.rand(1, 8, 8, 4), gps_prompt, rgb_as_latents=True,
                               **cameras(0.0))


def test_token_merging_without_its_package_says_what_to_install(sd, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install tomesd"):
        sd(token_merging=True)


def test_cameras_without_c2w_are_refused(gps, gps_prompt):
    batch = cameras(0.0)
    del batch["c2w"]
    with pytest.raises(ValueError, match="no 'c2w'"):
        gps()(renders(1), gps_prompt, **batch)


def test_models_of_another_kind_are_refused(tiny_gps_model, tiny_sd_model, tmp_path):
    for folder, match in [(tiny_gps_model, "a GPS model"), (tiny_sd_model, "a text model"),
                          (tmp_path / "none", "There is no model folder")]:
        with pytest.raises(ValueError, match=match):
            GPSGuidance(GPSGuidanceConfig(str(folder)))


def test_prompts_of_another_model_are_refused(gps, gps_prompt):
    wider = replace(gps_prompt, text_embeddings=torch.zeros(1, 16, 24))
    with pytest.raises(ValueError, match="24 numbers, the UNet wants 16"):
        gps()(renders(1), wider, **cameras(0.0))


def test_perp_neg_is_refused_by_the_gps_guidance(gps, tiny_angle_model):
    cfg = GPSPromptProcessorConfig(
        use_perp_neg=True, pretrained_model_name_or_path=str(tiny_angle_model)
    )
    with pytest.raises(ValueError, match="use_perp_neg"):
        gps()(renders(1), GPSPromptProcessor(cfg)(), **cameras(0.0))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--half"]])
def test_one_step_at_the_size_of_stable_diffusion(options):
    """Stable Diffusion v1.4's UNet, VAE and text encoder at 256 px on the CPU."""
    script = Path(__file__).parents[1] / "benchmarks" / "sd14_step.py"
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True,
                          check=False, cwd=script.parents[1])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 3, done.stderr
    values = {line["name"]: line for line in lines}
    assert values["sd14_step.finite_gradient"]["ok"], lines
    assert values["sd14_step.peak_rss_gib"]["ok"], lines
