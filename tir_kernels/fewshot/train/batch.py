"""Training the adapters of several episodes as one batch.

The frozen weights serve all; LoRA's factors, prompt contexts and class embeddings have a leading
dimension G, one entry an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels import WeightRule, adapters, towers
from tir_kernels.fewshot.settings import FewShotConfig
from tir_kernels.fewshot.train.graph import LossLog, RepeatedStep
from tir_kernels.fewshot.train.memory import count_saved_bytes

QUERY_BATCH = 64
LORA_WEIGHT_DECAY = 0.01
CONTEXT_MOMENTUM = 0.9
CONTEXT_WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Savings:
    """Work that can be left out because nothing depends on it; switched off only to measure.

    Args:
        cache_patch_embedding: The patch embedding, which is frozen, runs once an episode.
        class_token_only: The last vision block computes its class token alone.
        cut_prompts: Prompts end with the longest one's end-of-text token.
        low_rank_products: LoRA multiplies with its two factors, and never forms B A.
        frozen_weights: The model's own weights get no gradients.
        shared_text_pass: Classifying takes one text pass, not one for each batch of images.
        image_batches: Images are classified in batches, not one by one.
        fused_layers: Frozen layers run in the form that suits training best: one kernel for bias
            and activation on a CPU, and matrices that are kept in the type of ``precision``.
        step_graph: On CUDA, a training step is launched as one graph.
    """

    cache_patch_embedding: bool = True
    class_token_only: bool = True
    cut_prompts: bool = True
    low_rank_products: bool = True
    frozen_weights: bool = True
    shared_text_pass: bool = True
    image_batches: bool = True
    fused_layers: bool = True
    step_graph: bool = True


class _Prompts(nn.Module):
    """The prompts of G episodes of C classes, padded to one length."""

    def __init__(self, contexts: Sequence[adapters.PromptContext]) -> None:
        super().__init__()
        self.num_blocks = contexts[0].num_blocks
        self._tower = contexts[0].tower
        embeddings = [context.embeddings for context in contexts]
        longest = max(each.shape[1] for each in embeddings)
        # Attention is causal wherever prompts differ in length, so what follows changes nothing.
        self._embeddings = torch.cat(
            [F.pad(each, (0, 0, 0, longest - each.shape[1])) for each in embeddings]
        )
        self._last_position = torch.cat([context.last_position for context in contexts])
        self.vectors = nn.Parameter(torch.stack([context.vectors.detach() for context in contexts]))

    def forward(self, text_layer: int) -> tuple[Tensor, Tensor]:
        """(G, C, E) class embeddings of the last text block, and of block ``text_layer``."""
        num_episodes = len(self.vectors)
        context = self.vectors.repeat_interleave(len(self._embeddings) // num_episodes, 0)
        embeddings = adapters.PromptContext.insert(context, self._embeddings)
        final, intermediate = self._tower.encode(embeddings, self._last_position, text_layer)
        return final.unflatten(0, (num_episodes, -1)), intermediate.unflatten(0, (num_episodes, -1))


class EpisodeBatch:
    """A model with the adapters of G episodes; the stack removes them from the model again."""

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[list[str]], Tensor],
        class_names: Sequence[Sequence[str]],
        seeds: Sequence[int],
        config: FewShotConfig,
        stack: ExitStack,
        lora_init: Mapping[str, Tensor] | None,
        savings: Savings,
        checkpoint: bool = False,
    ) -> None:
        self.config = config
        self.savings = savings
        self.encoder = towers.ImageEncoder(model, savings.class_token_only, checkpoint)
        self._model = model
        self.size = len(seeds)
        self.lora: adapters.LoRA | None = None
        self.reweighting: adapters.Reweighting | None = None
        num_vectors = 0 if config.method == "zero-shot" else config.context_tokens
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.prompts = _Prompts(
            [
                adapters.PromptContext(
                    model, tokenizer, names, num_vectors, generator, savings.cut_prompts
                )
                for names, generator in zip(class_names, generators, strict=True)
            ]
        )
        self.text_layer = self._resolve_text_layer()
        if config.method == "zero-shot":
            return
        self.lora = stack.enter_context(
            adapters.add_lora(
                model,
                config.lora_rank,
                config.lora_alpha,
                config.lora_dropout,
                passes_input_gradient=False,  # as the published program trains
                num_episodes=self.size,
            )
        )
        self.lora.seed(seeds)
        self.lora.form_products(not savings.low_rank_products)
        if lora_init is not None:
            each = {name: a.expand(self.size, *a.shape) for name, a in lora_init.items()}
            self.lora.set_factors(a=each)
        if config.method == "tir":
            self.reweighting = stack.enter_context(
                adapters.add_reweighting(
                    model,
                    config.layers,
                    config.placement,
                    WeightRule(config.rule, config.strength, top_ratio=config.top_ratio),
                    config.backend,
                )
            )

    def _resolve_text_layer(self) -> int:
        depth = self.prompts.num_blocks
        layer = self.config.text_layer
        if layer is None:
            return max(depth - 2, 0)
        if not -depth <= layer < depth:
            raise ValueError(f"text_layer must lie between 0 and {depth - 1}; got {layer}")
        return layer % depth

    def _class_embeddings(self) -> Tensor:
        """(G, C, E) of unit length for the logits; those for the relevance go to the
        re-weighting.
        """
        final, intermediate = self.prompts(self.text_layer)
        if self.reweighting is not None:
            self.reweighting.set_class_embeddings(intermediate)
        return F.normalize(final.float(), dim=-1)

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        """(G, S, 3, H, W) images -> (G, S, L, D) tokens; the embedding is frozen."""
        return self.encoder.embed(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def _logits(self, tokens: Tensor, class_embeddings: Tensor) -> Tensor:
        """(G, S, L, D) embedded tokens -> (G, S, C)."""
        features = self.encoder.features(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        features = F.normalize(features.float(), dim=-1)
        return self.config.resolved_logit_scale * features @ class_embeddings.mT

    def train(
        self,
        images: Tensor,
        labels: Tensor,
        on_step: Callable[[int, int, float], None] | None,
    ) -> list[list[float]]:
        """The losses of each episode; where one is not finite, those up to it."""
        assert self.lora is not None
        lora, scaler = self.lora, self._scaler(images.device)
        optimizers = self._optimizers(images.device)
        tokens = self._embed(images) if self.savings.cache_patch_embedding else None
        labels = labels.flatten()

        def take_step() -> Tensor:
            losses = self._losses(self._embed(images) if tokens is None else tokens, labels)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            # Each episode's gradients are those of its own loss: a sum keeps them apart.
            scaler.scale(losses.sum()).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            lora.next_step()
            return losses.detach()

        # A gradient scaler looks at the gradients' values, which a graph can't.
        step = RepeatedStep(
            take_step, images.device, self.savings.step_graph and not scaler.is_enabled()
        )
        log = LossLog(self.size, on_step)
        lora.train()
        for _ in range(self.config.steps):
            log.add(step())
            if log.all_failed:
                break
        lora.train(False)
        return log.finish()

    def _losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(G, S, L, D) embedded tokens, (G S,) labels -> (G,) losses."""
        logits = self._logits(tokens, self._class_embeddings()).flatten(0, 1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses.unflatten(0, (self.size, -1)).mean(1)

    def _optimizers(self, device: torch.device) -> list[torch.optim.Optimizer]:
        assert self.lora is not None
        config = self.config
        is_cuda = device.type == "cuda"
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                self.lora.parameters(),
                lr=config.lora_lr,
                weight_decay=LORA_WEIGHT_DECAY,
                fused=True,
                capturable=is_cuda,
            )
        ]
        if config.context_tokens:
            optimizers.append(
                torch.optim.SGD(
                    [self.prompts.vectors],
                    lr=config.context_lr,
                    momentum=CONTEXT_MOMENTUM,
                    weight_decay=CONTEXT_WEIGHT_DECAY,
                    fused=True,
                )
            )
        return optimizers

    def _scaler(self, device: torch.device) -> torch.amp.GradScaler:
        # float16 alone has too little range for gradients.
        return torch.amp.GradScaler(device.type, enabled=self.config.precision == "float16")

    def bytes_of_a_step(self, images: Tensor, labels: Tensor) -> int:
        """The bytes that the forward pass of a training step keeps."""
        assert self.lora is not None
        self.lora.train()
        tokens = self._embed(images)
        with count_saved_bytes([*self._model.parameters(), tokens]) as count:
            self._losses(tokens, labels.flatten())
        self.lora.train(False)
        return count.total + tokens.nbytes

    @torch.no_grad()
    def classify(self, *image_sets: Tensor) -> list[Tensor]:
        """(G, Q, C) float32 logits on the CPU of each set of images (G, Q, 3, H, W)."""
        shared = self._class_embeddings()
        size = max(1, QUERY_BATCH // self.size) if self.savings.image_batches else 1

        def logits(images: Tensor) -> Tensor:
            classes = shared if self.savings.shared_text_pass else self._class_embeddings()
            return self._logits(self._embed(images), classes)

        return [
            torch.cat([logits(batch) for batch in images.split(size, 1)], 1).float().cpu()
            if images.shape[1]
            else torch.empty(self.size, 0, shared.shape[1], dtype=torch.float32, device="cpu")
            for images in image_sets
        ]

    def trained_tensors(self, index: int) -> dict:
        if self.lora is None:
            return {}

        def own(tensor: Tensor) -> Tensor:
            return tensor.detach()[index].float().cpu().clone()

        factors = {name: (own(a), own(b)) for name, (a, b) in self.lora.factors().items()}
        return {"context": own(self.prompts.vectors), "lora": factors}
