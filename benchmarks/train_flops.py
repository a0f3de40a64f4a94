"""The arithmetic of training at the paper's scale: FLOPs counted, times and prices derived.

    python benchmarks/train_flops.py

torch's FLOP counter runs Stable Diffusion v1.4's UNet, VAE encoder and text encoder on the meta
device, which computes nothing: multiplications and additions of convolutions and matrix products,
2 for each pair. A training step is three forward passes of the UNet (one forward, twice as much
backward), and, without a cache, one of the VAE's encoder. Hours and prices follow from the cards'
peak rates at a stated utilisation: they are no measurement. Prints JSON lines.
"""

from __future__ import annotations

import sys

from sd14 import build_text_encoder, build_unet, build_vae
from stages import line

# peak dense bf16 tensor FLOP/s by the makers' data sheets, and dollars an hour: an assumption
CARDS = {"h100_sxm": (989e12, 2.5), "a100_sxm": (312e12, 1.3), "rtx4090": (165e12, 0.4)}
UTILISATION = 0.35
# steps, photos a step, pixels, UNet passes a photo (2 with prior preservation), photos
RECIPES = {"gps_nyc": (15000, 512, 512, 1, 501592), "angle": (800, 256, 256, 2, 1000)}
TOKENS = {"gps_nyc": 77 + 2, "angle": 77 + 1}
GOALS = {"with_vae": 27.1, "cached": 18.5}


def forward_flops(module: object, *inputs: object) -> float:
    """FLOPs of one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(*inputs)  # type: ignore[operator]
    return float(counter.get_total_flops())


def count() -> dict[str, float]:
    """TFLOP of forward passes of one sample: ``unet_512``, ``vae_encoder_512``, ..., ``text``."""
    import torch

    from gps_guidance.miniature.nets import tiny_tokenizer

    found = {}
    with torch.device("meta"), torch.no_grad():
        unet, vae = build_unet(), build_vae()
        text = build_text_encoder(tiny_tokenizer(["a"]))
        for recipe, (_, _, side, _, _) in RECIPES.items():
            latents = torch.zeros(1, 4, side // 8, side // 8)
            tokens = torch.zeros(1, TOKENS[recipe], 768)
            found[f"unet_{side}"] = forward_flops(unet, latents, torch.zeros(1), tokens) / 1e12
            image = torch.zeros(1, 3, side, side)
            found[f"vae_encoder_{side}"] = forward_flops(vae.encode, image) / 1e12
        ids = torch.zeros(1, 77, dtype=torch.long)
        found["text_encoder"] = forward_flops(text, ids) / 1e12
    return found


def main() -> int:
    flops = count()
    for name, value in flops.items():
        line(f"train_flops.{name}_tflop", value)
    met = []
    for recipe, (steps, batch, side, passes, photos) in RECIPES.items():
        samples = steps * batch
        unet = 3 * passes * samples * flops[f"unet_{side}"] / 1e6  # EFLOP
        vae = samples * flops[f"vae_encoder_{side}"] / 1e6
        cache = photos * flops[f"vae_encoder_{side}"] / 1e6
        for name, value in (("with_vae", unet + vae), ("cached", unet)):
            goal = GOALS[name] if recipe == "gps_nyc" else None
            close = goal is None or abs(value / goal - 1) < 0.02
            line(f"train_flops.{recipe}_{name}_eflop", value)
            met.append(line(f"train_flops.{recipe}_{name}_as_expected", close, 1) if goal else True)
        line(f"train_flops.{recipe}_filling_the_cache_eflop", cache)
        line(f"train_flops.{recipe}_latents_gb", photos * 2 * 4 * (side // 8) ** 2 * 2 / 1e9)
        line(f"train_flops.{recipe}_texts_gb", photos * 77 * 768 * 2 / 1e9)
        for card, (peak, price) in CARDS.items():
            hours = (unet + cache) * 1e18 / (peak * UTILISATION) / 3600
            line(f"train_flops.{recipe}_{card}_hours", hours)
            line(f"train_flops.{recipe}_{card}_dollars", hours * price)
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
