"""A prediction depends on no other image, and merging LoRA changes nothing but rounding."""

import pytest
import torch
from fewshot.predict.conftest import fitted

from tir_kernels.fewshot import methods

METHODS = {
    "tokens": methods.TIR(steps=2, lora_lr=1e-3, placement="tokens"),
    "attention": methods.TIR(steps=2, lora_lr=1e-3, placement="attention"),
    "both": methods.TIR(steps=2, lora_lr=1e-3, placement="both"),
    "lora": methods.LoRA(steps=2, lora_lr=1e-3),
}


@pytest.fixture(scope="module", params=METHODS)
def made(request, drawn):
    return fitted(drawn, METHODS[request.param])


@pytest.fixture(scope="module")
def inputs(drawn):
    from PIL import Image

    from tir_kernels.demo import model_directory
    from tir_kernels.towers.loading.models import load_model

    preprocess = load_model(str(model_directory())).preprocess
    paths = sorted(drawn.rglob("*.png"))
    return torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])


@pytest.mark.slow
def test_alone_in_any_batch_and_in_any_order(made, inputs):
    with made.open() as scorer:
        expected = scorer.logits(inputs)
        alone = torch.cat([scorer.logits(image[None]) for image in inputs])
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        mixed = torch.empty_like(expected)
        mixed[order] = torch.cat([scorer.logits(some) for some in inputs[order].split(4)])
        repeated = scorer.logits(inputs[3:4].expand(7, -1, -1, -1))
    for found in (alone, mixed):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(repeated, expected[3:4].expand(7, -1), atol=2e-5, rtol=1e-5)


def branches(made, inputs):
    """Logits with LoRA as it was trained, in branches of their own."""
    with made.learner() as learner, torch.no_grad():
        return learner.logits(learner.inputs(inputs[None]), learner.classes())[0].float()


def merged(made, inputs):
    with made.open() as scorer:
        return scorer.logits(inputs)


def scaled(made):
    """The classifier with LoRA as large as after a long training."""
    from tir_kernels.fewshot.classifier.classifier import Classifier

    learned = {
        name: 20 * each if name.endswith(".B") else each for name, each in made.learned.items()
    }
    return Classifier(made.about, made.model, learned, made.runtime)


@pytest.mark.slow
def test_merged_weights_give_the_logits_of_the_branches(made, inputs):
    for each in (made, scaled(made)):
        expected = branches(each, inputs)
        torch.testing.assert_close(merged(each, inputs), expected, atol=2e-5, rtol=1e-5)
    plain = branches(made, inputs)
    assert (expected - plain).abs().max() > 0.1, "LoRA does something"


@pytest.mark.slow
def test_in_bfloat16_merging_stays_within_twice_the_error_of_the_branches(made, inputs):
    each = scaled(made)
    exact = branches(each, inputs)
    low = each.with_precision("bfloat16")
    errors = [(found(low, inputs) - exact).square().mean().sqrt() for found in (branches, merged)]
    assert errors[1] <= 2 * errors[0]


@pytest.mark.slow
def test_the_model_is_left_to_the_bit(made, inputs):
    model = made.model.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with made.open() as scorer:
        scorer.logits(inputs[:2])
        assert any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds
