"""Attention maps: the right numbers of the right rows, and a pipeline that does not notice."""

import math

import pytest
import torch
from conftest import TOKEN_DIM, tiny_parts
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peft import LoraConfig
from torch.nn.functional import interpolate

from gps_guidance.attention import AttentionMaps, layer_size, name_tokens, record_attention
from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.miniature.nets import TEXT_DIM, tiny_unet
from gps_guidance.pipeline import StableDiffusionGPSPipeline

BOUNDS = (40.0, 40.0, 50.0, 50.0)
HERE, THERE = (43.0, 47.0), (48.0, 41.0)
PROMPT = "front view"
SIZE = (32, 32)


def sharpen(unet):
    """A UNet whose attention is not almost even, as it is before training."""
    for name, weight in unet.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            weight.data *= 4
    return unet


def make_pipeline(encoder):
    torch.manual_seed(5)
    parts = tiny_parts(encoder)
    for module in parts.modules().values():
        module.eval()
    sharpen(parts.unet)
    pipe = StableDiffusionGPSPipeline(
        parts.vae, parts.text_encoder, parts.tokenizer, parts.unet,
        DDIMScheduler.from_config(parts.scheduler.config, steps_offset=1), encoder, None, None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def city():
    torch.manual_seed(3)
    return make_pipeline(GPSEncoder(TOKEN_DIM, bounds=BOUNDS))


@pytest.fixture
def tower():
    torch.manual_seed(4)
    return make_pipeline(AngleEncoder(TOKEN_DIM, resolution=32, landmark="Leaning Tower of Pisa"))


def noise(count=1, seed=0, size=(8, 8)):
    return torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(seed))


def recorded(pipe, prompt=PROMPT, branches=None, num_images=1, **kwargs):
    """The record of a call of one step from the same noise; its images are not of interest."""
    given = {"num_inference_steps": 1, "latents": noise(), "output_type": "latent", **kwargs}
    with record_attention(pipe.unet, pipe.gps_encoder.num_tokens, branches, num_images) as record:
        pipe(prompt, **given)
    return record


def same(left, right):
    torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


def layers_of(unet):
    return {name: module for name, module in unet.named_modules() if name.endswith("attn2")}


@torch.no_grad()
def test_maps_are_the_softmax_that_is_computed_by_hand():
    """From the inputs of each layer's softmax and the shape of its pixels, as hooks see them."""
    torch.manual_seed(6)
    unet, found, shapes, handles = sharpen(tiny_unet((8, 16, 16))).eval(), {}, {}, []
    for name, layer in layers_of(unet).items():
        block = unet.get_submodule(name.rsplit(".transformer_blocks", 1)[0])
        handles.append(block.register_forward_pre_hook(
            lambda _, args, name=name: shapes.update({name: args[0].shape[-2:]})))
        for part in (layer.to_q, layer.to_k):
            handles.append(part.register_forward_hook(
                lambda _, args, out, name=name: found.setdefault(name, []).append(out)))
    tokens = torch.randn(2, 18, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    total, count = torch.zeros(18, 24, 40, dtype=torch.float64), 0
    for t in (900, 100):
        unet(noise(1, t, (6, 10)).repeat(2, 1, 1, 1), t, tokens)
        for name, (query, key) in found.items():
            heads = layers_of(unet)[name].heads
            q, k = (x[1].double().unflatten(-1, (heads, -1)) for x in (query, key))
            scores = torch.einsum("phd,thd->hpt", q, k) / math.sqrt(q.shape[-1])
            mean = scores.softmax(-1).mean(0).T.reshape(1, 18, *shapes[name])
            total += interpolate(mean, (24, 40), mode="bilinear")[0]
            count += 1
        found.clear()
    for handle in handles:
        handle.remove()
    with record_attention(unet, branches=[1]) as record:
        for t in (900, 100):
            unet(noise(1, t, (6, 10)).repeat(2, 1, 1, 1), t, encoder_hidden_states=tokens)
    assert count == 2 * len(layers_of(unet)) and set(shapes.values()) == {(3, 5), (2, 3)}
    assert total.std(dim=(1, 2)).max() > 0.01  # there is something to see
    same(record.probabilities((24, 40)), (total / count).float())


def test_without_keys_every_token_has_the_same_share(city):
    for layer in layers_of(city.unet).values():
        torch.nn.init.zeros_(layer.to_k.weight)
    found = recorded(city, gps=HERE).probabilities(SIZE)
    same(found, torch.full_like(found, 1 / 18))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_over_tokens_is_one_at_every_pixel(city, dtype):
    city.to(dtype=dtype)
    record = recorded(city, gps=HERE, num_inference_steps=3, height=24, width=40,
                      latents=noise(size=(6, 10)).to(dtype))
    maps = record.maps(name_tokens(city.tokenizer, PROMPT, city.gps_encoder), (24, 40))
    assert maps.raw.shape == (7, 24, 40) and maps.raw.min() > 0
    same(maps.raw.sum(0), torch.ones(24, 40))


@pytest.mark.parametrize("kind", ["plain", "lora", "sliced", "angle"])
def test_the_image_is_the_same_and_the_processors_come_back(city, tower, kind):
    pipe = tower if kind == "angle" else city
    if kind == "lora":
        before = recorded(pipe, gps=HERE).probabilities(SIZE)
        pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=[
            "to_q", "to_k"]))
        assert (recorded(pipe, gps=HERE).probabilities(SIZE) - before).abs().max() > 1e-3
    if kind == "sliced":
        pipe.enable_attention_slicing(1)
    where = {"bearing_deg": 90} if kind == "angle" else {"gps": HERE}
    given = {"prompt": PROMPT, "latents": noise(), "num_inference_steps": 3, "output_type": "pt",
             **where}
    own = pipe.unet.attn_processors
    expected = pipe(**given).images
    with record_attention(pipe.unet, pipe.gps_encoder.num_tokens) as record:
        assert torch.equal(pipe(**given).images, expected)
    assert record.probabilities(SIZE).shape == (16 + pipe.gps_encoder.num_tokens, *SIZE)
    left = pipe.unet.attn_processors
    assert left.keys() == own.keys() and all(left[name] is own[name] for name in own)
    assert not pipe.unet._forward_pre_hooks
    with pytest.raises(RuntimeError, match="stop"), record_attention(pipe.unet, 1):
        raise RuntimeError("stop")
    assert all(pipe.unet.attn_processors[name] is own[name] for name in own)


@torch.no_grad()
def alone(pipe, text, place, latents=None):
    """The maps of a UNet call of one row at the time step of ``recorded``."""
    pipe.scheduler.set_timesteps(1)
    tokens = torch.cat([text, place], dim=1)
    with record_attention(pipe.unet, branches=[0]) as record:
        pipe.unet(noise() if latents is None else latents, pipe.scheduler.timesteps[0], tokens)
    return record.probabilities(SIZE)


@torch.no_grad()
def text_of(pipe, prompt=PROMPT):
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


@torch.no_grad()
@pytest.mark.parametrize("scales", [(3.5, 7.5), (3.5, 3.5), (1.0, 7.5), (1.0, 1.0)])
@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_only_the_row_with_text_and_place_is_recorded(city, scales, chunk):
    record = recorded(city, gps=HERE, guidance_scale=scales[0], gps_guidance_scale=scales[1],
                      location_batch_size=chunk, negative_prompt="back view")
    expected = alone(city, text_of(city), city.gps_encoder([HERE]))
    same(record.probabilities(SIZE), expected)
    assert (alone(city, text_of(city), city.gps_encoder.null(1)) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_text_alone_is_the_last_branch(city):
    found = recorded(city, branches=[-1]).probabilities(SIZE)
    same(found, alone(city, text_of(city), city.gps_encoder.null(1)))


@torch.no_grad()
def test_the_locations_of_an_area_are_averaged(city):
    places = city.gps_encoder([HERE, THERE, (45.0, 44.0)])
    one = torch.stack([alone(city, text_of(city), place[None]) for place in places])
    for chunk in (2, 16):
        same(recorded(city, gps_embeds=places[None], location_batch_size=chunk)
             .probabilities(SIZE), one.mean(0))
    some = recorded(city, gps_embeds=places[None], locations_per_step=2).probabilities(SIZE)
    pairs = [(one[j] + one[k]) / 2 for j, k in ((0, 1), (0, 2), (1, 2))]
    assert min((pair - some).abs().max() for pair in pairs) < 1e-6


@torch.no_grad()
def test_each_image_has_its_own_maps(city):
    for branches in (None, [2], [-1]):  # of e(0,0), e(p,0), e(p,g)
        record = recorded(city, branches=branches, gps=[HERE, THERE], num_images=2,
                          latents=noise(2))
        for k, place in enumerate((HERE, THERE)):
            same(record.probabilities(SIZE, image=k),
                 alone(city, text_of(city), city.gps_encoder([place]), noise(2)[k : k + 1]))
    with pytest.raises(ValueError, match="image is 2; there are 2"):
        record.probabilities(SIZE, image=2)
    with pytest.raises(ValueError, match=r"batch of 6 are not branches of 1 image.*num_images"):
        recorded(city, gps=[HERE, THERE], latents=noise(2))


def test_what_is_held_does_not_grow(city):
    place = city.gps_encoder([HERE, THERE])[None].detach()

    def held(**kwargs):
        return sum(sums.numel() for sums in recorded(city, **kwargs)._sums.values())

    assert held(gps=HERE) == held(gps_embeds=place, num_inference_steps=4) == 18 * 4 * 4


def test_words_are_named_and_their_pieces_joined(city):
    named = name_tokens(city.tokenizer, "A photo of views, Pisa", city.gps_encoder)
    assert [name for name, _ in named] == ["<start>", "a", "photo", "of", "views", ",", "pisa",
                                           "<end>", "<padding>", "longitude", "latitude"]
    parts = [part for _, part in named]
    assert parts[0].start == 0 and parts[-1].stop == 18
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
    assert parts[4].stop - parts[4].start > 1  # no word of the tokenizer
    cut = name_tokens(city.tokenizer, "front " * 30)
    assert [name for name, _ in cut] == ["<start>", *["front"] * 14, "<end>"]
    assert name_tokens(city.tokenizer, None) == [("<no text>", slice(0, 16))]


def test_a_landmark_has_its_own_prompt(tower):
    named = [name for name, _ in name_tokens(tower.tokenizer, None, tower.gps_encoder)]
    assert named[1:4] == ["a", "photo", "of"] and named[-1] == "angle"
    record = recorded(tower, None, bearing_deg=90)
    maps = record.maps(name_tokens(tower.tokenizer, None, tower.gps_encoder), SIZE).named()
    assert maps.names == ["a", "photo", "of", "leaning", "tower", "of", "pisa", "angle"]
    same(maps.raw[-1], record.probabilities(SIZE)[16])


@torch.no_grad()
def test_the_last_token_is_that_of_the_latitude(city):
    south, north = city.gps_encoder([(42.0, 45.0), (48.0, 45.0)])
    place = [(name, part.start - 16) for name, part in
             name_tokens(city.tokenizer, PROMPT, city.gps_encoder)[-2:]]
    assert [name for name, k in place if not torch.equal(south[k], north[k])] == ["latitude"]


def test_normalised_maps_go_from_0_to_1():
    raw = torch.tensor([[[0.1, 0.2], [0.3, 0.5]], [[0.4, 0.4], [0.4, 0.4]]])
    maps = AttentionMaps(["car", "<end>"], raw)
    same(maps.normalised, torch.tensor([[[0, 0.25], [0.5, 1]], [[0, 0], [0, 0]]]))
    assert maps.named().names == ["car"] and torch.equal(maps.named().raw, raw[:1])


def test_layers_have_halves_of_the_latents_rounded_up():
    sizes = [layer_size((5, 7), pixels) for pixels in (35, 12, 4, 1)]
    assert sizes == [(5, 7), (3, 4), (2, 2), (1, 1)]
    with pytest.raises(ValueError, match="13 pixels, which halving latents of 5 x 7"):
        layer_size((5, 7), 13)


def test_what_cannot_be_recorded_is_refused(city):
    unet = city.unet
    with pytest.raises(ValueError, match="num_place_tokens"), record_attention(unet):
        pass
    with pytest.raises(ValueError, match="no cross-attention"), record_attention(
            UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=2,
                        down_block_types=("DownBlock2D",) * 2,
                        up_block_types=("UpBlock2D",) * 2), 1):
        pass
    with pytest.raises(ValueError, match=r"branches is \[3\], but this call of the UNet has 3"):
        recorded(city, gps=HERE, branches=[3])
    with pytest.raises(ValueError, match="Nothing was recorded of image 0"):
        recorded(city).probabilities(SIZE)
    with pytest.raises(ValueError, match="names for 16 tokens, but the UNet got 18"):
        recorded(city, gps=HERE).maps(name_tokens(city.tokenizer, PROMPT), SIZE)
    layer = next(iter(layers_of(unet).values()))
    layer.set_processor(IPAdapterAttnProcessor2_0(layer.inner_dim, TOKEN_DIM))
    with pytest.raises(ValueError, match=r"IPAdapterAttnProcessor2_0.*unload_ip_adapter"), \
            record_attention(unet, 2):
        pass
    assert isinstance(layer.processor, IPAdapterAttnProcessor2_0)
