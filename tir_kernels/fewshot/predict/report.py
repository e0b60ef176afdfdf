"""The page of a finished prediction: a sample of its images, read and classified once more."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from heapq import heappush, heappushpop
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tir_kernels.adapters import Reweighting
from tir_kernels.adapters.handle import handles_on
from tir_kernels.analysis.page.predictions import Predicted, Seen, Share, write_predictions_page
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.predict.items import Image, Shard
from tir_kernels.fewshot.predict.loop import Predictor
from tir_kernels.fewshot.predict.output import Files
from tir_kernels.fewshot.predict.rows import written
from tir_kernels.fewshot.predict.sources import Sources
from tir_kernels.fewshot.track.pictures import MapMaker

_SHOWN = 8  # images that are most sure, and as many that are least
_CLASSES = 3


def write_report(
    path: Path, predictor: Predictor, files: Files, sources: Sources, title: str
) -> None:
    """Write the page.

    Args:
        path: HTML file.
        predictor: The classifier with its settings.
        files: The predictions.
        sources: Their images.
        title: Title of the page.

    Raises:
        FewShotError: It can't be written.
    """
    shares, most, least = _summed(files)
    wanted = {*most, *least}
    images = {
        written(each.name, is_exact=files.is_parquet): each.pixels
        for each in predictor.decoded(_chosen(sources, wanted, files.is_parquet))
        if each.pixels is not None
    }
    shown = _predicted(predictor.classifier, images) if images else {}
    write_predictions_page(
        path,
        title,
        shares,
        [shown[name] for name in most if name in shown],
        [shown[name] for name in least if name in shown],
    )


def _summed(files: Files) -> tuple[list[Share], list[str], list[str]]:
    """The classes, and the images that are most and least sure, in one pass over all rows."""
    counts: Counter[str] = Counter()
    sums: defaultdict[str, float] = defaultdict(float)
    most: list[tuple[float, int, str]] = []
    least: list[tuple[float, int, str]] = []
    for number, (name, label, probability, *_) in enumerate(files.read()):
        value = float(probability)
        counts[label] += 1
        sums[label] += value
        for kept, key in ((most, value), (least, -value)):
            entry = (key, -number, name)
            if len(kept) < _SHOWN:
                heappush(kept, entry)
            else:
                heappushpop(kept, entry)
    shares = [Share(label, count, sums[label] / count) for label, count in counts.most_common()]
    names = [[name for _, _, name in sorted(kept, reverse=True)] for kept in (most, least)]
    return shares, names[0], [name for name in names[1] if name not in names[0]]


def _chosen(sources: Sources, wanted: set[str], is_exact: bool) -> Iterator[Image]:
    """The images of these names; a shard that has none of them is not opened."""
    left = set(wanted)
    for unit in sources:
        if not left:
            return
        name = written(unit.name, is_exact=is_exact)
        if isinstance(unit, Shard):
            if not any(each.startswith(f"{name}/") for each in left):
                continue
            units = unit.images()
        else:
            units = iter((unit,))
        for each in units:
            name = written(each.name, is_exact=is_exact)
            if name in left:
                left.discard(name)
                yield each


def _predicted(classifier: Classifier, images: dict[str, Tensor]) -> dict[str, Predicted]:
    pixels = torch.stack(list(images.values()))
    inputs = classifier.model.preprocess.normalise(pixels)
    with classifier.open() as scorer:
        probabilities = classifier.probabilities(scorer.logits(inputs))
    order = probabilities.argsort(dim=1, descending=True, stable=True)[:, :_CLASSES]
    seen = _seen(classifier, inputs, order[:, 0])
    photos = pixels.permute(0, 2, 3, 1).numpy()
    return {
        name: Predicted(
            name,
            photos[n],
            [(classifier.labels[at], float(probabilities[n, at])) for at in order[n].tolist()],
            seen[n],
        )
        for n, name in enumerate(images)
    }


@torch.no_grad()
def _seen(classifier: Classifier, inputs: Tensor, labels: Tensor) -> Sequence[Seen | None]:
    """The maps of images, if the classifier re-weights."""
    with classifier.learner() as learner:
        model = classifier.model.model
        if not handles_on(model, Reweighting):
            return [None] * len(inputs)
        maker = MapMaker(model, classifier.about.method, _no_pixels)
        on_device = inputs.to(classifier.runtime.device)
        shown = Episode(list(classifier.about.words), on_device, labels, on_device[:0])
        maker.start([shown])
        maker.observe(0, learner, learner.inputs(on_device[None]))
        maps = maker.maps(shown, classifier.about.method.name)
    if maps is None:
        return [None] * len(inputs)
    return [
        Seen(
            maps.grid,
            maps.relevance[n, label].astype(np.float32),
            maps.counts[n].astype(np.float32),
            len(maps.class_names),
        )
        for n, label in enumerate(labels.tolist())
    ]


def _no_pixels(images: Tensor) -> np.ndarray:
    """In place of photographs, which are there already."""
    return np.empty(0, np.uint8)
