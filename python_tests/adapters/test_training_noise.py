"""Noise of the image tower in training: what is drawn, for whom, and that it ends."""

from functools import partial

import pytest
import torch
from adapters.towers_to_change import MODELS, encode
from tiny_clip import Untouched, make_clip, make_images, refused

from tir_kernels import adapters
from tir_kernels.adapters.training_noise import _Draws
from tir_kernels.towers import vision_tower

slow_but_open_clip = [
    pytest.param(name, marks=() if name == "open_clip" else pytest.mark.slow)
    for name in MODELS
    if name != "rotary"
]


def test_normal_numbers_are_normal():
    draws = _Draws([3, 4], torch.device("cpu"), "auto")
    drawn = draws.normal((4, 16, 256), 254)
    assert drawn.shape == (2, 4, 16, 256)
    for own in drawn:
        numbers = own.flatten()
        ordered = numbers.sort().values
        expected = torch.distributions.Normal(0, 1).icdf((torch.arange(16384) + 0.5) / 16384)
        # Kolmogorov's distance, of which 1.63 / sqrt(n) is exceeded once in a hundred.
        cumulative = torch.distributions.Normal(0, 1).cdf(ordered)
        uniform = (torch.arange(16384) + 0.5) / 16384
        assert (cumulative - uniform).abs().max() < 1.63 / 128
        assert (ordered - expected)[100:-100].abs().max() < 0.2
        assert abs(torch.corrcoef(own.flatten(0, 1)).triu(1)).max() < 0.35
    assert torch.equal(draws.normal((4, 16, 256), 254), drawn)
    assert torch.equal(draws.normal((2, 16, 256), 254), drawn[:, :2])  # of each image by itself
    draws.step += 1
    assert (draws.normal((4, 16, 256), 254) == drawn).float().mean() < 1e-3
    alone = _Draws([4], torch.device("cpu"), "auto")
    assert torch.equal(alone.normal((4, 16, 256), 254)[0], drawn[1])


@pytest.mark.parametrize("name", slow_but_open_clip)
@torch.no_grad()
def test_it_is_on_in_training_alone(name):
    model, images = MODELS[name](), make_images()
    before, plain = Untouched(model), encode(model, images)
    for add in (
        partial(adapters.add_temperature_dropout, model, 0.7),
        partial(adapters.add_random_registers, model, 3, 1.0),
    ):
        with add([1, 2]) as noise:
            torch.testing.assert_close(encode(model, images), plain, rtol=1e-4, atol=1e-5)
            noise.train()
            first = encode(model, images)
            assert first.shape == plain.shape
            assert not torch.allclose(first, plain, atol=1e-3)
            assert torch.equal(encode(model, images), first)
            noise.next_step()
            assert not torch.allclose(encode(model, images), first, atol=1e-4)
            noise.train(False)
            torch.testing.assert_close(encode(model, images), plain, rtol=1e-4, atol=1e-5)
        before.check()


@torch.no_grad()
def test_blocks_are_off_as_often_as_is_said():
    model, images = make_clip(), make_images(4)
    scores = []

    class Reader:
        def enter(self, hidden):
            return hidden, self.read

        def read(self, call, hidden):
            scores.append(call.query.abs().amax((1, 2, 3)) > 0)
            return call

    noise = adapters.add_temperature_dropout(model, 0.75, [1, 2])
    noise.train()
    reader = Reader()
    for block in vision_tower(model).blocks:
        block.put(reader, changes_attention=True)
    for _ in range(100):
        model.encode_image(images)
        noise.next_step()
    on = torch.stack(scores).view(100, 6, 2, 2)
    assert torch.equal(on[..., 0], on[..., 1])  # the images of an episode
    shares = on[..., 0].float()
    assert abs(shares.mean() - 0.25) < 3 * (0.25 * 0.75 / 1200) ** 0.5
    # Neither blocks nor episodes go together.
    together = torch.corrcoef(shares.flatten(1).T)
    assert (together - torch.eye(12)).abs().max() < 0.4


def test_the_scale_of_registers_has_a_gradient():
    model, images = make_clip(), make_images()
    with adapters.add_random_registers(model, 2, 0.5, [7, 8]) as noise:
        noise.train()
        features = model.encode_image(images)
        (grad,) = torch.autograd.grad(features[:2].square().sum(), noise.scale)
        assert grad[0] != 0
        assert grad[1] == 0  # of the other episode
        with torch.no_grad():
            step = 1e-2
            ends = []
            for change in (step, -step):
                noise.scale[0] = 0.5 + change
                ends.append(model.encode_image(images)[:2].square().sum())
        torch.testing.assert_close(grad[0], (ends[0] - ends[1]) / (2 * step), rtol=0.05, atol=1e-3)
        with torch.no_grad():
            noise.scale.fill_(-0.5)
            positive = model.encode_image(images)
        torch.testing.assert_close(positive, features.detach())


def test_what_is_refused():
    model = make_clip()
    with refused(model, ValueError, r"probability must lie in \[0, 1\); got 1"):
        adapters.add_temperature_dropout(model, 1)
    with refused(model, ValueError, "registers must be at least 1; got 0"):
        adapters.add_random_registers(model, 0)
