"""StableDiffusionGPSPipeline: the laws of Eq. 4, 7 and 8, and what a call takes and refuses."""

import numpy as np
import pytest
import torch
from conftest import TOKEN_DIM, tiny_parts
from diffusers import DDIMScheduler
from shapely.geometry import Polygon, box

from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.pipeline import StableDiffusionGPSPipeline

BOUNDS = (40.0, 40.0, 50.0, 50.0)  # so that a swapped pair lies inside as well
HERE, THERE = (43.0, 47.0), (48.0, 41.0)
AREA = box(42, 43, 44, 46)  # (lon, lat)
STEPS = 3


def make_pipeline(encoder):
    torch.manual_seed(5)
    parts = tiny_parts(encoder)
    for module in parts.modules().values():
        module.eval()
    pipe = StableDiffusionGPSPipeline(
        parts.vae, parts.text_encoder, parts.tokenizer, parts.unet,
        DDIMScheduler.from_config(parts.scheduler.config, steps_offset=1), encoder, None, None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def city():
    torch.manual_seed(3)
    return make_pipeline(GPSEncoder(TOKEN_DIM, bounds=BOUNDS))


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(4)
    return make_pipeline(AngleEncoder(TOKEN_DIM, resolution=32, landmark="Leaning Tower of Pisa",
                                      center=(43.722952, 10.396597)))


def run(pipe, prompt="front view", seed=0, **kwargs):
    """Latents of a call."""
    given = {"num_inference_steps": STEPS, "output_type": "latent", **kwargs}
    if "latents" not in given:
        given["generator"] = torch.Generator().manual_seed(seed)
    return pipe(prompt, **given).images


def rows_of(pipe, **kwargs):
    """How many rows went through the UNet, for each of its calls."""
    found = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
    try:
        run(pipe, **kwargs)
    finally:
        handle.remove()
    return found


@torch.no_grad()
def by_hand(pipe, prompt, points, w_p, w_g, seed=0):
    """Eq. 4 and 8 as printed, every prediction in a call of its own."""
    ids = pipe.tokenizer([prompt, ""], padding="max_length", return_tensors="pt").input_ids
    text = pipe.text_encoder(ids)[0][:1]
    places = [pipe.gps_encoder(np.array([point])) for point in points]
    none = torch.zeros(1, 2, TOKEN_DIM)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    pipe.scheduler.set_timesteps(STEPS)

    def e(p, g):
        return pipe.unet(latents, t, torch.cat([p, g], dim=1)).sample

    for t in pipe.scheduler.timesteps:
        e00, ep0 = e(torch.zeros_like(text), none), e(text, none)
        epg = sum(e(text, place) for place in places) / len(places)
        noise = e00 + w_p * (ep0 - e00) + w_g * (epg - ep0)
        latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents


def close(a, b):
    """Equal to 1e-5 of the largest latent: guidance scales the rounding of float32 with them."""
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


# --- the equations ------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(3.5, 7.5), (1, 1), (1, 4), (3, 3), (2, 0), (0, 0), (0.5, 2)])
def test_eq_4(city, scales):
    found = run(city, gps=HERE, guidance_scale=scales[0], gps_guidance_scale=scales[1])
    close(found, by_hand(city, "front view", [HERE], *scales))


def test_weights_of_one_give_the_conditional_prediction(city):
    found = run(city, gps=HERE, guidance_scale=1, gps_guidance_scale=1)
    close(found, by_hand(city, "front view", [HERE], 1, 1))
    assert rows_of(city, gps=HERE, guidance_scale=1, gps_guidance_scale=1) == [1] * STEPS


def test_without_weight_the_place_is_ignored(city):
    here, there, nowhere = (run(city, gps=point, gps_guidance_scale=0)
                            for point in (HERE, THERE, None))
    assert torch.equal(here, there)
    assert torch.equal(here, nowhere)
    assert not torch.equal(run(city, gps=HERE), run(city, gps=THERE))


def test_lat_and_lon_are_not_interchangeable(city):
    assert (run(city, gps=HERE) - run(city, gps=HERE[::-1])).abs().max() > 1e-4


def test_eq_8(city):
    out = city("front view", area=AREA, num_locations=5, num_inference_steps=STEPS,
               output_type="latent", generator=torch.Generator().manual_seed(0))
    assert out.locations.shape == (5, 2)
    close(out.images, by_hand(city, "front view", out.locations, 3.5, 7.5))


def test_an_area_of_one_point_is_eq_4(city):
    out = city("front view", area=AREA, num_locations=1, num_inference_steps=STEPS,
               output_type="latent", generator=torch.Generator().manual_seed(0))
    close(out.images, run(city, gps=out.locations[0]))


def test_an_area_of_equal_points_is_eq_4(city):
    tokens = city.gps_encoder(np.array([HERE]))
    close(run(city, gps_embeds=tokens[:, None].expand(1, 7, 2, -1)), run(city, gps=HERE))


def test_an_area_depends_neither_on_order_nor_on_chunks(city):
    rng = np.random.default_rng(0)
    tokens = city.gps_encoder(rng.uniform(41, 49, (6, 2)))[None]
    whole = run(city, gps_embeds=tokens)
    for size in (1, 3, 100):
        close(run(city, gps_embeds=tokens, location_batch_size=size), whole)
    close(run(city, gps_embeds=tokens[:, torch.tensor([3, 0, 5, 4, 1, 2])]), whole)


def test_eq_7_is_eq_4_with_equal_weights(tower):
    cond = run(tower, None, bearing_deg=90, guidance_scale=1)
    guided = run(tower, None, bearing_deg=90, guidance_scale=3)
    close(guided, run(tower, None, bearing_deg=90, guidance_scale=3, gps_guidance_scale=3))
    assert not torch.equal(cond, guided)
    assert rows_of(tower, prompt=None, bearing_deg=90) == [2] * STEPS  # e(p, g') and e(0, 0)


def test_half_a_turn_either_way_is_one_bearing(tower):
    a, b, c = (run(tower, None, bearing_deg=turn) for turn in (-180, 180, 540.0))
    assert torch.equal(a, b) and torch.equal(a, c)


def test_bearings_are_snapped_to_the_bins_of_the_model(tower):
    assert torch.equal(run(tower, None, bearing_deg=92), run(tower, None, bearing_deg=90))
    assert not torch.equal(run(tower, None, bearing_deg=96), run(tower, None, bearing_deg=90))


# --- what is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "rows"),
    [((3.5, 7.5), 3), ((1, 4), 2), ((3, 3), 2), ((2, 0), 2), ((1, 0), 1), ((0, 0), 1), ((0, 2), 3)],
)
def test_predictions_without_weight_are_not_computed(city, scales, rows):
    found = rows_of(city, gps=HERE, guidance_scale=scales[0], gps_guidance_scale=scales[1])
    assert found == [rows] * STEPS


def test_an_area_takes_as_few_calls_as_allowed(city):
    assert rows_of(city, area=AREA, num_locations=8) == [10] * STEPS
    found = rows_of(city, area=AREA, num_locations=8, location_batch_size=4)
    assert found == [4, 4, 2] * STEPS
    found = rows_of(city, area=AREA, num_locations=64, locations_per_step=8)
    assert found == [10] * STEPS


def test_guidance_can_be_limited_to_an_interval(city):
    assert rows_of(city, gps=HERE, guidance_interval=(0.3, 0.6)) == [1, 3, 1]
    close(run(city, gps=HERE, guidance_interval=(0, 0)),
          run(city, gps=HERE, guidance_scale=1, gps_guidance_scale=1))


def test_a_sample_of_all_locations_is_exact(city):
    exact = run(city, area=AREA, num_locations=6)
    close(run(city, area=AREA, num_locations=6, locations_per_step=6), exact)
    close(run(city, area=AREA, num_locations=6, locations_per_step=60), exact)
    assert not torch.allclose(run(city, area=AREA, num_locations=6, locations_per_step=1), exact)


def test_sampled_locations_are_fresh_and_fair():
    from gps_guidance.place import sample_locations

    rng = np.random.default_rng(0)
    drawn = [sample_locations(10, 3, rng) for _ in range(4000)]
    assert len({tuple(d) for d in drawn}) == 120  # every one of the 10 choose 3
    counts = np.bincount(np.concatenate(drawn), minlength=10) / 4000
    assert np.abs(counts - 0.3).max() < 0.03


def test_a_place_without_text(city):
    found = run(city, None, gps=HERE, gps_guidance_scale=3)
    empty = torch.zeros(1, city.tokenizer.model_max_length, TOKEN_DIM)
    given = run(city, None, prompt_embeds=empty, gps=HERE, guidance_scale=9, gps_guidance_scale=3)
    close(found, given)
    assert rows_of(city, prompt=None, gps=HERE) == [2] * STEPS


def test_null_text_is_the_models(tower):
    encoder = GPSEncoder(TOKEN_DIM, bounds=BOUNDS, null_text="empty")
    pipe = make_pipeline(encoder)
    assert torch.equal(run(pipe, gps=HERE), run(pipe, gps=HERE, negative_prompt=""))
    zeros = make_pipeline(GPSEncoder(TOKEN_DIM, bounds=BOUNDS))
    assert not torch.equal(run(zeros, gps=HERE), run(zeros, gps=HERE, negative_prompt=""))


@pytest.mark.parametrize("null_text", ["zeros", "empty"])
def test_encoded_prompts_give_the_image_of_the_prompt(null_text):
    pipe = make_pipeline(GPSEncoder(TOKEN_DIM, bounds=BOUNDS, null_text=null_text))
    text, negative = pipe.encode_prompt("front view", "cpu", 1, True)
    found = run(pipe, None, prompt_embeds=text, negative_prompt_embeds=negative, gps=HERE)
    assert torch.equal(found, run(pipe, "front view", gps=HERE))
    pipe.register_modules(gps_encoder=None)
    alone, unknown = pipe.encode_prompt("front view", "cpu", 1, True)
    assert torch.equal(alone, text) and unknown is None


# --- seeds and batches --------------------------------------------------------------------------


def test_seeds(city):
    assert torch.equal(run(city, gps=HERE, seed=1), run(city, gps=HERE, seed=1))
    assert not torch.equal(run(city, gps=HERE, seed=1), run(city, gps=HERE, seed=2))
    places = [city("side", area=AREA, num_locations=4, num_inference_steps=1, output_type="latent",
                   generator=torch.Generator().manual_seed(seed)).locations for seed in (1, 1, 2)]
    assert np.array_equal(places[0], places[1]) and not np.array_equal(places[0], places[2])
    torch.manual_seed(7)
    one = city("side", area=AREA, num_locations=4, num_inference_steps=1).locations
    torch.manual_seed(7)
    assert np.array_equal(
        one, city("side", area=AREA, num_locations=4, num_inference_steps=1).locations)


def test_an_area_starts_from_the_noise_of_a_place(city):
    seen = []

    def keep(pipe, step, t, tensors):
        seen.append(tensors["latents"])
        return {}

    for place in ({"gps": HERE}, {"area": AREA, "num_locations": 4}):
        run(city, guidance_scale=1, gps_guidance_scale=0, callback_on_step_end=keep, **place)
    assert torch.equal(seen[0], seen[STEPS])


def test_a_batch_of_two_is_two_calls(city):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    both = run(city, ["front view", "back view"], gps=[HERE, THERE], latents=noise)
    for k, (prompt, point) in enumerate((("front view", HERE), ("back view", THERE))):
        close(both[k : k + 1], run(city, prompt, gps=point, latents=noise[k : k + 1]))


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_places_broadcast(city, kind):
    gps = kind([HERE, THERE])
    noise = torch.randn(2, 4, 8, 8)
    both = run(city, "front view", gps=gps, latents=noise)
    assert len(both) == 2
    close(both, run(city, ["front view", "front view"], gps=gps, latents=noise))


def test_prompts_broadcast(city):
    noise = torch.randn(4, 4, 8, 8)
    prompts = ["front view", "back view"]
    found = run(city, prompts, gps=HERE, latents=noise, num_images_per_prompt=2)
    close(found, run(city, prompts, gps=[HERE, HERE], latents=noise, num_images_per_prompt=2))
    close(found[2:3], run(city, "back view", gps=HERE, latents=noise[2:3]))


def test_images_of_one_place(city):
    noise = torch.randn(6, 4, 8, 8)
    found = run(city, "front view", gps=[HERE, THERE], latents=noise, num_images_per_prompt=3)
    close(found[4:5], run(city, "front view", gps=THERE, latents=noise[4:5]))


def test_a_generator_for_each_image(city):
    seeds = [torch.Generator().manual_seed(s) for s in (3, 4)]
    both = city("side", gps=[HERE, THERE], generator=seeds, num_inference_steps=STEPS,
                output_type="latent").images
    close(both[1:], run(city, "side", gps=THERE, seed=4))


# --- outputs and callbacks ----------------------------------------------------------------------


def test_outputs(city):
    image = city("side", gps=HERE, num_inference_steps=1).images[0]
    assert image.size == (32, 32)
    images, nsfw, locations = city("side", gps=HERE, num_inference_steps=1, return_dict=False)
    assert len(images) == 1 and nsfw is None and locations is None
    array = city("side", gps=HERE, num_inference_steps=1, output_type="np").images
    assert array.shape == (1, 32, 32, 3)
    wide = city("side", gps=HERE, num_inference_steps=1, width=64, output_type="pt").images
    assert wide.shape == (1, 3, 32, 64)


def test_the_size_of_an_angle_model_is_its_own():
    encoder = AngleEncoder(TOKEN_DIM, resolution=(48, 32), landmark="x")
    assert make_pipeline(encoder)(bearing_deg=0, num_inference_steps=1).images[0].size == (32, 48)


def test_callbacks_change_tensors_and_interrupt(city):
    steps = []

    def stop(pipe, step, t, tensors):
        steps.append(set(tensors))
        pipe._interrupt = step == 1
        return {"latents": tensors["latents"] * 0}

    names = list(city._callback_tensor_inputs)
    found = run(city, gps=HERE, callback_on_step_end=stop,
                callback_on_step_end_tensor_inputs=names)
    assert steps == [set(names)] * 2
    assert not found.any()


def test_the_docstrings_example_runs():
    import doctest

    from gps_guidance import pipeline

    text = pipeline.EXAMPLE_DOC_STRING.replace("```py", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, {}, "example", None, 0)
    assert doctest.DocTestRunner().run(example).failed == 0
    assert ">>> image = pipe(bearing_deg=90" in StableDiffusionGPSPipeline.__call__.__doc__


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gps": (91.0, 45.0)}, "latitude must lie in"),
        ({"gps": (float("nan"), 45.0)}, "not finite"),
        ({"gps": (43.0, 47.0, 1.0)}, r"\(lat, lon\) pairs"),
        ({"gps": []}, "pairs"),
        ({"gps": [[HERE, HERE]]}, "one \\(lat, lon\\) pair or a list"),
        ({"gps": (39.0, 45.0)}, "outside the bounds .* 111 km away"),
        ({"bearing_deg": 90}, "GPS model of a city: give gps"),
        ({"gps": HERE, "area": AREA}, "gps and area or streets were given: give one"),
        ({"gps": [HERE, THERE, HERE], "prompt": ["a", "b"]}, "2 prompts and 3 places"),
        ({"area": AREA, "num_locations": 0}, "num_locations must be a whole number"),
        ({"area": box(60, 43, 62, 46)}, "outside the bounds"),
        ({"area": Polygon()}, "area is empty"),
        ({"area": [(43, 43), (44, 44), (43, 44), (44, 43)]}, "not a simple polygon: self-inter"),
        ({"gps": HERE, "guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"gps": HERE, "location_batch_size": 0}, "location_batch_size is 0"),
        ({"area": AREA, "locations_per_step": 0}, "locations_per_step is 0"),
        ({"gps_embeds": torch.zeros(1, 1, TOKEN_DIM)}, "gps_embeds has shape"),
        ({"gps": HERE, "gps_embeds": torch.zeros(1, 2, TOKEN_DIM)}, "beside a place"),
        ({"prompt": None}, "prompt"),
        ({"gps": HERE, "negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts for 1"),
        ({"gps": HERE, "height": 33}, "divisible by 8"),
    ],
)
def test_a_city_refuses(city, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(city, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gps": (43.73, 10.396597)}, r"Leaning Tower of Pisa: give bearing_deg.*bearing_deg=0\b"),
        ({"area": box(10, 43, 11, 44)}, "angle model of a landmark: give bearing_deg"),
        ({"bearing_deg": float("inf")}, "finite number of degrees"),
        ({"bearing_deg": "north"}, "give degrees"),
        ({"bearing_deg": [[1.0, 2.0]]}, "a list of them"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_a_landmark_refuses(tower, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(tower, **kwargs)


def test_tokens_must_fit_the_unet():
    with pytest.raises(ValueError, match="cross_attention_dim=16"):
        make_pipeline(GPSEncoder(24, bounds=BOUNDS))
