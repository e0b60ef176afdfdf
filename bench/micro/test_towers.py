"""A training step of the towers that people use, beside the library's own code with PEFT's LoRA.

    pytest bench/micro/test_towers.py --benchmark-only

Real sizes, random weights; on a CPU the first blocks of each tower alone. Both train LoRA of the
same rank in the same blocks of both towers on one image a class; ours also the prompt context, and
re-weights tokens. ``extra_info`` has the milliseconds a step. Nothing here asserts a time.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from typing import Any

import open_clip
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.micro.timed import DEVICE, measure_rounds
from tir_kernels.fewshot import Episode, Runtime, finetune_episode, methods

TOWERS = ("PE-Core-B-16", "ViT-B-16-SigLIP2", "ViT-L-14-336", "ViT-SO400M-14-SigLIP-384")
BLOCKS = 4 if DEVICE == "cpu" else None  # of each tower; None: all
STEPS = 4
NAMES = ["forest", "river", "highway", "pasture", "industrial site"]
RANK, ALPHA, DROPOUT = 16, 8, 0.25


@pytest.fixture(scope="module", params=TOWERS)
def parts(request):
    """A model, a tokenizer of its context length, and an image a class."""
    name = request.param
    config = open_clip.get_model_config(name)
    with torch.device(DEVICE):
        model = open_clip.create_model(name, load_weights=False, device=DEVICE)
    model = model.eval().requires_grad_(False)
    _keep_first_blocks(model)
    words = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])

    def tokenizer(texts: list[str]) -> Tensor:
        """Tokens that the model has; which ones makes no difference to the time."""
        return words(texts) % config["text_cfg"]["vocab_size"]

    side = config["vision_cfg"]["image_size"]
    return model, tokenizer, torch.randn(len(NAMES), 3, side, side, device=DEVICE)


def _keep_first_blocks(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name in ("blocks", "resblocks"):
            if isinstance(getattr(module, name, None), (nn.ModuleList, nn.Sequential)):
                setattr(module, name, getattr(module, name)[:BLOCKS])


class _Clock:
    """When each step was over."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, *progress: object) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def milliseconds(self) -> float:
        return 1e3 * statistics.median(end - begin for begin, end in itertools.pairwise(self.ends))


def test_ours(benchmark, parts) -> None:
    model, tokenizer, images = parts
    method = methods.method_class("tir")(
        steps=STEPS, lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT
    )
    labels = torch.arange(len(NAMES), device=DEVICE)
    episode = Episode(NAMES, images, labels, images[:0])

    def train() -> _Clock:
        clock, runtime = _Clock(), Runtime(device=DEVICE)
        finetune_episode(model, tokenizer, episode, method, runtime=runtime, on_step=clock.step)
        return clock

    measure_rounds(benchmark, train, rounds=1 if DEVICE == "cpu" else 5, warmup_rounds=0)
    benchmark.extra_info["ms a step"] = train().milliseconds()


def test_library_and_peft(benchmark, parts) -> None:
    model, tokenizer, images = parts
    adapted = _with_peft(model)
    labels = torch.arange(len(NAMES), device=DEVICE)
    token_ids = tokenizer([f"a photo of a {name}." for name in NAMES]).to(DEVICE)
    parameters = [each for each in adapted.parameters() if each.requires_grad]

    def train() -> _Clock:
        clock, optimizer = _Clock(), torch.optim.AdamW(parameters, lr=2e-4)
        for _ in range(STEPS):
            loss = F.cross_entropy(_logits(adapted, images, token_ids), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.step()
        return clock

    measure_rounds(benchmark, train, rounds=1 if DEVICE == "cpu" else 5, warmup_rounds=0)
    benchmark.extra_info["ms a step"] = train().milliseconds()


def _with_peft(model: nn.Module) -> Any:
    places = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or name.endswith(".qkv")
    ]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, use_rslora=True, target_modules=places
    )
    return peft.get_peft_model(copy.deepcopy(model), config).train()


def _logits(model: Any, images: Tensor, token_ids: Tensor) -> Tensor:
    base = model.base_model.model
    features, classes = base.encode_image(images), base.encode_text(token_ids)
    return 4 * F.normalize(features, dim=-1) @ F.normalize(classes, dim=-1).T
