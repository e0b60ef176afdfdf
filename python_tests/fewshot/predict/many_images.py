"""The peak memory of predictions of many images, in a process of its own.

``python many_images.py images FOLDER COUNT...`` decodes that many small images one time after the
other, half of them from shards; ``names`` goes through a list of as many names, and once more when
all have their rows. Classes come from a stand-in. A line of JSON for each time: the bytes.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from open_clip.transform import PreprocessCfg
from PIL import Image as Pillow

from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.predict.loop import Decoded, Predictor
from tir_kernels.fewshot.predict.output import Files
from tir_kernels.fewshot.predict.rows import Columns
from tir_kernels.fewshot.predict.sources import Sources
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.settings import Runtime
from tir_kernels.towers.loading.preprocess import Preprocess

COLUMNS = Columns(("a", "b", "c"), top=2)


class StandIn:
    """In place of a classifier: logits are the means of an image's channels."""

    labels = COLUMNS.labels
    runtime = Runtime()

    def __init__(self) -> None:
        self.model = SimpleNamespace(preprocess=Preprocess(PreprocessCfg(size=32)))

    @contextmanager
    def open(self):
        yield self

    def begin(self, images):
        return lambda: images.mean((2, 3))

    def probabilities(self, logits):
        return logits.softmax(-1)


class WithoutDecoding(Predictor):
    def _decode(self, image):
        return Decoded(image.name, torch.full((3, 1, 1), 7, dtype=torch.uint8))


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def predict(kind, arguments, out):
    parts = (StandIn(), COLUMNS, Decoding(), 64, 2)
    predictor = (Predictor if kind is Predictor else WithoutDecoding)(*parts)
    listener = SimpleNamespace(classified=lambda images: None, tell=print)
    with Files(out, COLUMNS, Place("alone")).open({}) as files:
        outcome = predictor.run(Sources([str(each) for each in arguments]).share(0, 1), files,
                                listener)  # fmt: skip
    assert not outcome.unreadable, outcome
    return outcome


def images(folder: Path, count: int) -> None:
    file = io.BytesIO()
    Pillow.effect_noise((16, 16), 50).convert("RGB").save(file, "PNG")
    here = folder / str(count)
    here.mkdir()
    first = folder / "first.png"
    first.write_bytes(file.getvalue())
    for number in range(count // 2):
        os.link(first, here / f"{number:08d}.png")
    for part in range(4):
        with tarfile.open(here / f"{part}.tar", "w") as tar:
            for number in range(count // 8):
                info = tarfile.TarInfo(f"{number:08d}.png")
                info.size = len(file.getvalue())
                tar.addfile(info, io.BytesIO(file.getvalue()))
                tar.members.clear()
    found = predict(Predictor, [here, f"{here}/*.tar"], here / "p.csv")
    assert found.classified == count
    print(json.dumps(peak()), flush=True)


def names(folder: Path, count: int) -> None:
    path = folder / f"{count}.txt"
    with open(path, "w") as file:
        file.writelines(f"some/folder/of/images/{number:08d}.jpg\n" for number in range(count))
    for before in (0, count):
        found = predict(WithoutDecoding, [path], folder / f"{count}.csv")
        assert (found.classified, found.known) == (count - before, before)
        print(json.dumps(peak()), flush=True)


if __name__ == "__main__":
    for each in sys.argv[3:]:
        globals()[sys.argv[1]](Path(sys.argv[2]), int(each))
