"""A training step of the towers that people use, beside the library's own code with PEFT's LoRA.

    pytest bench/micro/test_towers.py --benchmark-only

Real sizes, random weights, of open_clip, timm and transformers; on a CPU the first blocks of each
tower alone. All train LoRA of the same rank in the same blocks of both towers on one image a class:
"lora" is that and the prompt context, "tir" also re-weights tokens, which a peer has nothing for.
SigLIP's and PE-Core's pools take each token to where it is compared, in two blocks of however many:
that weighs more on few blocks than on a whole tower. In 16 bits, all run in autocast.
``extra_info`` has the milliseconds a step. Nothing here asserts a time.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import open_clip
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from bench.micro.timed import DEVICE, measure_rounds
from tir_kernels.fewshot import Episode, Runtime, finetune_episode, methods

BLOCKS = 4 if DEVICE == "cpu" else None  # of each tower; None: all
STEPS = 4
NAMES = ["forest", "river", "highway", "pasture", "industrial site"]
RANK, ALPHA, DROPOUT = 16, 8, 0.25


def _transformers_clip() -> nn.Module:
    """The sizes of ViT-B/16; all that is not said here is the library's default."""
    config = transformers.CLIPConfig(text_config={}, vision_config={"patch_size": 16})
    return transformers.CLIPModel._from_config(config, attn_implementation="sdpa")


def _transformers_siglip2() -> nn.Module:
    """The sizes of SigLIP 2 B/16 at 224."""
    config = transformers.SiglipConfig(
        text_config={"vocab_size": 256000}, vision_config={"image_size": 224, "patch_size": 16}
    )
    return transformers.SiglipModel._from_config(config, attn_implementation="sdpa")


# Name -> its maker, for those that are not of open_clip's list.
OF_TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "transformers CLIP-B-16": _transformers_clip,
    "transformers SigLIP2-B-16": _transformers_siglip2,
}
TOWERS = (
    *("PE-Core-B-16", "ViT-B-16-SigLIP2", "ViT-L-14-336", "ViT-SO400M-14-SigLIP-384"),
    *OF_TRANSFORMERS,
)


@pytest.fixture(scope="module", params=TOWERS)
def parts(request):
    """A model, a tokenizer of its context length, and an image a class."""
    name = request.param
    with torch.device(DEVICE):
        if name in OF_TRANSFORMERS:
            model = OF_TRANSFORMERS[name]()
            text = model.config.text_config
            length, vocabulary = text.max_position_embeddings, text.vocab_size
            side = model.config.vision_config.image_size
        else:
            config = open_clip.get_model_config(name)
            model = open_clip.create_model(name, load_weights=False, device=DEVICE)
            length = config["text_cfg"]["context_length"]
            vocabulary = config["text_cfg"]["vocab_size"]
            side = config["vision_cfg"]["image_size"]
    model = model.eval().requires_grad_(False)
    _keep_first_blocks(model)
    words = open_clip.SimpleTokenizer(context_length=length)

    def tokenizer(texts: list[str]) -> Tensor:
        """Tokens that the model has; which ones makes no difference to the time."""
        return words(texts) % vocabulary

    return model, tokenizer, torch.randn(len(NAMES), 3, side, side, device=DEVICE)


def _keep_first_blocks(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name in ("blocks", "resblocks", "layers"):
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


def _measure(benchmark: Any, train: Callable[[_Clock], object]) -> None:
    """Time trainings, and a step in the last of them."""
    clocks: list[_Clock] = []

    def run() -> None:
        clocks.append(_Clock())
        train(clocks[-1])

    measure_rounds(benchmark, run, rounds=2 if DEVICE == "cpu" else 5, warmup_rounds=0)
    benchmark.extra_info["ms a step"] = clocks[-1].milliseconds()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tir", "lora"])
def test_ours(benchmark, parts, name: str, precision: str) -> None:
    model, tokenizer, images = parts
    method = methods.method_class(name)(
        steps=STEPS, lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT
    )
    labels = torch.arange(len(NAMES), device=DEVICE)
    episode = Episode(NAMES, images, labels, images[:0])
    runtime = Runtime(device=DEVICE, precision=precision)

    def train(clock: _Clock) -> None:
        finetune_episode(model, tokenizer, episode, method, runtime=runtime, on_step=clock.step)

    _measure(benchmark, train)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_library_and_peft(benchmark, parts, precision: str) -> None:
    model, tokenizer, images = parts
    adapted = _with_peft(model)
    labels = torch.arange(len(NAMES), device=DEVICE)
    token_ids = tokenizer([f"a photo of a {name}." for name in NAMES]).to(DEVICE)
    parameters = [each for each in adapted.parameters() if each.requires_grad]
    dtype = getattr(torch, precision)

    def train(clock: _Clock) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=2e-4)
        for _ in range(STEPS):
            with torch.autocast(DEVICE, dtype, enabled=precision != "float32"):
                loss = F.cross_entropy(_logits(adapted, images, token_ids), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.step()

    _measure(benchmark, train)


def _with_peft(model: nn.Module) -> Any:
    """A copy with PEFT's LoRA on the projections of all blocks."""
    ends = (".qkv", ".q_proj", ".k_proj", ".v_proj")
    places = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or name.endswith(ends)
        if "blocks." in name or "layers." in name  # not the pool's
    ]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, use_rslora=True, target_modules=places
    )
    return peft.get_peft_model(copy.deepcopy(model), config).train()


def _logits(model: Any, images: Tensor, token_ids: Tensor) -> Tensor:
    base = model.base_model.model
    if isinstance(base, transformers.PreTrainedModel):
        features = base.get_image_features(pixel_values=images).pooler_output
        classes = base.get_text_features(input_ids=token_ids).pooler_output
    else:
        features, classes = base.encode_image(images), base.encode_text(token_ids)
    return 4 * F.normalize(features, dim=-1) @ F.normalize(classes, dim=-1).T
