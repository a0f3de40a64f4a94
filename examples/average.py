"""One image for a whole area (Eq. 8), with a map of the points that it was averaged over.

    python examples/average.py MODEL "a building" area.geojson --locations 64

The area is a GeoJSON polygon; with --streets roads.geojson (or the GraphML of osmnx) the points lie
along its streets. Writes average.png and average-map.png.
"""

import argparse
from pathlib import Path

import torch

from gps_guidance.pipeline import StableDiffusionGPSPipeline
from gps_guidance.viz import draw_area


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model of a city: a folder or a name on the Hub")
    parser.add_argument("prompt")
    parser.add_argument("area", help="GeoJSON file with a polygon")
    parser.add_argument("--streets", help="GeoJSON or GraphML file with the streets")
    parser.add_argument("--locations", type=int, default=64, help="M of Eq. 8")
    parser.add_argument("--per-step", type=int, help="fresh sample of so many locations a step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("average.png"))
    args = parser.parse_args()

    pipe = StableDiffusionGPSPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    found = pipe(
        args.prompt, area=args.area, streets=args.streets, num_locations=args.locations,
        locations_per_step=args.per_step, num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
    )
    found.images[0].save(args.out)
    chart = args.out.with_name(f"{args.out.stem}-map.png")
    draw_area(args.area, found.locations, chart, streets=args.streets, title=args.prompt)
    print(args.out, chart)


if __name__ == "__main__":
    main()
