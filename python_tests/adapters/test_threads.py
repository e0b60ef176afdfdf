"""One adapted model in several Python threads at once."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_clip import make_class_embeddings, make_clip
from torch import Tensor, nn

from tir_kernels import adapters

NUM_THREADS = 4
CALLS = 30


@pytest.fixture(autouse=True)
def _frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def images_of(thread: int) -> Tensor:
    """Another number of images in each thread, so that mixed counts show."""
    generator = torch.Generator().manual_seed(thread)
    return torch.randn(2 + thread, 3, 32, 32, generator=generator)


def results(model: nn.Module, images: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    features = model.encode_image(images)
    return [features, *torch.autograd.grad(features.square().sum(), parameters)]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["tokens", "attention", "both", "values"])
@pytest.mark.parametrize("has_lora", [True, False])
def test_each_thread_gets_its_own_result(placement: str, has_lora: bool) -> None:
    model = make_clip()
    parameters: list[Tensor] = [model.visual.conv1.weight]
    if has_lora:
        lora = adapters.add_lora(model, rank=2, dropout=0.5, passes_input_gradient=False)
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.requires_grad_(False)
        parameters = [p.requires_grad_() for name, p in model.visual.named_parameters()
                      if "low_rank" in name]  # fmt: skip
        lora.seed([3])
        lora.train()
    handle = adapters.add_reweighting(model, placement=placement)
    handle.set_class_embeddings(make_class_embeddings())
    expected, counts = [], []
    for thread in range(NUM_THREADS):
        expected.append(results(model, images_of(thread), parameters))
        counts.append(dict(handle.last_counts))

    def work(thread: int) -> int:
        images, wrong = images_of(thread), 0
        for _ in range(CALLS):
            found = results(model, images, parameters)
            wrong += not all(map(torch.equal, found, expected[thread]))
        return wrong

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert list(pool.map(work, range(NUM_THREADS))) == [0] * NUM_THREADS
    for layer, found in handle.last_counts.items():
        assert any(torch.equal(found, of_thread[layer]) for of_thread in counts)
