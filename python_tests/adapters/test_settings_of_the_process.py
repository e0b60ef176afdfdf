"""Additions to a model depend on no default dtype or device of the process, and no grad mode."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_process_settings import SETTINGS
from tiny_clip import END_OF_TEXT, make_class_embeddings, make_clip, make_images
from torch import Tensor, nn

from tir_kernels import adapters

NAMES = ["cat", "crop land"]


def tokenize(texts: list[str]) -> Tensor:
    """On the process's default device, as open_clip's tokenizer."""
    token_ids = torch.zeros(len(texts), 12, dtype=torch.long)
    for row, text in enumerate(texts):
        words = [len(word) for word in text.replace(".", " .").split()]
        for place, token in enumerate([48, *words, END_OF_TEXT]):
            token_ids[row, place] = token
    return token_ids


def make_model() -> nn.Module:
    return make_clip().requires_grad_(False)


def adapted_gradients(
    model: nn.Module, lora: adapters.LoRA, prompt: adapters.PromptContext
) -> list[Tensor]:
    """Features, embeddings and the gradients of all that learns, with dropout on."""
    for _, b in lora.factors().values():
        b.data.fill_(0.1)
    lora.train()
    lora.next_step()
    embeddings, _ = prompt(1)
    with adapters.add_reweighting(model, [np.int64(2)], "both") as handle:
        handle.set_class_embeddings(make_class_embeddings())
        features = model.encode_image(make_images())
    loss = features.square().sum() + embeddings.square().sum()
    parameters = [*lora.parameters(), prompt.vectors]
    return [features, embeddings, *torch.autograd.grad(loss, parameters)]


def adapt(model: nn.Module) -> tuple[adapters.LoRA, adapters.PromptContext]:
    torch.manual_seed(1)
    lora = adapters.add_lora(model, np.int64(4), np.float32(8), np.float64(0.25))
    lora.seed(np.array([5]))
    return lora, adapters.PromptContext(model, tokenize, NAMES, np.int64(6))


@pytest.mark.parametrize("setting", SETTINGS)
def test_adapters_made_under_any_setting_are_the_same_and_learn(setting: str) -> None:
    model = make_model()
    lora, prompt = adapt(model)
    expected = adapted_gradients(model, lora, prompt)
    lora.remove()
    with SETTINGS[setting]():
        lora, prompt = adapt(model)
    found = adapted_gradients(model, lora, prompt)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("setting", ["float16", "float64", "default device", "device context"])
def test_adapters_used_under_a_setting_are_the_same(setting: str) -> None:
    model = make_model()
    lora, prompt = adapt(model)
    expected = adapted_gradients(model, lora, prompt)
    lora.seed([5])
    for low_rank in lora._low_ranks():
        low_rank.train(False)
    images, classes = make_images(), make_class_embeddings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "make_images", lambda: images)
        patch.setitem(globals(), "make_class_embeddings", lambda: classes)
        with SETTINGS[setting]():
            found = adapted_gradients(model, lora, prompt)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("setting", ["default device", "float64", "inference_mode"])
def test_adapters_are_read_and_written_under_any_setting(setting: str, tmp_path) -> None:
    model = make_model()
    with adapters.add_lora(model, 4) as lora:
        for index, (a, b) in enumerate(lora.factors().values()):
            a.data.fill_(0.5 + index), b.data.fill_(1.5 + index)
        expected = {name: (a.clone(), b.clone()) for name, (a, b) in lora.factors().items()}
        with SETTINGS[setting]():
            adapters.save_lora(lora, tmp_path)
    with SETTINGS[setting]():
        loaded = adapters.load_lora(model, tmp_path)
    for name, (a, b) in loaded.factors().items():
        assert torch.equal(a, expected[name][0])
        assert torch.equal(b, expected[name][1])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: adapters.add_lora(m, True), TypeError, "rank must be an int; got bool"),
        (lambda m: adapters.add_lora(m, 4.0), TypeError, "rank must be an int; got float"),
        (lambda m: adapters.add_lora(m, 4, "8"), TypeError, "alpha must be a number; got str"),
        (lambda m: adapters.add_lora(m, 4, np.inf), ValueError, "alpha must be finite; got inf"),
        (lambda m: adapters.add_lora(m, 4, 8, np.nan), ValueError, r"dropout must lie in \[0, 1\)"),
        (
            lambda m: adapters.add_lora(m, num_episodes=0),
            ValueError,
            "must be at least 1",
        ),
        (
            lambda m: adapters.add_lora(m, num_episodes=1.5),
            TypeError,
            "must be an int or",
        ),
        (
            lambda m: adapters.add_lora(m).seed([0.5]),
            TypeError,
            "seeds must be whole numbers",
        ),
    ],
)
def test_what_is_no_such_number_is_refused(
    call: Callable, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(make_clip())
