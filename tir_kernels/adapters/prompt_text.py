"""The texts of class prompts: a template around each name, which is cut where it is too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CONTEXT_WORDS = "a photo of a"
PLACEHOLDER = "a"  # one token of CLIP's tokenizer; its embedding is replaced

Tokenizer = Callable[[list[str]], Tensor]

_MORE = 8  # tokens of a context that is longer, to see what is cut off from the shorter one


class CutNameWarning(UserWarning):
    """Names are longer than a text tower's context has room for, and are cut in prompts."""


class PromptTexts(NamedTuple):
    """Class prompts as they are tokenized.

    Args:
        token_ids: (C, T) of the prompts.
        words: Text in front of the names.
        cut: Position of each name that was too long -> what is left of it.
        first: How many tokens, such as start-of-text, are in front of the first word.
    """

    token_ids: Tensor
    words: str
    cut: dict[int, str]
    first: int

    def note(self, names: Sequence[str]) -> str:
        """What was cut, in a sentence without its end; ``names`` are the classes' for the reader.

        Only where something was.
        """
        shown = [f"{_shown(names[at])} to {_shown(left)}" for at, left in self.cut.items()]
        several = "s" if len(shown) > 1 else ""
        more = f" and {len(shown) - _MOST_NAMED} more" if len(shown) > _MOST_NAMED else ""
        return (
            f"{len(shown)} class name{several} too long for the model's text context of "
            f"{self.token_ids.shape[1]} tokens, cut in prompts: "
            f"{', '.join(shown[:_MOST_NAMED])}{more}"
        )


_MOST_NAMED = 10


def prompt_texts(
    tokenizer: Tokenizer, class_names: Sequence[str], num_vectors: int, template: str | None
) -> PromptTexts:
    """Put a template around names, so that each prompt ends as the template does.

    A name that is too long for the tokenizer's context loses words at its end, or where its first
    word is too long, characters.

    Args:
        tokenizer: List of strings -> (C, T) token ids.
        class_names: C names, in words; at least one.
        num_vectors: Places for learned vectors in front of the name, in place of the template's
            words; 0 for none.
        template: Text with one "{}" for the name; ``None``: "a photo of a {}.".

    Raises:
        ValueError: The tokenizer does not tell words apart; the template is none, has not as many
            tokens in front of the name as there are vectors, or leaves no room for a name; or two
            names are the same once cut.
    """
    words, rest = (f"{CONTEXT_WORDS} ", ".") if template is None else _around_name(template)
    first = _first_word(tokenizer)
    if num_vectors and template is not None:
        _require_as_many(tokenizer, template, words, num_vectors, first)
    front = " ".join([PLACEHOLDER] * num_vectors) + " " if num_vectors else words

    def prompt(name: str) -> str:
        return f"{front}{name}{rest}"

    def fits(name: str) -> bool:
        return _fit(tokenizer, [prompt(name)])[0]

    if not fits(PLACEHOLDER):
        length = tokenize(tokenizer, [PLACEHOLDER]).shape[1]
        what = f"num_vectors={num_vectors}" if num_vectors else f"template {template or words!r}"
        raise ValueError(
            f"{what} leaves no room for names in the model's context of {length} tokens"
        )
    texts = [prompt(name) for name in class_names]
    cut = {
        at: _shortened(class_names[at], fits)
        for at, is_fitting in enumerate(_fit(tokenizer, texts))
        if not is_fitting
    }
    for at, name in cut.items():
        texts[at] = prompt(name)
    token_ids = tokenize(tokenizer, texts)
    _require_distinct(token_ids, class_names, cut)
    return PromptTexts(token_ids, words, cut, first)


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """(C, T) token ids on the CPU; tokenizers put them on the process's default device."""
    with torch.device("cpu"):
        return tokenizer(texts)


def words_in_front(tokenizer: Tokenizer, template: str | None) -> int:
    """How many tokens a template has in front of the name; ``None``: "a photo of a {}."."""
    words, rest = (f"{CONTEXT_WORDS} ", ".") if template is None else _around_name(template)
    one, other = tokenize(tokenizer, [f"{words}{PLACEHOLDER}{rest}", f"{words}photo{rest}"])
    return int((one != other).nonzero()[0]) - _first_word(tokenizer)


def _first_word(tokenizer: Tokenizer) -> int:
    """How many tokens there are in front of the first word of a text."""
    one, other = tokenize(tokenizer, [PLACEHOLDER, "photo"])
    differing = (one != other).nonzero()
    if len(differing) == 0:
        raise ValueError(
            f"tokenizer gives {PLACEHOLDER!r} and 'photo' the same tokens; pass the model's own"
        )
    return int(differing[0])


def _fit(tokenizer: Tokenizer, texts: list[str]) -> list[bool]:
    """Whether the tokenizer takes each text whole: whether more room would change its tokens."""
    found = tokenize(tokenizer, texts)
    length = found.shape[1]
    try:
        with torch.device("cpu"):
            more = tokenizer(texts, context_length=length + _MORE)[:, :length]  # type: ignore[call-arg]
    except TypeError:
        # A function of texts alone. A text that just fits counts as too long, too: to the tokens
        # it has, another word makes no difference.
        more = tokenize(tokenizer, [f"{text} {PLACEHOLDER}" for text in texts])
        if more.shape != found.shape:  # as many places as there are tokens
            return [True] * len(texts)
        return (found != more).any(1).tolist()
    return (found == more).all(1).tolist()


def _shortened(name: str, fits: Callable[[str], bool]) -> str:
    """The longest start of a name that fits."""
    words = name.split()
    count = _most(len(words), lambda number: fits(" ".join(words[:number])))
    if count:
        return " ".join(words[:count])
    count = _most(len(words[0]), lambda number: fits(words[0][:number]))
    if count == 0:
        raise ValueError(f"class_names: there is no room for the first letter of {_shown(name)}")
    return words[0][:count]


def _most(most: int, is_fitting: Callable[[int], bool]) -> int:
    """The largest number from 0 to ``most`` that fits, where 0 does."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        if is_fitting(middle):
            least = middle
        else:
            most = middle - 1
    return least


def _require_distinct(token_ids: Tensor, names: Sequence[str], cut: dict[int, str]) -> None:
    """Refuse names that only cutting made the same."""
    owners: dict[tuple[int, ...], int] = {}
    for at, row in enumerate(token_ids.tolist() if cut else []):
        other = owners.setdefault(tuple(row), at)
        if other != at and (at in cut or other in cut) and names[at] != names[other]:
            raise ValueError(
                f"class_names: {_shown(names[other])} and {_shown(names[at])} are the same prompt "
                f"once cut to the model's text context of {token_ids.shape[1]} tokens; shorten "
                "them with class_names so that they differ"
            )


def _around_name(template: str) -> tuple[str, str]:
    """The text of a template in front of the name, and behind it."""
    if template.count("{}") != 1:
        raise ValueError(f"template must hold one {{}} for the class's name; got {template!r}")
    front, _, rest = template.partition("{}")
    return front, rest


def _require_as_many(
    tokenizer: Tokenizer, template: str, words: str, num_vectors: int, first: int
) -> None:
    """Refuse words in front of the name that are not as many tokens as there are vectors."""
    rest = f"{PLACEHOLDER}{template.partition('{}')[2]}"

    def is_as_long_as(count: int) -> bool:
        """Whether behind so many tokens the prompt is as it is behind so many placeholders."""
        kept = " ".join([PLACEHOLDER] * count)
        given, same = tokenize(tokenizer, [f"{words}{rest}", f"{kept} {rest}"])[:, first + count :]
        return torch.equal(given, same)

    if not is_as_long_as(num_vectors):
        most = tokenize(tokenizer, [words]).shape[1] - 4
        count = next((each for each in range(most) if is_as_long_as(each)), most)
        raise ValueError(
            f"template {template!r} has {count} tokens in front of {{}}, but the learned context "
            f"has {num_vectors}; set context_tokens to {count}, or choose other words"
        )


def _shown(name: str) -> str:
    """A name in quotes, a long one without its middle."""
    return repr(name if len(name) <= 48 else f"{name[:30]}...{name[-15:]}")
