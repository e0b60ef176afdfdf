"""A learned prompt context: class prompts whose first words are trained vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tir_kernels.scalars import whole_number
from tir_kernels.towers import text_tower
from tir_kernels.towers.run import EncodesText

CONTEXT_WORDS = "a photo of a"
_PLACEHOLDER = "a"  # one token of CLIP's tokenizer; its embedding is replaced


class PromptContext(nn.Module):
    """Prompts "{context} {name}." with one trained context for all classes.

    The context starts as the embeddings of "a photo of a". With fewer than four vectors it starts
    as the last of these words; with more, the vectors in front are drawn from N(0, 0.02²). A
    template puts its own words around the names; the context starts as those in front, whose number
    of tokens must be that of the vectors.

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
        num_start_tokens: How many tokens are in front of a text's own; SigLIP's texts have none.
        key_mask: (C, L) the tokens that are attended to, where the tower masks padding.
        tower: The text tower.

    Raises:
        TypeError, ValueError: An unsuitable text tower or argument, or names too long for the
            tower's context.
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
        words, rest = (f"{CONTEXT_WORDS} ", ".") if template is None else _around_name(template)
        if num_vectors:
            kept = " ".join([_PLACEHOLDER] * num_vectors)
            prompts = [f"{kept} {name}{rest}" for name in class_names]
        else:
            prompts = [f"{words}{name}{rest}" for name in class_names]
        # Everything here lasts: made as inference tensors, none of it could take part in training.
        with torch.inference_mode(False), torch.no_grad():
            self.num_start_tokens = start = _num_start_tokens(tokenizer)
            if num_vectors and template is not None:
                _require_as_many(tokenizer, template, words, num_vectors, start)
            token_ids = _tokenize(tokenizer, prompts)
            _require_room(tokenizer, token_ids, prompts, class_names, num_vectors, start)
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
                _round(_start(tokenizer, self.tower, words, num_vectors, start, generator))
            )

    @property
    def num_blocks(self) -> int:
        """Depth of the text tower."""
        return len(self.tower.blocks)

    def forward(self, text_layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Class embeddings (C, E) of the last text block, and (C, E) of block ``text_layer``."""
        context = self.vectors.expand(len(self.embeddings), -1, -1)
        embeddings = self.insert(context, self.embeddings, self.num_start_tokens)
        return self.tower.encode(embeddings, self.last_position, text_layer, self.key_mask)

    @staticmethod
    def insert(context: Tensor, embeddings: Tensor, num_start_tokens: int = 1) -> Tensor:
        """(C, num_vectors, W) in the places kept for them in (C, T, W), after start-of-text."""
        num_vectors, start = context.shape[1], num_start_tokens
        if num_vectors == 0:
            return embeddings
        context = context.to(embeddings.dtype)
        rest = embeddings[:, start + num_vectors :]
        return torch.cat([embeddings[:, :start], context, rest], dim=1)


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


def _around_name(template: str) -> tuple[str, str]:
    """The text of a template in front of the name, and behind it."""
    if template.count("{}") != 1:
        raise ValueError(f"template must hold one {{}} for the class's name; got {template!r}")
    front, _, rest = template.partition("{}")
    return front, rest


def _num_start_tokens(tokenizer: Callable[[list[str]], Tensor]) -> int:
    """How many tokens a tokenizer puts in front of every text."""
    empty, word = _tokenize(tokenizer, ["", _PLACEHOLDER])
    return int((empty == word).int().cumprod(0).sum())


def _require_as_many(
    tokenizer: Callable[[list[str]], Tensor],
    template: str,
    words: str,
    num_vectors: int,
    start: int,
) -> None:
    """Refuse words in front of the name that are not as many tokens as there are vectors."""
    rest = f"{_PLACEHOLDER}{template.partition('{}')[2]}"

    def is_as_long_as(count: int) -> bool:
        """Whether behind so many tokens the prompt is as it is behind so many placeholders."""
        kept = " ".join([_PLACEHOLDER] * count)
        given, same = _tokenize(tokenizer, [f"{words}{rest}", f"{kept} {rest}"])[:, start + count :]
        return torch.equal(given, same)

    if not is_as_long_as(num_vectors):
        most = _tokenize(tokenizer, [words]).shape[1] - 4
        count = next((each for each in range(most) if is_as_long_as(each)), most)
        raise ValueError(
            f"template {template!r} has {count} tokens in front of {{}}, but the learned context "
            f"has {num_vectors}; set context_tokens to {count}, or choose other words"
        )


def _tokenize(tokenizer: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:
    """(C, T) token ids on the CPU; tokenizers put them on the process's default device."""
    with torch.device("cpu"):
        return tokenizer(texts)


def _round(embeddings: Tensor) -> Tensor:
    """To float16 and back: the published program keeps the words of its prompts in float16.

    For OpenAI's weights, which are float16, this changes nothing.
    """
    return embeddings.half().to(embeddings.dtype)


def _start(
    tokenizer: Callable[[list[str]], Tensor],
    tower: EncodesText,
    text: str,
    num_vectors: int,
    start: int,
    generator: torch.Generator | None,
) -> Tensor:
    words = tower.embed(_tokenize(tokenizer, [text.strip()]))[0]
    known = len(CONTEXT_WORDS.split()) if text.strip() == CONTEXT_WORDS else num_vectors
    words = words[start : start + known]
    if num_vectors <= len(words):
        return words[len(words) - num_vectors :].clone()
    device = "cpu" if generator is None else generator.device
    shape = (num_vectors - len(words), words.shape[1])
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device=device) * 0.02
    return torch.cat([drawn.to(words), words])


def _require_room(
    tokenizer: Callable[[list[str]], Tensor],
    token_ids: Tensor,
    prompts: list[str],
    class_names: Sequence[str],
    num_vectors: int,
    start: int,
) -> None:
    """Refuse names that the tokenizer had to cut off to fit them into the context."""
    length = token_ids.shape[1]
    if start + num_vectors + 3 > length:  # one token of a name, full stop and end of text
        raise ValueError(
            f"num_vectors={num_vectors} leaves no room for names in the model's context of "
            f"{length} tokens"
        )
    full = (token_ids != 0).sum(1) == length
    for index in full.nonzero().flatten().tolist():
        longer = tokenizer.encode(prompts[index]) if hasattr(tokenizer, "encode") else []
        if start + len(longer) + 1 > length:
            raise ValueError(
                f"class_names: {class_names[index]!r} is too long for the model's context of "
                f"{length} tokens; shorten it"
            )
