"""Train the demonstration's CLIP: `python -m tir_kernels.demo.train --out DIR`.

A small open_clip model learns the source domain of `drawings` from captions. Every batch is drawn
afresh, so no image is seen twice. A run that was stopped goes on from its checkpoint when the same
command is given, to the same bits. The result is a folder that open_clip loads as `local-dir:DIR`.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tir_kernels.demo.drawings import IMAGE_SIZE, draw_source
from tir_kernels.demo.muon import Muon
from tir_kernels.demo.objective import Heads, losses, make_batch
from tir_kernels.demo.probes import PIXEL_DEVIATION, PIXEL_MEAN, Reached, everything
from tir_kernels.towers.loading.new_models import new_model, read_model, write_model

# The text tower is narrow because its table of 49408 word pieces is over half of the file as it is.
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "layers": 6,
        "width": 128,
        "head_width": 32,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 48,
        "heads": 3,
        "layers": 3,
    },
}
PREPROCESS_CONFIG: dict[str, Any] = {
    "mean": [PIXEL_MEAN] * 3,
    "std": [PIXEL_DEVIATION] * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
BATCH_SIZE = 64
LEARNING_RATE = 1.5e-3  # of AdamW
MATRIX_LEARNING_RATE = 4e-3  # of Muon
WARMUP_STEPS = 100
WINDOW_STEPS = 500  # with a part of each image only, at a quarter of the cost
DECAY = 0.3  # the last part of all steps, in which the learning rate falls to 0
STEERING_STREAM = 2  # of drawings for a look at the progress; the held-out ones are for the end
SAVED_EVERY = 25
LOOKED_EVERY = 250


def rate(step: int, steps: int) -> float:
    """Share of the learning rate in a step: a rise, a plateau, a fall.

    Where the fall begins is all that the number of steps decides, so a run can be prolonged from
    any checkpoint before it, with the same result as if that had been meant from the start.
    """
    fall = max(1.0, DECAY * steps)
    return min((step + 1) / WARMUP_STEPS, 1.0, (steps - step) / fall)


class Training:
    """A model in training, and what is needed to go on with it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed, self.step = seed, 0
        self.model, self.tokenizer = new_model(MODEL_CONFIG)
        self.heads = Heads(MODEL_CONFIG["vision_cfg"]["width"])
        towers = (self.model.visual.transformer, self.model.transformer)
        matrices = [p for tower in towers for p in tower.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        others = [*self.model.parameters(), *self.heads.parameters()]
        others = [p for p in others if id(p) not in inside]
        # Decay is for matrices; norms, biases and the temperature are better left alone.
        decay = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizers = {
            Muon(matrices): MATRIX_LEARNING_RATE,
            torch.optim.AdamW(decay, betas=(0.9, 0.98)): LEARNING_RATE,
        }

    def take_step(self, steps: int) -> dict[str, float]:
        """One step of `steps`; returns the parts of the loss."""
        rng = np.random.default_rng([self.seed, self.step])
        first = self.step * BATCH_SIZE
        drawings = [draw_source(first + place, seed=self.seed) for place in range(BATCH_SIZE)]
        batch = make_batch(drawings, rng, self.tokenizer)
        parts = losses(self.model, self.heads, batch, windows=self.step < WINDOW_STEPS)
        torch.stack(list(parts.values())).sum().backward()
        for optimizer, learning_rate in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate(self.step, steps)
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))
        self.step += 1
        return {name: part.item() for name, part in parts.items()}

    def save(self, path: Path, steps: int) -> None:
        """Write a checkpoint, whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "seed": self.seed,
            "step": self.step,
            "steps": steps,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path, steps: int) -> None:
        """Go on from a checkpoint of the same seed, and of a run that took the same steps so far.

        Raises:
            ValueError: `seed` or `steps` says that it belongs to another run.
        """
        state = torch.load(path, weights_only=True)
        if state["seed"] != self.seed:
            raise ValueError(f"seed must be {state['seed']}, which {path} was trained with")
        same = [rate(step, steps) == rate(step, state["steps"]) for step in range(state["step"])]
        if state["step"] > steps or not all(same):
            raise ValueError(f"steps must be {state['steps']}, which {path} was trained for")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)


def in_words(reached: dict[str, Reached]) -> str:
    """Accuracies in one line."""
    return ", ".join(f"{name} {each.accuracy:.0%}" for name, each in reached.items())


def train(out: Path, *, steps: int, seed: int = 0, checkpoint: Path | None = None) -> None:
    """Train for `steps` batches and save the model to the folder `out`.

    The same seed, number of threads and torch version give the same weights on one machine.

    Args:
        out: Folder of the model.
        steps: At least 1.
        seed: Of weights, drawings and captions.
        checkpoint: File to go on from if it exists, and to keep up to date.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    training = Training(seed)
    if checkpoint is not None and checkpoint.exists():
        training.load(checkpoint, steps)
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}")) as progress:
        task = progress.add_task("training", total=steps, completed=training.step, loss="")
        while training.step < steps:
            parts = training.take_step(steps)
            loss = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
            progress.update(task, completed=training.step, loss=loss)
            if checkpoint is not None and training.step % SAVED_EVERY == 0:
                training.save(checkpoint, steps)
            if not progress.console.is_terminal and training.step % SAVED_EVERY == 0:
                progress.console.print(f"step {training.step} of {steps}: {loss}", soft_wrap=True)
            if training.step % LOOKED_EVERY == 0:
                reached = everything(
                    training.model, training.tokenizer, count=256, stream=STEERING_STREAM
                )
                training.model.train()
                progress.console.print(f"step {training.step}: {in_words(reached)}", soft_wrap=True)
    configuration = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}
    write_model(training.model, configuration, out)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, and print the time taken and what the model knows."""
    parser = argparse.ArgumentParser(prog="python -m tir_kernels.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for config and weights")
    parser.add_argument("--steps", type=int, default=1000, help="batches of 64 (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and drawings (default 0)")
    parser.add_argument(
        "--checkpoint", type=Path, help="file to go on from; by default OUT.checkpoint"
    )
    parser.add_argument("--drawings", type=int, default=2048, help="of each held-out measurement")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU (default 1); others give other bits"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    checkpoint = options.checkpoint or options.out.with_name(options.out.name + ".checkpoint")
    start = time.perf_counter()
    train(options.out, steps=options.steps, seed=options.seed, checkpoint=checkpoint)
    print(f"trained to step {options.steps} in {time.perf_counter() - start:.0f} s")
    for name, reached in everything(*read_model(options.out), count=options.drawings).items():
        print(f"{name}: {reached.accuracy:.1%} of {reached.asked} (chance {reached.chance:.1%})")


if __name__ == "__main__":
    main()
