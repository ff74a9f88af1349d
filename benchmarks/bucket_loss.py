"""What buckets cost: how much of 500 pictures of random shape is cropped away, by each rule.

    python benchmarks/bucket_loss.py [--pictures 500] [--seed 0]

The ratios of width to height lie between 1:3 and 3:1, evenly on a logarithmic scale; the pictures have 1 to 12 million
pixels. No bucket is larger than the resolution's area, with either rule, so both need the same memory. Told are the
share of a picture that is cropped away; the shapes' area as a share of the resolution's; the product of what is kept
and that area, which is how much of the picture is trained at how many pixels; the factor by which sides are resized
(geometric mean); and how many shapes come up, of which each may end an epoch with a smaller batch. `own` are sides
from the picture's own size (--bucket-no-upscale): two rows of the same pictures, two of 0.1 to 1 million pixels.
"""

import argparse
import math
import random
from collections.abc import Sequence
from statistics import fmean

from lorasmith.data.buckets import Buckets, Size, bucket_crop

SETTINGS = [((512, 512), 256, 1024), ((768, 768), 256, 1024), ((768, 768), 256, 1536), ((1024, 1024), 512, 2048)]
COLUMNS = "| resolution | sides | rule | cropped, mean | cropped, most | area | kept x area | factor | shapes |"


def random_sizes(count: int, seed: int, megapixels: tuple[float, float]) -> list[Size]:
    rng, found = random.Random(seed), []
    for _ in range(count):
        ratio, area = math.exp(rng.uniform(-math.log(3), math.log(3))), rng.uniform(*megapixels) * 1e6
        found.append((round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))))
    return found


def row(sizes: Sequence[Size], buckets: Buckets) -> str:
    plans = [bucket_crop(size, buckets) for size in sizes]
    lost = [plan.lost_area for plan in plans]
    areas = [math.prod(plan.shape) / math.prod(buckets.resolution) for plan in plans]
    factors = [math.log(plan.resize[0] / size[0]) for plan, size in zip(plans, sizes, strict=True)]
    kept = [(1 - share) * area for share, area in zip(lost, areas, strict=True)]
    cells = [
        "x".join(map(str, buckets.resolution)),
        "own" if buckets.no_upscale else f"{buckets.min_side} to {buckets.max_side}",
        "sd-scripts" if buckets.is_sd_scripts else "less-crop",
        f"{fmean(lost):.2%}",
        f"{max(lost):.1%}",
        f"{fmean(areas):.3f}",
        f"{fmean(kept):.3f}",
        f"{math.exp(fmean(factors)):.3f}",
        str(len({plan.shape for plan in plans})),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(COLUMNS + "\n" + "|---" * (COLUMNS.count("|") - 1) + "|")
    large = random_sizes(given.pictures, given.seed, (1, 12))
    small = random_sizes(given.pictures, given.seed, (0.1, 1))
    for resolution, low, high in SETTINGS:
        for is_sd_scripts in (True, False):
            print(row(large, Buckets(resolution, low, high, is_sd_scripts=is_sd_scripts)))
    for sizes in (large, small):
        for is_sd_scripts in (True, False):
            print(row(sizes, Buckets((512, 512), is_sd_scripts=is_sd_scripts, no_upscale=True)))


if __name__ == "__main__":
    main()
