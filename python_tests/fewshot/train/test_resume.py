"""A training goes on where it was stopped, to the same bits; steps may see a part of the images."""

import io
from dataclasses import replace

import pytest
import torch
from fewshot.training_cases import as_method, draw_episode, make_model, make_tokenizer

from tir_kernels.fewshot import Runtime
from tir_kernels.fewshot.train.batch import Job, finetune_batch
from tir_kernels.fewshot.train.resume import Batches, batch_order

NAMES = ["a cat", "a dog"]


class StopError(Exception):
    """Stands for whatever ends a process."""


class Keeper:
    """Keeps states as a file would, and stops the training behind some of them."""

    def __init__(self, stops=()):
        self.stops = set(stops)
        self.content = None
        self.steps = []

    def load(self):
        return (
            None
            if self.content is None
            else torch.load(io.BytesIO(self.content), weights_only=True)
        )

    def is_due(self):
        return True

    def keep(self, state):
        file = io.BytesIO()
        torch.save(state, file)
        self.content = file.getvalue()
        self.steps.append(state["step"])
        if state["step"] in self.stops:
            self.stops.remove(state["step"])
            raise StopError


def train(method, keeper=None, precision="float32", batch_size=None):
    job = Job(
        make_model(),
        make_tokenizer(),
        method,
        0,
        Runtime(precision=precision),
        (),
        keeper,
        batch_size,
    )
    losses = []
    (result,) = finetune_batch(
        job, [draw_episode(0, NAMES, shots=3)], lambda _, step, loss: losses.append((step, loss))
    )
    return result, losses


def test_what_steps_carry_goes_on_too():
    method = as_method("mind", steps=6, lora_dropout=0.25)
    expected, all_losses = train(method)
    keeper = Keeper([2])
    with pytest.raises(StopError):
        train(method, keeper)
    found, losses = train(method, keeper)
    assert losses == all_losses[2:]
    assert torch.equal(found.query_logits, expected.query_logits)


@pytest.mark.parametrize("name", ["tir", "lora"])
@pytest.mark.parametrize(
    "precision",
    ["float32", *(pytest.param(each, marks=pytest.mark.slow) for each in ("bfloat16", "float16"))],
)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_stopped_is_as_never_stopped(name, precision, batch_size):
    method = (
        as_method(name, steps=6, lora_dropout=0.25, relevance="centroids")
        if name == "tir"
        else (as_method(name, steps=6, lora_dropout=0.25))
    )
    expected, all_losses = train(method, None, precision, batch_size)
    keeper = Keeper([2, 5, 6])
    seen = []
    for _ in range(3):
        with pytest.raises(StopError):
            train(method, keeper, precision, batch_size)
        seen.append(keeper.steps[-1])
    assert seen == [2, 5, 6]
    result, losses = train(method, keeper, precision, batch_size)
    assert losses == []
    assert result.losses == expected.losses == [loss for _, loss in all_losses]
    assert torch.equal(result.query_logits, expected.query_logits)
    assert result.trained.keys() == expected.trained.keys()
    for part, value in expected.trained.items():
        assert torch.equal(result.trained[part], value), part


def test_steps_of_a_part_of_the_images_differ_from_those_of_all():
    method = as_method("lora", steps=3)
    assert train(method)[0].losses[0] != train(method, batch_size=2)[0].losses[0]
    everything = train(method, batch_size=100)[0]
    assert everything.losses == train(method)[0].losses


@pytest.mark.parametrize(("count", "size", "steps"), [(7, 3, 9), (6, 2, 3), (5, 4, 1)])
def test_every_image_comes_once_before_any_comes_again(count, size, steps):
    inputs = torch.arange(count, dtype=torch.float32)[None, :, None]
    labels = torch.arange(count)[None]
    batches = Batches(inputs, labels, batch_order(labels[0], size, 3, steps))
    tensors = batches.inputs, batches.labels
    seen = []
    for step in range(steps):
        batches.show(step)
        assert (batches.inputs, batches.labels) == tensors or batches.inputs is tensors[0]
        assert torch.equal(batches.inputs[0, :, 0].long(), batches.labels[0])
        seen += batches.labels[0].tolist()
    for first in range(0, len(seen), count):
        part = seen[first : first + count]
        assert len(set(part)) == len(part)
    again = Batches(inputs, labels, batch_order(labels[0], size, 3, steps))
    again.show(steps - 1)
    assert torch.equal(again.labels, batches.labels)


@pytest.mark.parametrize(("size", "steps"), [(4, 15), (40, 3), (1, 30)])
def test_balanced_steps_see_all_classes_alike(size, steps):
    labels = torch.tensor([0] * 9 + [1] * 2 + [2] * 4)
    order = batch_order(labels, size, 3, steps, is_balanced=True)
    assert order.shape == (steps, size)
    seen = order.flatten()
    counts = labels[seen].bincount()
    assert counts.max() - counts.min() <= 1
    for label in range(3):
        rows = (labels == label).nonzero().flatten()
        own = seen[labels[seen] == label]
        for first in range(0, len(own), len(rows)):
            part = own[first : first + len(rows)].tolist()
            assert len(set(part)) == len(part)
            assert set(part) <= set(rows.tolist())
    assert torch.equal(order, batch_order(labels, size, 3, steps, is_balanced=True))
    assert not torch.equal(order, batch_order(labels, size, 4, steps, is_balanced=True))


def test_class_weights_are_those_of_the_loss():
    method = as_method("lora", steps=1, lora_dropout=0.0)
    episode = draw_episode(0, NAMES, shots=3)
    episode = replace(episode, support_labels=torch.tensor([0, 0, 0, 0, 0, 1]))

    def first_loss(weights):
        job = Job(make_model(), make_tokenizer(), method, 0, Runtime(), class_weights=weights)
        return finetune_batch(job, [episode], None)[0].losses[0]

    zero, one = (first_loss(torch.eye(2)[label]) for label in (0, 1))
    assert first_loss(None) == pytest.approx(zero + one)
    assert first_loss(torch.tensor([0.6, 3.0])) == pytest.approx(0.6 * zero + 3 * one)
    assert zero != pytest.approx(one)


@pytest.mark.slow
def test_first_steps_that_overflow_leave_no_momentum(monkeypatch):
    """What memory held before would be taken for it."""
    method = as_method("lora", steps=14, lora_lr=1e-3, logit_scale=100.0)
    expected, _ = train(method, None, "float16")
    assert expected.losses[0] == expected.losses[1] != expected.losses[-1]
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **more: plain(*a, **more).fill_(9.0))
    found, _ = train(method, None, "float16")
    assert found.losses == expected.losses
    assert torch.equal(found.trained["context"], expected.trained["context"])
