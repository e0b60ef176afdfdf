"""Image folders that are drawn in milliseconds."""

import numpy as np
from PIL import Image


def write_images(root, sizes, *, pixels=24, seed=0):
    """Write ``sizes[folder]`` noisy images per folder, each folder around a colour of its own."""
    random = np.random.default_rng(seed)
    for folder, count in sizes.items():
        (root / folder).mkdir(parents=True)
        color = random.uniform(40, 215, size=3)
        for number in range(count):
            noisy = color + random.normal(0, 40, size=(pixels, pixels, 3))
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            image.save(root / folder / f"{number:03d}.png")
    return root
