"""Draws docs/reweighting.png: which patch tokens the classes of the demo pick, and their weights.

Run from the root of the repository: ``python docs/reweighting.py``; needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from tir_kernels import JointSpace, WeightRule, token_relevance, token_weights
from tir_kernels.demo import model_directory, tissue
from tir_kernels.towers.loading.models import load_model

CLASSES = {name: tissue.CLASSES[name][0] for name in ("ADI", "GLA", "LYM", "MUS", "TUM")}
SHOWN = ("GLA", "ADI", "LYM")
BLOCK = 2  # depth - 4, the first that is re-weighted


@torch.no_grad()
def main() -> None:
    loaded = load_model(str(model_directory()))
    model, visual = loaded.model, loaded.model.visual
    drawings = [tissue.draw_tissue(name, index=7) for name in SHOWN]
    images = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in drawings])
    tokens = visual._embeds(loaded.preprocess.normalise(images))
    for block in visual.transformer.resblocks[:BLOCK]:
        tokens = block(tokens)
    prompts = loaded.tokenizer([f"a photo of a {words}." for words in CLASSES.values()])
    classes = model.encode_text(prompts)
    norm = visual.ln_post
    space = JointSpace(norm.weight, norm.bias, norm.eps, visual.proj)
    relevance = token_relevance(tokens, classes, joint_space=space)
    weights, counts = token_weights(tokens, classes, joint_space=space, rule=WeightRule())

    side = int(counts.shape[1] ** 0.5)
    columns = [
        ("image", None),
        *((f"relevance to\n“{CLASSES[name]}”", "relevance") for name in SHOWN[:2]),
        ("classes that pick\nthe token", "counts"),
        ("its weight", "weights"),
    ]
    figure, axes = plt.subplots(
        len(SHOWN), len(columns), figsize=(8.4, 5.2), layout="constrained", squeeze=False
    )
    order = list(CLASSES)
    for row, drawing in enumerate(drawings):
        axes[row, 0].imshow(drawing)
        for column, name in enumerate(SHOWN[:2], start=1):
            shown = relevance[row, order.index(name)].reshape(side, side)
            axes[row, column].imshow(shown, cmap="viridis")
        counted = counts[row].reshape(side, side)
        weighed = weights[row, 1:].reshape(side, side)
        last = [
            axes[row, 3].imshow(counted, cmap="magma", vmin=0, vmax=len(CLASSES)),
            axes[row, 4].imshow(weighed, cmap="RdBu_r", vmin=0.0, vmax=2.0),
        ]
    for axis, (title, _) in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for column, shown in zip((3, 4), last, strict=True):
        figure.colorbar(shown, ax=axes[:, column], location="bottom", shrink=0.9)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
