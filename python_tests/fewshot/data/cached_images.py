"""Readers of one cache, which count what they decode."""

import os
import time

import torch
from open_clip.transform import PreprocessCfg

from tir_kernels.fewshot.data.cache import ImageCache
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.towers.loading.preprocess import Preprocess


class Counting(Preprocess):
    """Counts what is decoded, and takes its time if told to."""

    def __init__(self, config=None, seconds=0.0):
        super().__init__(config or PreprocessCfg(size=8))
        self.decoded = 0
        self.seconds = seconds

    def to_pixels(self, image):
        self.decoded += 1
        time.sleep(self.seconds)
        return super().to_pixels(image)


class Setting:
    """Images, and readers that share a cache as processes do."""

    def __init__(self, root, folder):
        self.root, self.folder = root, folder
        self.notices = []

    def reader(self, preprocess=None, **options):
        data = load_data(self.root)
        preprocess = preprocess or Counting()
        cache = ImageCache(self.folder, preprocess.shape, notify=self.notices.append)
        return Reading(data, ImageReader(data, preprocess, cache=cache, **options), preprocess)

    def without_cache(self):
        data, preprocess = load_data(self.root), Counting()
        return Reading(data, ImageReader(data, preprocess), preprocess)

    @property
    def own_folder(self):
        """Where the cache has the files of this user."""
        return self.folder / f"user-{os.geteuid()}"

    @property
    def files(self):
        return sorted(self.own_folder.iterdir()) if self.own_folder.exists() else []


class Reading:
    def __init__(self, data, images, preprocess):
        self.data, self.images, self.preprocess = data, images, preprocess

    def __call__(self, position, class_number=0):
        return self.images.read(self.data.classes[class_number], position)

    def all(self):
        entry = self.data.classes[0]
        return torch.stack(self.images.read_many([(entry, n) for n in range(len(entry.files))]))


def command(root, out, *options):
    """The command line of a small run on the stand-in."""
    arguments = ["run", "--data", str(root), "--model", "fake", "--method", "lora", "--steps=1"]
    arguments += ["--ways=3", "--shots=2", "--queries=2", "--episodes=2", "--backend=reference"]
    return [*arguments, "--out", str(out), *options]
