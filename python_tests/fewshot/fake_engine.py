"""A stand-in for model and training, so that the driver can be tested in milliseconds.

Run as a program it is ``tir-finetune`` with both in place, for tests that kill it.
"""

import contextlib
import functools
import os
import signal
import sys
import time
import uuid
from unittest import mock

import torch
from open_clip.transform import PreprocessCfg
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.episode import episode_seed
from tir_kernels.fewshot.train.batch import EpisodeResult, NonFiniteLossError
from tir_kernels.towers.loading.loaded import LoadedModel
from tir_kernels.towers.loading.preprocess import Preprocess


def fake_finetune(episode, method, seed, on_step):
    """Nearest centroid on mean colours, plus noise that belongs to the seed and the method."""
    losses = []
    for step in range(method.steps):
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0")))
        losses.append(1 / (step + 1))
        on_step(step, losses[-1])
    if method.name == "lora" and os.environ.get("FAKE_NAN") in episode.class_names:
        raise NonFiniteLossError(method.steps, [*losses, float("nan")])
    features = episode.support_images.mean((2, 3))
    num_classes = len(episode.class_names)
    centroids = torch.stack(
        [features[episode.support_labels == label].mean(0) for label in range(num_classes)]
    )
    noise = torch.randn(
        len(episode.query_images),
        num_classes,
        generator=torch.Generator().manual_seed(seed + len(method.name)),
    )
    logits = -torch.cdist(episode.query_images[:].mean((2, 3)), centroids) + 0.1 * noise
    return EpisodeResult(losses=losses, query_logits=logits, support_accuracy=1.0)


def at_once(finetune=None):
    """``loop.finetune`` by a stand-in for one episode, one after the other."""

    def finetune_together(job, episodes, on_step):
        method = job.method
        results = []
        for observer in job.observers:
            observer.start(episodes)
            observer.observe(0, None, torch.empty(len(episodes), 0, 0))  # features: no tower
        for position, episode in enumerate(episodes):
            own_seed = episode_seed(job.seed, episode.index)
            try:
                note_step = functools.partial(on_step, position)
                results.append((finetune or fake_finetune)(episode, method, own_seed, note_step))
            except NonFiniteLossError as error:
                results.append(error)
        return results

    return finetune_together


# To 8 x 8 pixels, and from them to numbers in [0, 1].
small_preprocess = Preprocess(
    PreprocessCfg(size=8, mean=(0, 0, 0), std=(1, 1, 1), resize_mode="squash")
)


def fake_model(name="fake", pretrained=None, *, device="cpu"):
    return LoadedModel(torch.nn.Identity(), small_preprocess, fake_tokenizer, name, name)


def fake_tokenizer(texts, context_length=80):
    """The first characters of each text, without regard to case."""
    texts = [text.lower()[:context_length].ljust(context_length) for text in texts]
    return torch.tensor([[ord(char) for char in text] for text in texts])


def run_main(arguments, *, draws_page=False):
    """``tir-finetune`` on the stand-ins, without the second that a page takes."""
    with contextlib.ExitStack() as stack:
        for name, stand_in in {
            "tir_kernels.towers.loading.models.load_model": fake_model,
            "tir_kernels.fewshot.train.loop.finetune": at_once(),
            "tir_kernels.fewshot.train.loop.require_parts": no_check,
            **({} if draws_page else {"tir_kernels.fewshot.command.show_page": no_page}),
        }.items():
            stack.enter_context(mock.patch(name, stand_in))
        return main(arguments)


def no_check(model, tokenizer, method, class_names, shots, runtime):
    """In place of ``require_parts``, since the stand-in has no towers."""


def no_page(folders, out):
    """In place of ``show_page``."""


def run_shared(arguments, *, processes=3, restarts=0, before=lambda: None):
    """What ``torchrun`` does, with workers that are forks of this process and so start at once.

    Args:
        arguments: Of ``tir-finetune``, which runs on the stand-ins.
        processes: How many share the run.
        restarts: How often all are started again when one fails.
        before: Called in each worker before it begins.

    Raises:
        ChildFailedError: A worker failed, and no restarts are left.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.05,
        start_method="fork",
    )

    def worker():
        # Unlike a fork, a new process has no handlers but Python's.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        before()
        sys.exit(run_main(arguments))

    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        elastic_launch(config, worker)()
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(run_main(sys.argv[1:]))
