"""An image with maps of where the model looked for each word and for the place (Fig. 9).

    python examples/attention.py MODEL "a red car" --gps 40.7484,-73.9857
    python examples/attention.py miniature-pisa --bearing 90

MODEL is a folder, a name on the Hub, or a bundled model. Writes attention.png.
"""

import argparse
from pathlib import Path

import torch
from sample import pair

from gps_guidance.attention import name_tokens, record_attention
from gps_guidance.pipeline import StableDiffusionGPSPipeline
from gps_guidance.viz import draw_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("prompt", nargs="?")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--gps", type=pair, metavar="LAT,LON", help="of a model of a city")
    place.add_argument("--bearing", type=float, metavar="DEG", help="of a model of a landmark")
    parser.add_argument("--guidance-scale", type=float, default=3.5, help="w_p")
    parser.add_argument("--gps-guidance-scale", type=float, help="w_g")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    args = parser.parse_args()

    pipe = StableDiffusionGPSPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    with record_attention(pipe.unet, pipe.gps_encoder.num_tokens) as record:
        image = pipe(
            args.prompt, gps=args.gps, bearing_deg=args.bearing,
            guidance_scale=args.guidance_scale, gps_guidance_scale=args.gps_guidance_scale,
            num_inference_steps=args.steps, generator=torch.Generator().manual_seed(args.seed),
        ).images[0]
    tokens = name_tokens(pipe.tokenizer, args.prompt, pipe.gps_encoder)
    maps = record.maps(tokens, (image.height, image.width)).named()
    draw_attention(image, maps.raw, maps.names, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
