"""Train the demonstration's CLIP: `python -m tir_kernels.demo.train --out DIR`.

A small open_clip model learns the source domain of `drawings` by the usual contrastive loss. Every
batch is drawn afresh, so no image is seen twice. The result is a folder that open_clip loads as
`local-dir:DIR`.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from tir_kernels.demo.drawings import IMAGE_SIZE, SourceDrawing, draw_source
from tir_kernels.towers.loading.new_models import (
    contrastive_loss,
    new_model,
    read_model,
    write_model,
)

# The text tower is narrow because its table of 49408 word pieces is half of the file as it is.
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "layers": 6,
        "width": 128,
        "head_width": 64,
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 32,
        "heads": 1,
        "layers": 4,
    },
}
PREPROCESS_CONFIG: dict[str, Any] = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
EVALUATION_GROUPS = 8
CAPTIONS = 128  # to choose from in the evaluation
HELD_OUT_STREAM = 1


def as_images(drawings: list[SourceDrawing]) -> Tensor:
    """Stack drawings into (B, 3, 64, 64) float32, normalised as PREPROCESS_CONFIG says."""
    pixels = torch.from_numpy(np.stack([drawing.pixels for drawing in drawings]))
    images = pixels.permute(0, 3, 1, 2).float() / 255
    mean, std = (
        torch.tensor(PREPROCESS_CONFIG[key], dtype=torch.float32, device="cpu").view(3, 1, 1)
        for key in ("mean", "std")
    )
    return (images - mean) / std


def save_model(model: torch.nn.Module, folder: Path) -> None:
    """Write config and float16 weights under the names open_clip's `local-dir:` looks for."""
    write_model(model, {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}, folder)


@torch.no_grad()
def source_accuracy(folder: Path, *, groups: int, seed: int = 0) -> float:
    """Share, 0..1, of held-out drawings whose own caption the saved model picks out of 128.

    Drawings come in `groups` of 128; chance is one in 128.
    """
    model, tokenizer = read_model(folder)
    correct = 0
    for group in range(groups):
        drawings = [
            draw_source(group * CAPTIONS + position, seed=seed, stream=HELD_OUT_STREAM)
            for position in range(CAPTIONS)
        ]
        captions = model.encode_text(tokenizer([d.caption for d in drawings]), normalize=True)
        guesses = (model.encode_image(as_images(drawings)) @ captions.T).argmax(dim=1)
        correct += int((guesses == torch.arange(CAPTIONS, device=guesses.device)).sum())
    return correct / (groups * CAPTIONS)


def train(out: Path, *, steps: int, seed: int = 0) -> None:
    """Train for `steps` batches and save the model to the folder `out`.

    The same seed, number of threads and torch version give the same weights on one machine.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    torch.manual_seed(seed)
    model, tokenizer = new_model(MODEL_CONFIG)
    # Decay is for matrices; norms, biases and the temperature are better left alone.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    contrastive = contrastive_loss()
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        for step in range(steps):
            drawings = [
                draw_source(step * BATCH_SIZE + position, seed=seed)
                for position in range(BATCH_SIZE)
            ]
            image_features = model.encode_image(as_images(drawings), normalize=True)
            tokens = tokenizer([drawing.caption for drawing in drawings])
            text_features = model.encode_text(tokens, normalize=True)
            loss = contrastive(image_features, text_features, model.logit_scale.exp())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            progress.update(task, advance=1, loss=loss.item())
            if not progress.console.is_terminal and (step + 1) % 100 == 0:  # a log has no bar
                progress.console.print(f"step {step + 1} of {steps}, loss {loss.item():.3f}")
    save_model(model, out)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, and print the time taken and the held-out accuracy."""
    parser = argparse.ArgumentParser(prog="python -m tir_kernels.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for config and weights")
    parser.add_argument("--steps", type=int, default=1200, help="batches of 128 (default 1200)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and drawings (default 0)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    train(options.out, steps=options.steps, seed=options.seed)
    print(f"trained {options.steps} steps in {time.perf_counter() - start:.0f} s")
    accuracy = source_accuracy(options.out, groups=EVALUATION_GROUPS, seed=options.seed)
    print(f"held-out source drawings whose caption is picked out of {CAPTIONS}: {accuracy:.1%}")


if __name__ == "__main__":
    main()
