"""A fine-tuning step as a careful plain PyTorch program writes it: a peer of the few-shot engine.

It shares the engine's settings and the model's weights and nothing of its code: LoRA on query, key
and value of both towers, a learned prompt context, and re-weighted vision blocks. What the method's
published program does at greater length is in ``published.py``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels.fewshot import Runtime
from tir_kernels.fewshot.methods import Method, method_class
from tir_kernels.fewshot.methods.prompts import default_logit_scale
from tir_kernels.fewshot.methods.tir import TIR

from .formulas import key_bias, materialised_attention, plain_token_weights

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

CONTEXT = "a photo of a"


@dataclass(frozen=True)
class Training:
    """A method, its runtime, and the support images per class, which every program goes by."""

    method: Any  # a LoRA, or a subclass of it
    runtime: Runtime
    shots: int = 5

    @property
    def logit_scale(self) -> float:
        return default_logit_scale(self.method.logit_scale, self.shots)

    def having(self, **options: Any) -> Training:
        """The same with other options of the method."""
        return replace(self, method=replace(self.method, **options))

    def running(self, **settings: Any) -> Training:
        """The same with other settings of the runtime."""
        return replace(self, runtime=replace(self.runtime, **settings))

    def of_method(self, name: str) -> Training:
        """The same with another method, with the options that both have."""
        chosen: type[Method] = method_class(name)
        shared = {
            field.name: getattr(self.method, field.name)
            for field in fields(chosen)
            if hasattr(self.method, field.name)
        }
        return replace(self, method=chosen(**shared))


def precision(training: Training) -> contextlib.AbstractContextManager:
    """Autocast as the settings say."""
    if training.runtime.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(training.runtime.device, dtype=getattr(torch, training.runtime.precision))


class PlainStep:
    """Steps of an episode.

    Args:
        model: An open_clip CLIP model, whose parameters are only read.
        tokenizer: Its tokenizer.
        class_names: C names.
        training: The method; LoRA alone leaves re-weighting out.
        attend: How attention is computed.
        trains: Without it there are no low-rank factors, and the first loss is what it would be
            with them, since they start as a change of nothing.

    Attributes:
        lora: Block -> its factors A (3, rank, width) and B (3, width, rank).
        drops: Whether LoRA's dropout is on.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        class_names: Sequence[str],
        training: Training,
        attend: Attend = materialised_attention,
        *,
        trains: bool = True,
    ) -> None:
        self.model = model
        self.training = training
        self.attend = attend
        self.drops = trains
        device = model.token_embedding.weight.device
        token_ids = tokenizer([f"{CONTEXT} {name}." for name in class_names]).to(device)
        self.ends = token_ids.argmax(-1)  # the end-of-text token has the largest id
        with torch.no_grad():
            embeddings = model.token_embedding(token_ids[:, : self._text_length(token_ids)])
            embeddings = embeddings.half().to(embeddings.dtype)  # as published
        words = training.method.context_tokens
        self.before, self.after = embeddings[:, :1], embeddings[:, 1 + words :]
        self.context = nn.Parameter(embeddings[0, 1 : 1 + words].clone())
        self.lora: dict[nn.Module, tuple[nn.Parameter, nn.Parameter]] = {}
        if trains:
            for tower in (model.visual.transformer, model.transformer):
                for block in tower.resblocks:
                    self.lora[block] = self._factors(block)
        depth = len(model.visual.transformer.resblocks)
        self.reweighted = set()
        if isinstance(training.method, TIR):
            self.reweighted = set(training.method.layers or (depth - 4, depth - 2))
        self.text_layer = len(model.transformer.resblocks) - 2

    def _text_length(self, token_ids: Tensor) -> int:
        """Tokens of each text; none sees the ones behind it, so the end of the last is enough."""
        return int(self.ends.max()) + 1

    def _factors(self, block: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
        weight = block.attn.in_proj_weight
        width, rank = weight.shape[1], self.training.method.lora_rank
        a = nn.Parameter(torch.empty(3, rank, width, device=weight.device))
        for factor in a.unbind():
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        return a, nn.Parameter(torch.zeros(3, width, rank, device=weight.device))

    def train(
        self,
        images: Tensor,
        labels: Tensor,
        steps: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """Take some steps and return their losses; ``on_step`` is called after each."""
        training = self.training
        factors = [factor for pair in self.lora.values() for factor in pair]
        optimizers = [
            torch.optim.AdamW(factors, lr=training.method.lora_lr, weight_decay=0.01),
            torch.optim.SGD(
                [self.context], lr=training.method.context_lr, momentum=0.9, weight_decay=5e-4
            ),
        ]
        losses = []
        for _ in range(steps):
            loss = self.loss(images, labels)
            losses.append(loss.item())
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            on_step()
        return losses

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(images), labels)

    def logits(self, images: Tensor) -> Tensor:
        """(S, 3, H, W) -> (S, C), with a pass through both towers."""
        classes, intermediate = self._encode_text()
        features = F.normalize(self._encode_images(images, intermediate.detach()), dim=-1)
        cosines = features @ F.normalize(classes, dim=-1).T
        return self.training.logit_scale * cosines

    def _encode_text(self) -> tuple[Tensor, Tensor]:
        """(C, E) class embeddings of the last block, and of the block the relevance uses."""
        model = self.model
        context = self.context.expand(len(self.before), -1, -1)
        hidden = torch.cat([self.before, context, self.after], 1)
        length = hidden.shape[1]
        hidden = hidden + model.positional_embedding[:length]
        mask = model.attn_mask[:length, :length]
        intermediate = hidden
        for layer, block in enumerate(model.transformer.resblocks):
            hidden = self._block(block, hidden, mask)
            if layer == self.text_layer:
                intermediate = hidden
        return self._embed_text(hidden), self._embed_text(intermediate)

    def _embed_text(self, hidden: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.model.ln_final(hidden[rows, self.ends]) @ self.model.text_projection

    def _encode_images(self, images: Tensor, classes: Tensor) -> Tensor:
        tower = self.model.visual
        patches = tower.conv1(images).flatten(2).mT
        first = tower.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        hidden = torch.cat([first, patches], 1) + tower.positional_embedding
        hidden = tower.ln_pre(hidden)
        for layer, block in enumerate(tower.transformer.resblocks):
            bias = None
            if layer in self.reweighted:
                weights = self._weights(hidden, classes)
                if self.training.method.placement != "attention":
                    hidden = hidden * weights[..., None].to(hidden.dtype)
                if self.training.method.placement != "tokens":
                    bias = key_bias(weights)
            hidden = self._block(block, hidden, bias)
        return tower.ln_post(hidden[:, 0]) @ tower.proj

    @torch.no_grad()
    def _weights(self, tokens: Tensor, classes: Tensor) -> Tensor:
        tower, training = self.model.visual, self.training
        return plain_token_weights(
            tokens,
            classes.to(tokens.dtype),
            (tower.ln_post.weight, tower.ln_post.bias, tower.ln_post.eps),
            tower.proj,
            int((tokens.shape[1] - 1) * training.method.top_ratio),
            training.method.strength,
            (len(classes) + 1) / 2,
        )

    def _block(self, block: nn.Module, hidden: Tensor, bias: Tensor | None) -> Tensor:
        hidden = hidden + block.ls_1(self._attention(block, block.ln_1(hidden), bias))
        return hidden + block.ls_2(block.mlp(block.ln_2(hidden)))

    def _attention(self, block: nn.Module, tokens: Tensor, bias: Tensor | None) -> Tensor:
        attention = block.attn
        batch, length, width = tokens.shape
        heads = (attention.num_heads, width // attention.num_heads)
        parts = self._project(block, tokens)
        q, k, v = (part.view(batch, length, *heads).transpose(1, 2) for part in parts)
        attended = self.attend(q, k, v, bias)
        return attention.out_proj(attended.transpose(1, 2).reshape(batch, length, width))

    def _project(self, block: nn.Module, tokens: Tensor) -> list[Tensor]:
        """(B, L, D) -> queries, keys and values, each (B, L, D)."""
        attention = block.attn
        projected = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
        parts = list(projected.chunk(3, -1))
        if block in self.lora:
            for index, (a, b) in enumerate(zip(*self.lora[block], strict=True)):
                low_rank = F.linear(self._lora_input(tokens), a)
                parts[index] = parts[index] + F.linear(low_rank, b) * self._lora_scaling
        return parts

    @property
    def _lora_scaling(self) -> float:
        return self.training.method.lora_alpha / math.sqrt(self.training.method.lora_rank)

    def _lora_input(self, tokens: Tensor) -> Tensor:
        # As published, the branches pass no gradient on.
        return F.dropout(tokens.detach(), self.training.method.lora_dropout, self.drops)
