"""What measures are shown of a tower, and that the tower does not notice."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from analysis.views import attention, encode, make_towers, make_view
from torch import nn

from tir_kernels import WeightRule, adapters, analysis, token_weights
from tir_kernels.analysis.measures import BlockView, Finding
from tir_kernels.towers import vision_tower


class Views:
    """Keeps every view."""

    name = "views"

    def __init__(self):
        self.views: list[BlockView] = []

    def of_block(self, view):
        self.views.append(view)
        return [Finding("block", view.block, torch.full((len(view.hidden),), view.block), 0.0)]


def views_of(model, images, **known):
    keeper = Views()
    analysis.measure(model, images, [keeper], **known)
    return keeper.views


def assert_pooled(tower, views, expected):
    """Rounding of a sum is a share of its terms, not of what is left of them."""
    found, largest = tower.pool(views[-1].output), expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)


TOWERS = ["open_clip", "registers", "registers alone", "patches alone"]


@pytest.mark.parametrize("name", TOWERS)
def test_views_hold_what_hooks_see(name):
    model, width = make_towers()[name]
    images, classes = torch.randn(3, 3, 32, 32), torch.randn(4, width)
    seen = []
    modules = [block.module for block in vision_tower(model).blocks]
    hooks = [
        module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        for module in modules
    ]
    encode(model, images)
    for hook in hooks:
        hook.remove()
    labels = torch.tensor([0, 3, 1])
    views = views_of(model, images, labels=labels, class_embeddings=classes, top_ratio=0.5)
    assert [view.block for view in views] == list(range(5))
    for view, (hidden, output) in zip(views, seen, strict=True):
        torch.testing.assert_close(view.hidden, hidden)
        torch.testing.assert_close(view.output, output)
        assert view.num_blocks == 5
        prefix = {"open_clip": 1, "registers": 5, "registers alone": 4, "patches alone": 0}[name]
        assert view.num_prefix_tokens == prefix
        assert view.num_class_tokens == (name in ("open_clip", "registers"))
        assert view.labels is labels
        assert view.top_ratio == 0.5
        assert view.counts.shape == (3, 16)
        assert (view.num_groups, view.num_classes) == (1, 4)
        assert view.relevance.isfinite().all()


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("placement", ["tokens", "attention", "both", "values"])
def test_adapters_are_on_while_it_is_read(name, placement):
    model, width = make_towers()[name]
    images, classes = torch.randn(2, 3, 32, 32), torch.randn(3, width)
    with adapters.add_lora(model, towers=["visual"], rank=2) as lora:
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.3)
        plain = views_of(model, images)
        with adapters.add_reweighting(model, [1, 3], placement) as handle:
            handle.set_class_embeddings(classes)
            expected = encode(model, images)
            counts = dict(handle.last_counts)
            views = views_of(model, images, class_embeddings=classes)
            tower = vision_tower(model)
            assert_pooled(tower, views, expected)
            for layer in (1, 3):
                assert torch.equal(views[layer].counts, counts[layer].long())
                weights = views[layer].call.key_weights
                assert (weights is None) == (placement in ("tokens", "values"))
            assert not torch.allclose(views[1].output, plain[1].output)
            assert torch.equal(views[1].hidden, plain[1].hidden)
        assert all(view.call.key_weights is None for view in plain)
        assert_pooled(tower, plain, encode(model, images))


@pytest.mark.parametrize("name", TOWERS)
def test_episodes_at_once_are_as_alone(name):
    model, width = make_towers()[name]
    images, classes = torch.randn(6, 3, 32, 32), torch.randn(3, 4, width)
    with adapters.add_lora(model, towers=["visual"], rank=2, num_episodes=3) as lora:
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.3)
        factors = {name: (a.clone(), b.clone()) for name, (a, b) in lora.factors().items()}
        with adapters.add_reweighting(model, placement="attention") as handle:
            handle.set_class_embeddings(classes)
            at_once = views_of(model, images, class_embeddings=classes)
    assert at_once[0].num_groups == 3
    for episode in range(3):
        own = slice(2 * episode, 2 * episode + 2)
        with adapters.add_lora(model, towers=["visual"], rank=2) as lora:
            lora.set_factors(
                {name: a[episode] for name, (a, _) in factors.items()},
                {name: b[episode] for name, (_, b) in factors.items()},
            )
            with adapters.add_reweighting(model, placement="attention") as handle:
                handle.set_class_embeddings(classes[episode])
                alone = views_of(model, images[own], class_embeddings=classes[episode])
        for one, other in zip(at_once, alone, strict=True):
            torch.testing.assert_close(one.output[own], other.output, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.received[own], other.received, atol=1e-4, rtol=1e-4)
            assert torch.equal(one.counts[own], other.counts)


class OutputOfAnotherThread(Views):
    """Runs the model in another thread while each block is read."""

    def __init__(self, model, images):
        super().__init__()
        self.model, self.images = model, images
        self.outputs = []

    def of_block(self, view):
        with ThreadPoolExecutor(1) as pool:
            self.outputs.append(pool.submit(encode, self.model, self.images).result())
        return super().of_block(view)


@pytest.mark.parametrize("name", TOWERS)
def test_the_model_does_not_notice(name):
    """Neither its bits nor its modes, hooks, class or the process's random numbers."""
    model, width = make_towers()[name]
    images, other = torch.randn(2, 3, 32, 32), torch.randn(5, 3, 32, 32)
    model.train()
    with adapters.add_reweighting(model, [2], "attention") as handle:
        handle.set_class_embeddings(torch.randn(3, width))
        expected = encode(model, other)
        before = [(module, type(module), dict(vars(module))) for module in model.modules()]
        random = torch.get_rng_state()
        measure = OutputOfAnotherThread(model, other)
        analysis.measure(model, images, [measure])
        assert torch.equal(torch.get_rng_state(), random)
        for module, kind, fields in before:
            assert type(module) is kind
            assert vars(module) == fields
            assert module.training
        assert len(measure.outputs) == 5
        assert all(torch.equal(output, expected) for output in measure.outputs)


def test_two_threads_read_one_model():
    model, width = make_towers()["registers"]
    classes = torch.randn(3, width)
    batches = [torch.randn(1 + number, 3, 32, 32) for number in range(4)]
    with adapters.add_reweighting(model, [2], "attention") as handle:
        handle.set_class_embeddings(classes)
        expected = [views_of(model, images, class_embeddings=classes) for images in batches]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                found = list(
                    pool.map(lambda each: views_of(model, each, class_embeddings=classes), batches)
                )
                for own, alone in zip(found, expected, strict=True):
                    for one, other in zip(own, alone, strict=True):
                        assert torch.equal(one.output, other.output)
                        assert torch.equal(one.received, other.received)
                        assert torch.equal(one.counts, other.counts)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    model, width = make_towers()[name]
    model.to(dtype)
    images, classes = torch.randn(1, 3, 32, 32, dtype=dtype), torch.randn(1, width)
    for view in views_of(model, images, class_embeddings=classes):
        assert view.output.dtype == dtype
        assert view.received.dtype == view.relevance.dtype == torch.float32
        torch.testing.assert_close(view.received.sum(-1), torch.ones(1, 2))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("is_masked", [False, True])
def test_received_attention_is_the_mean_column(prefix, is_masked):
    view = make_view(prefix)
    length = prefix + 16
    weights = torch.rand(4, length, generator=torch.Generator().manual_seed(1))
    call = view.call._replace(key_weights=weights)
    if is_masked:
        call = view.call._replace(mask=weights.log()[:, None, None].expand(4, 2, length, length))
    view = make_view(prefix, call=call)
    expected = attention(make_view(prefix, call=view.call._replace(key_weights=weights, mask=None)))
    np.testing.assert_allclose(view.received, expected.mean(2), atol=1e-6)
    np.testing.assert_allclose(view.class_token_row, expected[:, :, 0], atol=1e-6)
    statistics = view.attention
    np.testing.assert_allclose(
        statistics.received_from_patches, expected[:, :, prefix:].mean(2), atol=1e-6
    )
    entropy = -(expected * np.log(expected)).sum(3)
    np.testing.assert_allclose(statistics.entropy, entropy, atol=1e-5)
    assert statistics.log_sum_exp.shape == (4, 2, length)


def test_selection_is_the_operators():
    """Ties and NaN included."""
    view = make_view(1, classes=7, top_ratio=0.5)
    hidden = view.hidden.clone()
    hidden[:, 5] = hidden[:, 9]
    hidden[:, 12] = torch.nan
    hidden[0] = 1.0
    view = make_view(1, hidden=hidden, classes=7, top_ratio=0.5)
    expected = token_weights(hidden, view.class_embeddings, rule=WeightRule(top_ratio=0.5)).counts
    assert torch.equal(view.counts, expected.long())
    assert (view.selected.sum(2) == 8).all()


def test_averages():
    values = torch.tensor([1.0, torch.nan, torch.nan, torch.nan])
    finding = Finding("x", 0, values, torch.tensor([1.0, 2.0, torch.nan, 3.0]))
    assert finding.averages() == [(1.0, 1.0)]
    assert finding.averages(2) == [(1.0, 1.0), (None, 3.0)]
    assert Finding("x", 0, values, 0.25).averages(2) == [(1.0, 0.25), (None, 0.25)]


@pytest.mark.parametrize(
    ("known", "error", "message"),
    [
        ({"labels": torch.tensor([0, 1, 0])}, ValueError, r"labels must have shape \(B,\), B = 2"),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "labels must be a tensor of whole"),
        ({"labels": [0, 1]}, TypeError, "labels must be a tensor of whole"),
        ({"labels": torch.tensor([0, 3])}, ValueError, "labels must lie between 0 and 2"),
        ({"top_ratio": 1.5}, ValueError, "top_ratio must lie in"),
        ({"class_embeddings": torch.ones(16)}, ValueError, "class_embeddings must be a"),
        ({"class_embeddings": torch.ones(3, 4, 16)}, ValueError, "divides the 2 images"),
        ({"class_embeddings": torch.ones(0, 16)}, ValueError, "at least one class"),
    ],
)
def test_refusals(known, error, message):
    model, width = make_towers()["open_clip"]
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(error, match=message):
        views_of(model, images, **{"class_embeddings": torch.randn(3, width), **known})


@pytest.mark.parametrize(
    ("shape", "message"), [((0, 17, 32), "at least one image"), ((17, 32), r"got \(17, 32\)")]
)
def test_images_that_are_none(shape, message):
    tower = vision_tower(make_towers()["open_clip"][0])
    with pytest.raises(ValueError, match=message):
        analysis.measure(tower, torch.randn(shape), [Views()])
