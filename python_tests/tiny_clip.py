"""Small open_clip models with random weights, and checks that a model was left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import Transformer
from torch import Tensor, nn

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 6}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 2, "layers": 3}
END_OF_TEXT = 49
# Everything that open_clip's block of its own may have, but the attention that it can't compute.
OWN_BLOCKS = {
    "qk_norm": True,
    "scale_heads": True,
    "scale_attn_inner": True,
    "scale_attn": True,
    "scale_fc": True,
}
ATTENTION_POOL = {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}


def make_clip(
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    *,
    custom_text: bool = False,
    **options: Any,
) -> nn.Module:
    """A model with 17 image tokens of width 32, 6 vision and 3 text blocks, embeddings of width 16.

    Gains and offsets are random too, so that leaving one out is noticed.
    """
    torch.manual_seed(0)
    kind = CustomTextCLIP if custom_text else CLIP
    return varied(kind(16, {**VISION, **(vision or {})}, {**TEXT, **(text or {})}, **options))


def make_coca(words: dict[str, int] | None = None) -> nn.Module:
    """As ``make_clip``, with attentional pool, a class token behind each text, and a decoder."""
    torch.manual_seed(0)
    text = {**TEXT, **(words or {})}
    vision = {**VISION, **ATTENTION_POOL, "output_tokens": True}
    return varied(CoCa(16, text, {**text, "embed_cls": True, "output_tokens": True}, vision))


def varied(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with noise on its gains, offsets and layer scales."""
    if isinstance(model, CoCa):  # which leaves it uninitialised
        nn.init.normal_(model.text_decoder.text_projection)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def swap_token_order(model: nn.Module) -> nn.Module:
    """Let the model's transformers run on (L, B, D), as older checkpoints of open_clip do."""
    for owner in (model.visual, getattr(model, "text", model)):
        old = owner.transformer
        new = Transformer(old.width, old.layers, old.resblocks[0].attn.num_heads, batch_first=False)
        new.load_state_dict(old.state_dict())
        owner.transformer = new.eval()
    return model


def each_alone(tower: nn.Module, hidden: Tensor) -> Tensor:
    """(B, L, D) -> (B, L, E) by an image tower's own pool, of sequences of one token."""
    pooled, _ = tower._pool(hidden.flatten(0, 1)[:, None])
    pooled = pooled.reshape(hidden.shape[0] * hidden.shape[1], -1)
    return (pooled if tower.proj is None else pooled @ tower.proj).unflatten(0, hidden.shape[:2])


def make_images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make_token_ids(count: int = 3) -> Tensor:
    """(count, 12) texts of different lengths, each closed by the end-of-text token."""
    token_ids = torch.zeros(count, 12, dtype=torch.long)
    for row in range(count):
        length = (4, 7, 6)[row % 3]
        token_ids[row, :length] = torch.arange(row + 1, row + 1 + length)
        token_ids[row, length] = END_OF_TEXT
    return token_ids


def make_class_embeddings(*shape: int) -> Tensor:
    return torch.randn(*(shape or (5, 16)), generator=torch.Generator().manual_seed(2))


class Untouched:
    """The state of a model now, to compare with later: modules, modes, hooks and every bit."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(self._describe())
        self._state = {key: value.clone() for key, value in model.state_dict().items()}
        self._parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]

    def _describe(self) -> Iterator[tuple[str, tuple]]:
        for name, module in self._model.named_modules():
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
            yield name, (id(module), type(module), module.training, hooks, sorted(vars(module)))

    def check(self) -> None:
        state = self._model.state_dict()
        assert list(state) == list(self._state)
        for key, value in self._state.items():
            assert state[key].dtype == value.dtype
            assert torch.equal(state[key], value), key
        assert dict(self._describe()) == self._modules
        parameters = [(name, id(p), p.requires_grad) for name, p in self._model.named_parameters()]
        assert parameters == self._parameters


@contextmanager
def refused(model: nn.Module, kind: type[Exception], message: str) -> Iterator[None]:
    """The block raises such an error, and leaves the model as it was."""
    before = Untouched(model)
    with pytest.raises(kind, match=message):
        yield
    before.check()
