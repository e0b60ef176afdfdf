"""ProLIP against plain steps of Adam on the last projection, and the towers that have one."""

import numpy as np
import open_clip
import pytest
import timm
import torch
from fewshot.frozen_cases import falling, learn, parts_of, stepped, with_views
from fewshot.training_cases import EPISODES, make_model
from torch.nn.functional import normalize

from tir_kernels.fewshot import finetune_episode
from tir_kernels.fewshot.methods.prolip import ProLIP
from tir_kernels.fewshot.methods.zero_shot import ZeroShot
from tir_kernels.towers import ImageEncoder


@pytest.fixture(scope="module")
def model():
    return make_model()


def unprojected(model, images):
    """What the final norm gives for the class token, in float64."""
    seen = []
    hook = model.visual.ln_post.register_forward_hook(lambda *parts: seen.append(parts[2][:, 0]))
    with torch.no_grad():
        model.encode_image(images)
    hook.remove()
    return seen[0].double()


@pytest.mark.parametrize("penalty", [None, pytest.param(3.0, marks=pytest.mark.slow)])
def test_steps(model, penalty):
    views = 3
    episode = with_views(views, (0, 0, 0, 0, 1, 2))
    support, queries = (
        unprojected(model, images) for images in (episode.support_images, episode.query_images)
    )
    texts = torch.tensor(parts_of(model, episode).texts)
    original = model.visual.proj.detach().double()
    projection = original.clone().requires_grad_()
    step = [0]

    def logits(features):
        return 100 * normalize(features @ projection, dim=1) @ texts.T

    def shown():
        step[0] += 1
        return logits(support[(step[0] - 1) % views :: views])

    factor = 0.5 if penalty is None else penalty  # two shots
    optimizer = torch.optim.Adam([projection], eps=1e-4)
    losses = stepped(
        shown,
        episode.support_labels[::views],
        optimizer,
        falling(0.01, 5),
        lambda: factor * (projection - original).square().sum(),
    )
    method = ProLIP(steps=5, feature_lr=0.01, projection_penalty=penalty)
    result = learn(model, method, episode)
    np.testing.assert_allclose(result.losses, losses, rtol=2e-3, atol=1e-3)
    with torch.no_grad():
        np.testing.assert_allclose(result.query_logits, logits(queries), rtol=5e-3, atol=2e-2)


def test_without_steps_it_is_zero_shot(model):
    expected = learn(model, ZeroShot(logit_scale=100), EPISODES[0]).query_logits
    found = learn(model, ProLIP(steps=0), EPISODES[0]).query_logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_large_penalty_keeps_the_projection(model):
    options = {"steps": 30, "feature_lr": 1e-4}
    free, held = (
        (
            learn(model, ProLIP(projection_penalty=p, **options), EPISODES[0]).trained["projection"]
            - model.visual.proj.detach()
        ).norm()
        for p in (0, 1e5)
    )
    assert held < free / 3


@pytest.mark.slow
def test_towers_without_a_projection_at_their_end_are_refused():
    alone = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
    with pytest.raises(TypeError, match="prolip trains the projection that an image tower ends"):
        finetune_episode(alone, None, EPISODES[0], ProLIP())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
        {"attentional_pool": "parallel", "attn_pooler_heads": 2, "output_dim": 32},
        {"attentional_pool": "cascade", "attn_pooler_heads": 2, "output_dim": 32},
    ],
)
def test_features_are_projected_in_open_clip(settings):
    torch.manual_seed(0)
    settings = {"output_dim": 16, **settings}
    tower = open_clip.transformer.VisionTransformer(32, 8, 32, 3, 2, 4.0, **settings).eval()
    images = torch.randn(2, 3, 32, 32)
    encoder = ImageEncoder(tower)
    with torch.no_grad():
        tokens = encoder.embed(images)
        features = encoder.features(tokens)
        found = encoder.unprojected(tokens) @ encoder.projection
        whole = tower(images)
    assert torch.equal(found, features)
    torch.testing.assert_close(features, whole.reshape(features.shape), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_features_are_projected_in_transformers_clip():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = {**sizes, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    texts = {**sizes, "num_hidden_layers": 1, "vocab_size": 9}
    config = transformers.CLIPConfig(text_config=texts, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    encoder = ImageEncoder(model)
    with torch.no_grad():
        tokens = encoder.embed(torch.randn(2, 3, 32, 32))
        found = encoder.unprojected(tokens) @ encoder.projection
        torch.testing.assert_close(found, encoder.features(tokens))
    config = transformers.SiglipConfig(text_config=texts, vision_config=vision)
    assert ImageEncoder(transformers.SiglipModel(config).eval()).projection is None


def test_ranges():
    with pytest.raises(ValueError, match="projection_penalty must be a finite number of at least"):
        ProLIP(projection_penalty=-1)
    with pytest.raises(ValueError, match="steps must be at least 0; got -3"):
        ProLIP(steps=-3)
