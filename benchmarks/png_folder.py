"""Fashion-MNIST as a folder of 70,000 PNG files: train/ and val/, a folder a class.

python benchmarks/png_folder.py FOLDER [--data FOLDER_OF_GZ]

The images are those of Debian's package dataset-fashion-mnist, or downloaded by torchvision. Files that are there
already stay as they are.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from torchvision.datasets import FashionMNIST

from bench import unpack
from fashion_mnist import DEBIAN_FOLDER


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the .gz files, if there is one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        if options.data.is_dir():
            unpack(options.data, Path(cache))
        for split in ("train", "val"):
            images = FashionMNIST(cache, train=split == "train", download=True)
            for index, (image, label) in enumerate(zip(images.data.numpy(), images.targets.tolist())):
                path = options.folder / split / images.classes[label].replace("/", "-") / f"{index:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    Image.fromarray(image).save(path)


if __name__ == "__main__":
    main()
