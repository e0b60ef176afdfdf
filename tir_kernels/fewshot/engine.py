"""Fine-tune a CLIP model on one few-shot episode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels import WeightRule, clip

from .config import FewShotConfig

QUERY_BATCH = 64
LORA_WEIGHT_DECAY = 0.01
CONTEXT_MOMENTUM = 0.9
CONTEXT_WEIGHT_DECAY = 5e-4


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite.

    Attributes:
        step: The step, counted from 0, whose loss it was.
        losses: The losses of all steps up to and with that one.
    """

    def __init__(self, step: int, losses: list[float]) -> None:
        super().__init__(
            f"the loss became {losses[-1]} at step {step + 1}: lower lora_lr or context_lr, or use "
            "precision='float32'"
        )
        self.step = step
        self.losses = losses


@dataclass(frozen=True)
class EpisodeResult:
    """What fine-tuning on an episode gave; all tensors are float32 on the CPU.

    Attributes:
        losses: One per step, each before that step's update; empty for "zero-shot".
        query_logits: (Q, C) ``logit_scale`` times cosine, in evaluation mode.
        support_accuracy: Share of the support images classified rightly at the end, in [0, 1].
        context: (context_tokens, W) trained prompt context; ``None`` for "zero-shot".
        lora: ``"{visual|text}.{layer}.{q|k|v}"`` -> A (rank, width), B (width, rank).
    """

    losses: list[float]
    query_logits: Tensor
    support_accuracy: float
    context: Tensor | None = None
    lora: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def finetune_episode(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    support_images: Tensor,
    support_labels: Tensor,
    query_images: Tensor,
    config: FewShotConfig,
    *,
    lora_init: Mapping[str, Tensor] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> EpisodeResult:
    """Train LoRA and a prompt context on the support images, then classify the query images.

    The protocol is that of few-shot fine-tuning with dynamic token re-weighting (arXiv
    2605.25799): full-batch steps of cross entropy over ``logit_scale`` times cosine, AdamW for LoRA
    on query, key and value of both towers, SGD for the context. With method "tir", the class
    embeddings of text block ``text_layer`` decide which patch tokens are turned up or down.

    Args:
        model: An open_clip model on ``config.device``. It is frozen meanwhile and left as it was,
            also when training fails or is interrupted.
        tokenizer: Its tokenizer: list of strings -> (C, T) token ids.
        class_names: C names, in words.
        support_images: (S, 3, H, W) float32, normalised for the model.
        support_labels: (S,) integers in 0..C - 1.
        query_images: (Q, 3, H, W); Q may be 0.
        config: Settings.
        lora_init: ``"{visual|text}.{layer}.{q|k|v}"`` -> A (rank, width) to start from.
        on_step: Called with the step, from 0, and its loss after each step.

    Returns:
        The losses, the logits of the query images and what was trained.

    Raises:
        ValueError, TypeError: Unsuitable images, labels, names or model.
        NonFiniteLossError: The loss became NaN or infinite.
    """
    device = torch.device(config.device)
    _check_episode(class_names, support_images, support_labels, query_images)
    support_images, query_images = support_images.to(device), query_images.to(device)
    support_labels = support_labels.to(device).long()
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        cuda_devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda_devices))
        torch.manual_seed(config.seed)
        stack.enter_context(_precision(config, device))
        episode = _Episode(model, tokenizer, class_names, config, stack, lora_init)
        losses = []
        if config.method != "zero-shot":
            losses = episode.train(support_images, support_labels, on_step)
        support_logits, query_logits = episode.classify(support_images, query_images)
        correct = support_logits.argmax(1) == support_labels.cpu()
        return EpisodeResult(
            losses=losses,
            query_logits=query_logits,
            support_accuracy=correct.float().mean().item(),
            **episode.trained_tensors(),
        )


class _Episode:
    """A model with the adapters of one episode; the stack removes them from the model again."""

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[list[str]], Tensor],
        class_names: Sequence[str],
        config: FewShotConfig,
        stack: ExitStack,
        lora_init: Mapping[str, Tensor] | None,
    ) -> None:
        self.model = model
        self.config = config
        self.lora: clip.LoRA | None = None
        self.reweighting: clip.Reweighting | None = None
        num_vectors = 0 if config.method == "zero-shot" else config.context_tokens
        self.prompt = clip.PromptContext(model, tokenizer, class_names, num_vectors)
        self.text_layer = self._resolve_text_layer()
        if config.method == "zero-shot":
            return
        self.lora = stack.enter_context(
            clip.add_lora(
                model,
                config.lora_rank,
                config.lora_alpha,
                config.lora_dropout,
                passes_input_gradient=False,  # as the published program trains
            )
        )
        self.lora.set_factors(a=lora_init)
        if config.method == "tir":
            self.reweighting = stack.enter_context(
                clip.install(
                    model,
                    config.layers,
                    config.placement,
                    WeightRule(config.rule, config.strength, top_ratio=config.top_ratio),
                    config.backend,
                )
            )

    def _resolve_text_layer(self) -> int:
        depth = self.prompt.num_blocks
        layer = self.config.text_layer
        if layer is None:
            return max(depth - 2, 0)
        if not -depth <= layer < depth:
            raise ValueError(f"text_layer must lie between 0 and {depth - 1}; got {layer}")
        return layer % depth

    def _class_embeddings(self) -> Tensor:
        """(C, E) of unit length for the logits; those for the relevance go to the re-weighting."""
        final, intermediate = self.prompt(self.text_layer)
        if self.reweighting is not None:
            self.reweighting.set_class_embeddings(intermediate)
        return F.normalize(final.float(), dim=-1)

    def _logits(self, images: Tensor, class_embeddings: Tensor) -> Tensor:
        features = F.normalize(self.model.encode_image(images).float(), dim=-1)
        return self.config.resolved_logit_scale * features @ class_embeddings.T

    def train(
        self,
        images: Tensor,
        labels: Tensor,
        on_step: Callable[[int, float], None] | None,
    ) -> list[float]:
        assert self.lora is not None
        config = self.config
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                self.lora.parameters(), lr=config.lora_lr, weight_decay=LORA_WEIGHT_DECAY
            )
        ]
        if config.context_tokens:
            optimizers.append(
                torch.optim.SGD(
                    [self.prompt.vectors],
                    lr=config.context_lr,
                    momentum=CONTEXT_MOMENTUM,
                    weight_decay=CONTEXT_WEIGHT_DECAY,
                )
            )
        # float16 alone has too little range for gradients.
        scaler = torch.amp.GradScaler(images.device.type, enabled=config.precision == "float16")
        losses: list[float] = []
        self.lora.train()
        for step in range(config.steps):
            loss = F.cross_entropy(self._logits(images, self._class_embeddings()), labels)
            losses.append(loss.item())
            if not torch.isfinite(loss):
                raise NonFiniteLossError(step, losses)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            if on_step is not None:
                on_step(step, losses[-1])
        self.lora.train(False)
        return losses

    @torch.no_grad()
    def classify(self, *image_sets: Tensor) -> list[Tensor]:
        """(Q, C) float32 logits on the CPU of each set of images."""
        class_embeddings = self._class_embeddings()
        return [
            torch.cat([self._logits(part, class_embeddings) for part in images.split(QUERY_BATCH)])
            .float()
            .cpu()
            if len(images)
            else torch.empty(0, len(class_embeddings))
            for images in image_sets
        ]

    def trained_tensors(self) -> dict:
        if self.lora is None:
            return {}
        factors = {
            name: (a.detach().float().cpu().clone(), b.detach().float().cpu().clone())
            for name, (a, b) in self.lora.factors().items()
        }
        return {"context": self.prompt.vectors.detach().float().cpu().clone(), "lora": factors}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the model's own parameters, undone at the end."""
    modes = {module: module.training for module in model.modules()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _precision(config: FewShotConfig, device: torch.device) -> Iterator[None]:
    if config.precision == "float32":
        yield
        return
    with torch.autocast(device.type, dtype=getattr(torch, config.precision)):
        yield


def _check_episode(
    class_names: Sequence[str], support_images: Tensor, support_labels: Tensor, query_images: Tensor
) -> None:
    for name, images in (("support_images", support_images), ("query_images", query_images)):
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"{name} must have shape (images, 3, H, W); got {tuple(images.shape)}")
    if len(class_names) < 2:
        raise ValueError(f"class_names must hold at least 2 classes; got {len(class_names)}")
    if len(support_images) == 0:
        raise ValueError("support_images must hold at least one image")
    if support_labels.shape != support_images.shape[:1]:
        raise ValueError(
            f"support_labels must have one label for each of the {len(support_images)} support "
            f"images; got shape {tuple(support_labels.shape)}"
        )
    if support_labels.is_floating_point() or support_labels.dtype == torch.bool:
        raise TypeError(f"support_labels must be integers; got {support_labels.dtype}")
    if support_labels.min() < 0 or support_labels.max() >= len(class_names):
        raise ValueError(
            f"support_labels must lie between 0 and {len(class_names) - 1}; got "
            f"{int(support_labels.min())} to {int(support_labels.max())}"
        )
