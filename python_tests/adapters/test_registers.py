"""Tokens appended to an image's own, and neurons whose work they take over."""

import copy

import numpy as np
import pytest
import torch
from adapters.towers_to_change import MODELS, encode
from tiny_clip import Untouched, make_clip, make_images, refused

from tir_kernels import adapters, towers
from tir_kernels.adapters.registers import AppendedTokens, Neuron
from tir_kernels.towers import vision_tower
from tir_kernels.towers.hooks import on_neurons, on_output

TAKING = [name for name in MODELS if name != "rotary"]
slow_but_open_clip = [
    pytest.param(name, marks=() if name == "open_clip" else pytest.mark.slow) for name in TAKING
]
NEURONS = [Neuron(1, 5), Neuron(3, 0), Neuron(1, 9)]


def run_in_parts(model, images):
    encoder = towers.ImageEncoder(model)
    return encoder.features(encoder.embed(images))


def plain_blocks(model, hidden, neurons, value="neuron", registers=1):
    """open_clip's blocks on tokens with registers behind them, and the edit written out."""
    for layer, block in enumerate(model.visual.transformer.resblocks):
        tokens = block.ln_1(hidden)
        hidden = hidden + block.attn(tokens, tokens, tokens, need_weights=False)[0]
        mlp = block.mlp
        acts = mlp.gelu(mlp.c_fc(block.ln_2(hidden))).clone()
        for image in range(len(acts)):
            own = [neuron.number for neuron in neurons if neuron.layer == layer]
            found = {}
            for number in own:
                column = acts[image, :, number]
                found[number] = column[column.abs().argmax()].item()
            for number in own:
                among = list(found.values()) if value == "layer" else [found[number]]
                acts[image, 1:-registers, number] = 0
                acts[image, -registers:, number] = max(among, key=abs)
        hidden = hidden + mlp.c_proj(acts)
    return hidden


@pytest.mark.parametrize(("value", "registers"), [("neuron", 1), ("layer", 2)])
@torch.no_grad()
def test_registers_take_over_from_patches(value, registers):
    model, images = make_clip(), make_images()
    before, plain = Untouched(model), model.encode_image(images)
    tower = vision_tower(model)
    zeros = model.visual.ln_pre(torch.zeros(4, registers, 32))
    hidden = torch.cat([tower.embed(images), zeros], 1)
    expected = tower.pool(plain_blocks(model, hidden, NEURONS, value, registers))
    with adapters.add_test_time_registers(model, registers, value) as handle:
        assert torch.equal(model.encode_image(images), plain)  # none are set
        handle.set_neurons([NEURONS])
        found = model.encode_image(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run_in_parts(model, images), found)
        # Of each group its own, as alone.
        other = [Neuron(2, 7)]
        handle.set_neurons([other])
        alone = model.encode_image(images[2:])
        handle.set_neurons([NEURONS, other])
        together = model.encode_image(images)
        torch.testing.assert_close(together, torch.cat([found[:2], alone]))
        handle.set_neurons([[]])
        assert torch.equal(model.encode_image(images), plain)
    assert not torch.allclose(found, plain, atol=1e-3)
    before.check()


@torch.no_grad()
def test_a_block_in_its_fast_form_sees_the_edit():
    model, images = make_clip(), make_images()
    with adapters.add_test_time_registers(model) as handle:
        handle.set_neurons([NEURONS])
        expected = model.encode_image(images)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with towers.frozen_mlps(model), adapters.add_test_time_registers(model) as handle:
        assert type(model.visual.transformer.resblocks[0].mlp) is not torch.nn.Sequential
        handle.set_neurons([NEURONS])
        torch.testing.assert_close(model.encode_image(images), expected)


@torch.no_grad()
def test_the_last_block_sees_the_edit_beside_lora():
    """Though LoRA's engine runs it for the class token alone."""
    model, images = make_clip(), make_images()
    own = [Neuron(5, 3), Neuron(0, 1)]
    with adapters.add_test_time_registers(model) as handle:
        handle.set_neurons([own])
        expected = model.encode_image(images)
    with adapters.add_lora(model), adapters.add_test_time_registers(model) as handle:
        handle.set_neurons([own])
        found = run_in_parts(model, images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Appended(AppendedTokens):
    """Tokens of one number, far from any patch's."""

    count = 2

    def tokens(self, hidden):
        return torch.full((len(hidden), 2, hidden.shape[2]), 1.5)


@pytest.mark.parametrize("name", slow_but_open_clip)
@torch.no_grad()
def test_appended_tokens_are_attended_to_and_leave_at_the_end(name):
    model, images = MODELS[name](), make_images()
    before, plain = Untouched(model), encode(model, images)
    tower = vision_tower(model)
    lengths, neurons = [], []
    with Appended(tower):
        block = vision_tower(model).blocks[1]
        hooks = (
            on_output(block, lambda tokens: lengths.append(tokens.shape)),
            on_neurons(block, lambda values: neurons.append(values.shape)),
        )
        found = encode(model, images)
        assert found.shape == plain.shape
        last = tower.blocks[-1](torch.cat([tower.embed(images), torch.zeros(4, 2, 32)], 1))
        torch.testing.assert_close(run_in_parts(model, images), found, rtol=1e-4, atol=1e-5)
        for hook in hooks:
            hook.remove()
    length = tower.embed(images).shape[1]
    assert last.shape[1] == length
    assert set(lengths) == {(4, length + 2, 32)}
    assert {shape[:2] for shape in neurons} == {(4, length + 2)}
    assert not torch.allclose(found, plain, atol=1e-3)
    before.check()


def shift_a_patch(model, layer, number, patch):
    """Let one neuron of a block write much of one direction wherever a patch has a mark."""
    block = model.visual.transformer.resblocks[layer]
    block.mlp.c_proj.weight[:, number] = 40.0
    values = []

    def see(activations):
        activations = activations.clone()
        activations[:, :, number] = 0.01
        activations[:, patch, number] = 3.0
        values.append(activations)
        return activations

    return on_neurons(vision_tower(model).blocks[layer], see)


@torch.no_grad()
def test_the_neuron_behind_an_outlier_is_found_and_moved():
    model, images = make_clip(), make_images()
    assert adapters.find_register_neurons(model, images) == [[]]
    hook = shift_a_patch(model, 1, 17, patch=6)

    def largest_norms(tokens):
        hidden = tokens
        for block in vision_tower(model).blocks:
            hidden = block(hidden)
        return hidden[:, 1:].norm(dim=-1).amax(1)

    tokens = vision_tower(model).embed(images)
    before = largest_norms(tokens)
    ((first, *others),) = adapters.find_register_neurons(model, images, 4)
    assert first == Neuron(1, 17)
    assert len(others) == 3
    assert all(neuron.layer <= 2 for neuron in others)
    # By the tokens of two groups; the scores of the published program, written out.
    groups = adapters.find_register_neurons(model, tokens, 4, groups=2)
    assert [own[0] for own in groups] == [first] * 2
    scores = {}
    hooks = [
        on_neurons(block, lambda values, layer=layer: scores.__setitem__(layer, values))
        for layer, block in enumerate(vision_tower(model).blocks[:3])
    ]
    largest_norms(tokens[:2])
    for each in hooks:
        each.remove()
    flat = torch.cat([scores[layer][:, 6].abs().mean(0) for layer in range(3)])
    best = flat.argsort(descending=True)[:4].tolist()
    assert groups[0] == [Neuron(each // 128, each % 128) for each in best]
    with adapters.add_test_time_registers(model) as handle:
        handle.set_neurons([[first]])
        assert (largest_norms(tokens) < before / 2).all()
    hook.remove()
    assert (
        adapters.find_register_neurons(model, images, norm_cut=0.0, last_layer=0)[0][0].layer == 0
    )


@torch.no_grad()
def test_images_without_outliers_do_not_count():
    model, images = make_clip(), make_images()
    hook = on_neurons(vision_tower(model).blocks[0], lambda values: seen(values))

    def seen(values):
        values = values.clone()
        values[:1, 3, 2] += 500.0  # in the first image alone
        return values

    model.visual.transformer.resblocks[0].mlp.c_proj.weight[:, 2] = 1.0
    both, alone = adapters.find_register_neurons(model, images, 3, groups=2)
    assert both[0] == Neuron(0, 2)
    assert alone == []
    hook.remove()


@torch.no_grad()
def test_a_copy_has_neurons_of_its_own():
    model, images = make_clip(), make_images()
    with adapters.add_test_time_registers(model) as handle:
        handle.set_neurons([NEURONS])
        expected = model.encode_image(images)
        copied = copy.deepcopy(model)
        handle.set_neurons([[Neuron(0, 0)]])
        torch.testing.assert_close(copied.encode_image(images), expected)
        assert not torch.allclose(model.encode_image(images), expected, atol=1e-4)


def test_what_is_refused():
    model = make_clip()
    with refused(model, ValueError, "registers must be at least 0; got -1"):
        adapters.add_test_time_registers(model, -1)
    with refused(model, ValueError, "value must be one of neuron, layer; got 'mean'"):
        adapters.add_test_time_registers(model, value="mean")
    with adapters.add_reweighting(model), pytest.raises(RuntimeError, match="would take registers"):
        adapters.add_test_time_registers(model)
    with torch.no_grad():
        plain = model.encode_image(make_images())
    with adapters.add_test_time_registers(model) as handle:
        for neuron, message in (
            (Neuron(6, 0), "of blocks 0 to 5; got block 6"),
            (Neuron(2, 128), r"of block 2 must be of 0 to 127; got \[128\]"),
        ):
            with pytest.raises(ValueError, match=message):
                handle.set_neurons([[NEURONS[0], neuron]])
            with torch.no_grad():
                assert torch.equal(model.encode_image(make_images()), plain)
        handle.set_neurons([NEURONS, NEURONS])
        with pytest.raises(ValueError, match="2 groups, of which 3 images are no whole number"):
            model.encode_image(make_images(3))
    with pytest.raises(ValueError, match="last_layer must lie between 0 and 5; got 6"):
        adapters.find_register_neurons(model, make_images(), last_layer=6)
    with pytest.raises(ValueError, match="groups must divide the 4 images; got 3"):
        adapters.find_register_neurons(model, make_images(), groups=3)


@pytest.mark.slow
def test_towers_that_take_no_registers():
    rotary = MODELS["rotary"]()
    with refused(rotary, TypeError, "a Eva, takes no registers"):
        adapters.add_test_time_registers(rotary)
    import small_transformers

    packed = small_transformers.make_siglip2()
    with refused(packed, TypeError, "a Siglip2VisionModel, takes no registers"):
        adapters.add_test_time_registers(packed)


def test_an_unknown_mlp_is_refused():
    model = make_clip()
    for block in model.visual.transformer.resblocks:
        block.mlp = torch.nn.Identity()
    with pytest.raises(TypeError, match="an MLP of kind Identity, whose neurons are not known"):
        on_neurons(vision_tower(model).blocks[0], np.asarray)
