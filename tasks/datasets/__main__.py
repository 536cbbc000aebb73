"""Write images of a data set as files, to try out what takes files: ``python -m tasks.datasets digits frames``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from tasks.datasets import open_dataset
from tasks.datasets.options import DatasetOptions
from tasks.errors import MetaMorphosisError


def main(arguments: list[str] | None = None) -> int:
    """Parse, write, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tasks.datasets", description="Write images of a data set as PNG.")
    parser.add_argument("source", help="digits, or parquet:PATH")
    parser.add_argument("folder", type=Path, help="where to; it is made if need be")
    parser.add_argument("--count", type=int, default=20, help="how many, from the first on (20)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side (32)")
    asked = parser.parse_args(arguments)
    try:
        images = open_dataset(asked.source, image_size=asked.image_size, options=DatasetOptions()).images[: asked.count]
        asked.folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(asked.folder / f"{number:06d}.png")
    except (MetaMorphosisError, OSError) as error:
        print(f"python -m tasks.datasets: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(f"{len(images)} images in {asked.folder}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
