"""Class prompts of several episodes, with a learned context each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels.adapters import PromptContext
from tir_kernels.fewshot.methods.protocol import Kit, ParameterGroup
from tir_kernels.fewshot.methods.schedules import cosine

WARM_UP_RATE = 1e-5  # of the first step, in CoOp's program and those after it


class Prompts(nn.Module):
    """The prompts of G episodes of C classes, padded to one length.

    Attributes:
        vectors: (G, num_vectors, W) parameter, the contexts.
        num_blocks: Depth of the text tower.
        first: Place of the first word, behind tokens such as start-of-text.
    """

    def __init__(self, contexts: Sequence[PromptContext]) -> None:
        super().__init__()
        self.num_blocks = contexts[0].num_blocks
        self.first = contexts[0].first
        self._tower = contexts[0].tower
        embeddings = [context.embeddings for context in contexts]
        longest = max(each.shape[1] for each in embeddings)
        # Attention is causal wherever prompts differ in length, so what follows changes nothing.
        self._embeddings = torch.cat(
            [F.pad(each, (0, 0, 0, longest - each.shape[1])) for each in embeddings]
        )
        self._last_position = torch.cat([context.last_position for context in contexts])
        masks = [context.key_mask for context in contexts if context.key_mask is not None]
        self._key_mask = torch.cat(masks) if masks else None
        self.vectors = nn.Parameter(torch.stack([context.vectors.detach() for context in contexts]))

    @classmethod
    def of_kit(cls, kit: Kit, num_vectors: int, template: str | None = None) -> Prompts:
        """Prompts with contexts of so many vectors, drawn by the episodes' seeds where drawn."""
        generators = [torch.Generator().manual_seed(seed) for seed in kit.seeds]
        return cls(
            [
                PromptContext(
                    kit.model, kit.tokenizer, names, num_vectors, generator, template=template
                )
                for names, generator in zip(kit.class_names, generators, strict=True)
            ]
        )

    def forward(self, text_layer: int | None = None) -> tuple[Tensor, Tensor]:
        """(G, C, E) class embeddings of the last text block, and of block ``text_layer``."""
        num_episodes = len(self.vectors)
        context = self.vectors.repeat_interleave(len(self._embeddings) // num_episodes, 0)
        embeddings = PromptContext.insert(context, self._embeddings, self.first)
        final, intermediate = self._tower.encode(
            embeddings, self._last_position, text_layer, self._key_mask
        )
        return final.unflatten(0, (num_episodes, -1)), intermediate.unflatten(0, (num_episodes, -1))

    def words(self, count: int) -> Tensor:
        """(G, count, W) embeddings of the first words, where all classes have the same."""
        embeddings = self._embeddings.unflatten(0, (len(self.vectors), -1))
        return embeddings[:, 0, self.first : self.first + count]

    def encode(self, contexts: Tensor) -> Tensor:
        """(G, K, C, M, W) contexts, or (G, K, 1, M, W) of all classes -> (G, K, C, E).

        They take the places of the first M words instead of ``vectors``, which are not looked at.
        """
        num_episodes, copies = contexts.shape[:2]
        shape = (num_episodes, copies, len(self._embeddings) // num_episodes)
        contexts = contexts.expand(*shape, -1, -1).flatten(0, 2)

        def repeated(own: Tensor) -> Tensor:
            """(G C, ...) -> (G K C, ...)."""
            own = own.unflatten(0, (num_episodes, 1, -1))
            return own.expand(-1, copies, *own.shape[2:]).flatten(0, 2)

        embeddings = PromptContext.insert(contexts, repeated(self._embeddings), self.first)
        mask = None if self._key_mask is None else repeated(self._key_mask)
        last_position = repeated(self._last_position)
        return self._tower.encode(embeddings, last_position, None, mask)[0].unflatten(0, shape)


def cosine_logits(features: Tensor, class_embeddings: Tensor, logit_scale: float) -> Tensor:
    """(G, S, E) features and (G, C, E) embeddings of unit length -> (G, S, C) scaled cosines."""
    return logit_scale * F.normalize(features.float(), dim=-1) @ class_embeddings.mT


def default_logit_scale(logit_scale: float | None, shots: int) -> float:
    """The factor of the cosine: that given, or the one published for so many shots."""
    if logit_scale is not None:
        return float(logit_scale)
    return 2.0 if shots == 1 else 4.0  # arXiv 2605.25799


def generators_of(kit: Kit) -> list[torch.Generator]:
    """One a seed, on the CPU, so that an episode's numbers are the same on every device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in kit.seeds]


def drawn_vectors(generators: Sequence[torch.Generator], *shape: int) -> Tensor:
    """(G, *shape) float32 on the CPU from N(0, 0.02²), an episode's by its generator."""
    draws = [torch.randn(shape, generator=each, device="cpu") for each in generators]
    return 0.02 * torch.stack(draws)


def drawn_layer(
    generators: Sequence[torch.Generator], outputs: int, inputs: int
) -> tuple[Tensor, Tensor]:
    """(G, outputs, inputs) weight and (G, outputs) bias, as PyTorch starts its linear layers."""

    def drawn(*shape: int) -> Tensor:
        draws = [torch.rand(shape, generator=each, device="cpu") for each in generators]
        return (2 * torch.stack(draws) - 1) * inputs**-0.5

    return drawn(outputs, inputs), drawn(outputs)


def prompt_group(parameters: Sequence[nn.Parameter], lr: float, steps: int) -> ParameterGroup:
    """Parameters stepped as in CoOp's program: SGD, a cosine behind one step of warm-up."""
    warm_up = min(WARM_UP_RATE / lr, 1.0) if lr else 1.0
    settings = {"lr": lr, "momentum": 0.9, "weight_decay": 5e-4}
    schedule = cosine(steps, warm_up=1, warm_up_factor=warm_up)
    return ParameterGroup(parameters, "SGD", settings, schedule)
