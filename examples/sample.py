"""Images of one prompt at several places, or of a landmark from several bearings, as one picture.

    python examples/sample.py       # the bundled landmark from twelve bearings
    python examples/sample.py MODEL --prompt "a red car" --gps 40.7484,-73.9857 40.7061,-73.9969

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
    parser.add_argument("--prompt")
    parser.add_argument("--gps", nargs="+", type=pair, metavar="LAT,LON")
    parser.add_argument("--bearings", nargs="+", type=float, default=[30.0 * k for k in range(12)])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample.png")
    args = parser.parse_args()

    pipe = StableDiffusionGPSPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    landmark = isinstance(pipe.gps_encoder, AngleEncoder)
    place = {"bearing_deg": args.bearings} if landmark else {"gps": args.gps}
    count = len(args.bearings) if landmark else len(args.gps or ())
    if not count:
        parser.error(f"{args.model} is a model of a city: add --gps LAT,LON ...")
    images = pipe(
        args.prompt, **place, num_inference_steps=args.steps,
        # the same noise everywhere, so that the place alone makes the difference
        generator=[torch.Generator().manual_seed(args.seed) for _ in range(count)],
    ).images
    columns = min(6, count)
    images += [images[0].point(lambda _: 255)] * (-count % columns)
    make_image_grid(images, rows=len(images) // columns, cols=columns).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
