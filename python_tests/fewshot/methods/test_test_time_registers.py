"""Test-time registers: neurons found on the support, and episodes that have none."""

import warnings

import pytest
import torch
from fewshot.training_cases import EPISODES, make_model, make_tokenizer

from tir_kernels import adapters
from tir_kernels.fewshot import finetune_episode, finetune_episodes
from tir_kernels.fewshot.methods.registers import TestTimeRegisters
from tir_kernels.fewshot.methods.zero_shot import ZeroShot

# Below the norms of all patches, so that each stands out.
METHOD = TestTimeRegisters(register_neurons=3, norm_cut=1e-3)


@pytest.fixture(scope="module")
def model():
    return make_model()


def learn(model, method, episode=EPISODES[0]):
    return finetune_episode(model, make_tokenizer(), episode, method)


@torch.no_grad()
def test_neurons_are_those_of_the_support_images(model):
    result = learn(model, METHOD)
    episode = EPISODES[0]
    (expected,) = adapters.find_register_neurons(model, episode.support_images, 3, norm_cut=1e-3)
    assert result.trained["neurons"].tolist() == [list(map(float, each)) for each in expected]
    prompts = make_tokenizer()([f"a photo of a {name}." for name in episode.class_names])
    text = model.encode_text(prompts, normalize=True)
    with adapters.add_test_time_registers(model) as handle:
        handle.set_neurons([expected])
        images = model.encode_image(episode.query_images, normalize=True)
    torch.testing.assert_close(result.query_logits, 4 * images @ text.T, rtol=1e-3, atol=2e-3)
    plain = learn(model, ZeroShot()).query_logits
    assert not torch.allclose(result.query_logits, plain, atol=5e-3)


def test_without_outliers_it_is_said_and_the_tower_is_left_as_it_is(model):
    expected = learn(model, ZeroShot()).query_logits
    with pytest.warns(UserWarning, match="test-time-registers: no register neurons found"):
        result = learn(model, TestTimeRegisters(norm_cut=1e9))
    # Zero-shot asks its last block for the class token alone, whose sums have another order.
    torch.testing.assert_close(result.query_logits, expected, rtol=1e-6, atol=1e-6)
    assert (result.trained["neurons"] == -1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without_any = learn(model, TestTimeRegisters(register_neurons=0))
    assert torch.equal(without_any.query_logits, result.query_logits)


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["text", "centroid"])
def test_at_once_is_as_alone(model, classifier):
    """Also where some episodes have no neurons, and others have."""
    norms = sorted(
        torch.cat([each.flatten() for each in norms_at_the_end(model, episode)]).max().item()
        for episode in EPISODES
    )
    cut = (norms[0] + norms[1]) / 2  # one episode has no patch above it
    method = TestTimeRegisters(norm_cut=cut, classifier=classifier)
    with pytest.warns(UserWarning, match="no register neurons"):
        together = finetune_episodes(model, make_tokenizer(), EPISODES, method)
    has_none = [bool((result.trained["neurons"] == -1).all()) for result in together]
    assert sorted(has_none) == [False, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [learn(model, method, episode) for episode in EPISODES]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.query_logits, other.query_logits, atol=1e-4, rtol=0)
        assert torch.equal(one.trained["neurons"], other.trained["neurons"])


@torch.no_grad()
def norms_at_the_end(model, episode):
    kept = []
    block = model.visual.transformer.resblocks[-1]
    hook = block.register_forward_hook(lambda _, inputs, output: kept.append(output[:, 1:]))
    model.encode_image(episode.support_images)
    hook.remove()
    return [tokens.norm(dim=-1) for tokens in kept]


def test_what_is_refused(model):
    with pytest.raises(ValueError, match="register_value must be one of neuron, layer"):
        TestTimeRegisters(register_value="mean")
    with pytest.raises(ValueError, match="registers must be at least 0"):
        TestTimeRegisters(registers=-1)
    with pytest.raises(ValueError, match="register_layer must lie between 0 and 4; got 5"):
        learn(model, TestTimeRegisters(register_layer=5))
