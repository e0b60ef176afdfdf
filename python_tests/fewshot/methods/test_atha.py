"""ATHA: the move of tokens against NumPy, and the strengths at which it is plain LoRA."""

import numpy as np
import open_clip
import pytest
import torch
from fewshot.training_cases import EPISODES, draw_episode, make_model, make_tokenizer

from tir_kernels.adapters.pull_push import add_pull_push
from tir_kernels.fewshot import finetune_episode, finetune_episodes
from tir_kernels.fewshot.methods.atha import ATHA
from tir_kernels.fewshot.methods.lora import LoRA

SETTINGS = {"steps": 4, "lora_lr": 1e-2, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def model():
    return make_model()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_move_is_that_of_the_equation(model):
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(2, 3, 16, generator=generator)
    hidden = torch.randn(4, 17, 32, generator=generator)
    with add_pull_push(model, 0.7, 0.2, pull_layers=[1], head_ratio=0.2, tail_ratio=0.3,
                       num_episodes=2) as moving, torch.no_grad():  # fmt: skip
        moving.pull[1] *= 2
        moving.set_class_embeddings(classes)
        found = [moving.moved(hidden, layer).numpy() for layer in (1, 2)]
    t = classes.double().numpy()
    t = (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-5)
    t = t @ model.visual.proj.detach().double().numpy().T
    for layer, pull in enumerate([(0.7, 1.4), (0.0, 0.0)]):
        expected = hidden.double().numpy()
        for image in range(4):
            own, x = t[image // 2], expected[image, 1:]
            c = unit(x) @ unit(own).T
            order = c.max(1).argsort()
            near, far = c.argmax(1), c.argmin(1)
            for patch in order[-3:]:
                x[patch] += pull[image // 2] * own[near[patch]]
            for patch in order[:4]:
                x[patch] -= 0.2 * own[far[patch]]
        np.testing.assert_allclose(found[layer], expected, rtol=1e-4, atol=1e-4)


def test_without_strengths_it_changes_nothing(model):
    images = EPISODES[0].support_images
    with torch.no_grad():
        expected = model.encode_image(images)
        with add_pull_push(model, 0.0, 0.0) as moving:
            moving.set_class_embeddings(torch.randn(1, 3, 16))
            assert torch.equal(model.encode_image(images), expected)
        assert torch.equal(model.encode_image(images), expected)


def test_with_empty_shares_it_is_lora(model):
    plain = LoRA(
        context_tokens=0, logit_scale=100.0, lora_towers="vision", lora_schedule="cosine/8",
        **SETTINGS,
    )  # fmt: skip
    expected = finetune_episode(model, make_tokenizer(), EPISODES[0], plain)
    method = ATHA(head_ratio=0, tail_ratio=0, **SETTINGS)
    found = finetune_episode(model, make_tokenizer(), EPISODES[0], method)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.query_logits, expected.query_logits, rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_at_once_is_alone_and_strengths_are_learned(model):
    episodes = [draw_episode(index, ["a cat", "a dog", "a cow"]) for index in range(2)]
    method = ATHA(**SETTINGS)
    together = finetune_episodes(model, make_tokenizer(), episodes, method)
    for episode, found in zip(episodes, together, strict=True):
        alone = finetune_episode(model, make_tokenizer(), episode, method)
        torch.testing.assert_close(found.query_logits, alone.query_logits, atol=2e-2, rtol=1e-3)
        assert found.trained["push"].std() > 0
        assert found.trained["pull"][1] != 0.8


def test_a_tower_without_projection_is_refused():
    pooled = {"image_size": 32, "layers": 5, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    pooling = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
    model = open_clip.CLIP(16, pooled | pooling, text).eval()
    with pytest.raises(TypeError, match="does not end in one linear projection"):
        add_pull_push(model)
