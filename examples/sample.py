"""A grid of prompts x places, or of a landmark from several bearings, as one picture.

    python examples/sample.py               # the bundled landmark from twelve bearings
    python examples/sample.py MODEL --prompt "a red car" "a dog in the snow" \
        --gps 40.7484,-73.9857 40.7061,-73.9969

MODEL is a folder, a name on the Hub, or a bundled model.
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from gps_guidance.encoders import AngleEncoder
from gps_guidance.pipeline import StableDiffusionGPSPipeline


def pair(text: str) -> tuple[float, float]:
    lat, lon = map(float, text.split(","))
    return lat, lon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="miniature-pisa")
    parser.add_argument("--prompt", nargs="+", default=[None])
    parser.add_argument("--gps", nargs="+", type=pair, metavar="LAT,LON")
    parser.add_argument("--bearings", nargs="+", type=float, default=[30.0 * k for k in range(12)])
    parser.add_argument("--guidance-scale", type=float, default=3.5, help="w_p")
    parser.add_argument("--gps-guidance-scale", type=float, help="w_g")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample.png")
    args = parser.parse_args()

    pipe = StableDiffusionGPSPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    landmark = isinstance(pipe.gps_encoder, AngleEncoder)
    places = args.bearings if landmark else args.gps
    if not places:
        parser.error(f"{args.model} is a model of a city: add --gps LAT,LON ...")
    rows = []
    for prompt in args.prompt:
        rows += pipe(
            prompt, **{"bearing_deg" if landmark else "gps": places},
            guidance_scale=args.guidance_scale, gps_guidance_scale=args.gps_guidance_scale,
            num_inference_steps=args.steps,
            # the same noise everywhere, so that prompt and place alone make the difference
            generator=[torch.Generator().manual_seed(args.seed) for _ in places],
        ).images
    make_image_grid(rows, rows=len(args.prompt), cols=len(places)).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
