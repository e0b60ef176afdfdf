"""A learned prompt context: class prompts whose first words are trained vectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tir_kernels.adapters.prompt_text import (
    CONTEXT_WORDS,
    CutNameWarning,
    PromptTexts,
    prompt_texts,
    tokenize,
)
from tir_kernels.scalars import whole_number
from tir_kernels.towers import text_tower
from tir_kernels.towers.run import EncodesText


class PromptContext(nn.Module):
    """Prompts "{context} {name}." with one trained context for all classes.

    The context starts as the embeddings of "a photo of a". With fewer than four vectors it starts
    as the last of these words; with more, the vectors in front are drawn from N(0, 0.02²). A
    template puts its own words around the names; the context starts as those in front, whose number
    of tokens must be that of the vectors. A name that is too long for the tower's context is cut,
    with a ``CutNameWarning``; the prompt then still ends as the others do.

    Args:
        model: A model with a text tower, or that tower opened; it is read, never changed.
        tokenizer: Its tokenizer: list of strings -> (C, T) token ids.
        class_names: C names, in words; at least one.
        num_vectors: Trained vectors; 0 leaves the words in front of the names as they are.
        generator: Draws the vectors in front; ``None``: PyTorch's own.
        cut: Leave out what no prompt needs, in towers that are causal; off to measure it.
        template: Text with one "{}" for the name; ``None``: "a photo of a {}.".

    Attributes:
        vectors: (num_vectors, W) parameter.
        embeddings: (C, T, W) of the prompts, up to the last end-of-text token where the tower is
            causal; the places of the vectors hold a word.
        last_position: (C,) the position that stands for each prompt.
        key_mask: (C, L) the tokens that are attended to, where the tower masks padding.
        first: Place of the vectors: how many tokens, such as start-of-text, are in front of them.
        tower: The text tower.

    Raises:
        TypeError, ValueError: An unsuitable text tower or argument, or names that only cutting
            made the same.
    """

    embeddings: Tensor

    def __init__(
        self,
        model: nn.Module | EncodesText,
        tokenizer: Callable[[list[str]], Tensor],
        class_names: Sequence[str],
        num_vectors: int = 4,
        generator: torch.Generator | None = None,
        cut: bool = True,
        template: str | None = None,
    ) -> None:
        super().__init__()
        num_vectors = _check_arguments(class_names, num_vectors)
        self.tower = text_tower(model)
        # Everything here lasts: made as inference tensors, none of it could take part in training.
        with torch.inference_mode(False), torch.no_grad():
            texts = prompt_texts(tokenizer, class_names, num_vectors, template)
            if texts.cut:
                warnings.warn(texts.note(class_names), CutNameWarning, stacklevel=2)
            token_ids, self.first = texts.token_ids, texts.first
            last_position = self.tower.last_position(token_ids)
            if cut and self.tower.is_causal:
                # No token sees the ones behind it: what follows the last end-of-text is waste.
                token_ids = token_ids[:, : int(last_position.max()) + 1]
            embeddings = _round(self.tower.embed(token_ids))
            self.last_position = last_position.to(embeddings.device)
            key_mask = self.tower.key_mask(token_ids)
            self.key_mask = None if key_mask is None else key_mask.to(embeddings.device)
            self.register_buffer("embeddings", embeddings, persistent=False)
            self.vectors = nn.Parameter(
                _round(_start(tokenizer, self.tower, texts, num_vectors, generator))
            )

    @property
    def num_blocks(self) -> int:
        """Depth of the text tower."""
        return len(self.tower.blocks)

    def forward(self, text_layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Class embeddings (C, E) of the last text block, and (C, E) of block ``text_layer``."""
        context = self.vectors.expand(len(self.embeddings), -1, -1)
        embeddings = self.insert(context, self.embeddings, self.first)
        return self.tower.encode(embeddings, self.last_position, text_layer, self.key_mask)

    @staticmethod
    def insert(context: Tensor, embeddings: Tensor, first: int) -> Tensor:
        """(C, num_vectors, W) in the places kept for them in (C, T, W), from place ``first`` on."""
        num_vectors = context.shape[1]
        if num_vectors == 0:
            return embeddings
        context = context.to(embeddings.dtype)
        last = first + num_vectors
        return torch.cat([embeddings[:, :first], context, embeddings[:, last:]], dim=1)


def _check_arguments(class_names: Sequence[str], num_vectors: int) -> int:
    """The number of vectors as an int."""
    if isinstance(class_names, str):  # a sequence of strings too, but of letters
        raise TypeError("class_names must be a sequence of strings; got str")
    if len(class_names) == 0:
        raise ValueError("class_names must hold at least one name")
    num_vectors = whole_number("num_vectors", num_vectors)
    if num_vectors < 0:
        raise ValueError(f"num_vectors must be at least 0; got {num_vectors}")
    return num_vectors


def _round(embeddings: Tensor) -> Tensor:
    """To float16 and back: the published program keeps the words of its prompts in float16.

    For OpenAI's weights, which are float16, this changes nothing.
    """
    return embeddings.half().to(embeddings.dtype)


def _start(
    tokenizer: Callable[[list[str]], Tensor],
    tower: EncodesText,
    texts: PromptTexts,
    num_vectors: int,
    generator: torch.Generator | None,
) -> Tensor:
    front = texts.words.strip()
    words = tower.embed(tokenize(tokenizer, [front]))[0]
    known = len(CONTEXT_WORDS.split()) if front == CONTEXT_WORDS else num_vectors
    words = words[texts.first : texts.first + known]
    if num_vectors <= len(words):
        return words[len(words) - num_vectors :].clone()
    device = "cpu" if generator is None else generator.device
    shape = (num_vectors - len(words), words.shape[1])
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device=device) * 0.02
    return torch.cat([drawn.to(words), words])
