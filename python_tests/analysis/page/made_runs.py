"""Folders of runs as a tracked training leaves them, with numbers that were made up."""

import json
import math
import random
import re

import numpy as np

from tir_kernels.fewshot.run.maps import Maps, write_maps
from tir_kernels.fewshot.run.records import Record
from tir_kernels.fewshot.run.tracked import Series, Track

NASTY = [
    "<script>alert(1)</script>",
    '"quoted" & <b>bold</b>',
    "=cmd|' /C calc'!A0",
    "$x_1$ \\ {curly} #1 50% ~ ^",
    "café 森 \u202egnp.exe",
]
ARMS = {"zero-shot": "zero-shot", "lora": "lora", "tir": "tir"}
STEPS = [0, 10, 20, 30]
BLOCKS = 4


def write_run(
    folder,
    *,
    arms=None,
    classes=NASTY,
    episodes=3,
    shots=1,
    data="made/eurosat",
    is_tracked=True,
    finished=None,
    correct=None,
    options=None,
    others=None,
):
    """A run's folder.

    Arms are name -> method, finished is arm -> its episodes with a result, correct is arm -> the
    right answers of 75 in each episode, options is arm -> its options, others are settings.
    """
    arms = ARMS if arms is None else arms
    finished = {} if finished is None else finished
    correct = {} if correct is None else correct
    options = {} if options is None else options
    folder.mkdir(parents=True)
    settings = {
        "ways": len(classes),
        "shots": shots,
        "queries": 15,
        "seed": 0,
        "arms": {
            arm: {"method": method, "steps": 30, **options.get(arm, {})}
            for arm, method in arms.items()
        },
        **({} if others is None else others),
    }
    about = {"data": data, "model": "ViT-S-32"}
    content = {"episodes": episodes, "settings": settings, "about": about}
    (folder / "settings.json").write_text(json.dumps(content))
    records, tracks = [], []
    for episode in range(episodes):
        for number, arm in enumerate(arms):
            if episode not in finished.get(arm, range(episodes)):
                continue
            hits = min(75, 25 + 7 * number + (5 * episode * (number + 1)) % 9)
            hits = correct[arm][episode] if arm in correct else hits
            records.append(_record(episode, arm, classes, hits).to_line())
            if is_tracked:
                tracks.append(_track(episode, arm, number, arms[arm], len(classes)).to_line())
                write_maps(folder, number, _maps(episode, arm, number, classes))
    (folder / "episodes.jsonl").write_bytes(b"".join(records))
    if is_tracked:
        (folder / "tracked.jsonl").write_bytes(b"".join(tracks))
    return folder


def _record(episode, arm, classes, correct):
    return Record(
        episode=episode,
        arm=arm,
        classes=tuple(classes),
        correct=correct,
        total=75,
        accuracy=correct / 75,
        final_loss=0.5,
        seconds=1.0,
        status="ok",
    )


def _track(episode, arm, number, method, num_classes):
    steps = [0] if method == "zero-shot" else STEPS
    noise = random.Random(100 * episode + number)
    names = [
        ("sink-ratio", "sink ratio of patches, ε = 10/L", 0.1),
        ("sink-ratio", "sink ratio of class token, ε = 10/L", 1.0),
        ("received-mass", "mass of top 1 patch", 1 / 16),
        ("attention-entropy", "entropy of patches", 1.0),
        ("norm-outliers", "share of patches with norm above median + 6 MAD", 0.0),
        ("relevance-by-count", "closest class of first simple patches", 0.2),
        ("relevance-by-count", "closest class of first hard patches", 0.2),
        ("my-own", "<i>measure</i> of one's own", None),
        *(
            ("norms-by-count", f"norm at first count {count}", 11.0)
            for count in range(num_classes + 1)
        ),
    ]
    series = []
    for place, (measure, name, chance) in enumerate(names):
        is_missing = measure == "norm-outliers"
        values = [
            [
                None
                if is_missing
                else (chance or 0.5)
                * (1 + 0.1 * block + math.log1p(step) * (3 - number) / 20 + noise.gauss(0, 0.03))
                + place % 3 / 10
                for block in range(BLOCKS)
            ]
            for step in steps
        ]
        series.append(Series(measure, name, list(range(BLOCKS)), [[chance] * BLOCKS], values))
    return Track(episode, arm, steps, series)


def _maps(episode, arm, number, classes, side=32):
    make = np.random.default_rng(10 * episode)  # all arms see the same images
    count, grid = len(classes), (4, 4)
    rows, columns = np.mgrid[0:side, 0:side] / side
    colours = make.uniform(60, 255, (count, 1, 1, 3))
    images = colours * (0.4 + 0.6 * np.sin(6 * rows + 4 * columns) ** 2)[None, :, :, None]
    tokens = make.normal(size=(BLOCKS, count, 8))
    relevance = make.uniform(-0.1, 0.3, (count, count, 16))
    received = make.dirichlet(np.ones(16), count)
    own = np.random.default_rng(10 * episode + number + 1)
    return Maps(
        episode=episode,
        arm=arm,
        class_names=list(classes),
        labels=np.arange(count),
        images=images.astype(np.uint8),
        grid=grid,
        relevance=(relevance + own.normal(0, 0.03, relevance.shape)).astype(np.float16),
        counts=own.integers(0, count + 1, (count, 16)).astype(np.uint8),
        weights=np.ones((count, 16), np.float16),
        received_before=received.astype(np.float16),
        received_after=own.dirichlet(np.ones(16), count).astype(np.float16),
        tokens_before=tokens.astype(np.float16),
        tokens_after=(tokens + own.normal(0, 0.2, tokens.shape)).astype(np.float16),
    )


def text_of(path):
    return path.read_text(encoding="utf-8")


def sections(source):
    """Headings of a page's sections."""
    return re.findall(r"<summary><h[23]>(.*?)</h[23]></summary>", source)
