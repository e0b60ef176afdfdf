"""Test-time registers: neurons that make patches stand out work on an appended token instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.changed_tower import ChangedFeatures, ChangedTower
from tir_kernels.fewshot.methods.protocol import Kit, Learner

if TYPE_CHECKING:
    from torch import Tensor

    from tir_kernels.adapters.registers import Neuron
    from tir_kernels.adapters.registers import TestTimeRegisters as TestTimeRegistersHandle

REGISTER_VALUES = ("neuron", "layer")
_NONE = -1  # in the place of a neuron that was not found


@dataclass(frozen=True)
class TestTimeRegisters(ChangedTower):
    """Zero-shot CLIP with registers that take over from patches of high norm.

    Register neurons are those most active, in the mean over support images without their labels, at
    patches whose norm stands out at the end of the tower. In each of them the register gets the
    activation of largest magnitude over all tokens, and patches get 0. The published program finds
    them on images of another data set, by a cut of the norm for each model, and one of its two
    forms gives all of a block's register neurons the block's largest activation
    (register_value "layer"). An episode in whose support images no patch stands out has no
    register neurons, and its tower is left as it is.
    """

    __test__ = False  # no test, whatever it is called

    name = "test-time-registers"
    source = "arXiv 2506.08010"
    shown_fields: ClassVar[tuple[str, ...]] = ("registers", "register_neurons")

    registers: int = fields.whole(
        1,
        "Tokens that are appended; without any, patches lose the activations all the same.",
        least=0,
        most=1024,
        reason="no image has many more patches",
    )
    register_neurons: int = fields.whole(
        10,
        "Neurons that are moved to the registers.",
        least=0,
        most=10**5,
        reason="no half of a tower has many more",
    )
    register_layer: int | None = fields.whole(
        None, "Last block whose neurons are; unset: that in the middle, 5 of 12.", least=0
    )
    register_value: str = fields.choice(
        "neuron",
        REGISTER_VALUES,
        'What registers get: "neuron", each neuron\'s own largest activation, or "layer", the '
        "largest of all register neurons in the block.",
    )
    norm_cut: float | None = fields.real(
        None,
        "Norm above which a patch stands out, published as 30 for ViT-B-16 of OpenAI; unset: six "
        "standard deviations above the median of its image.",
        least=0,
    )

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        with self.change(kit) as handle:
            yield _Registers(self, kit, handle)

    def change(self, kit: Kit) -> AbstractContextManager[TestTimeRegistersHandle]:
        from tir_kernels.adapters import add_test_time_registers
        from tir_kernels.towers import vision_tower

        depth = len(vision_tower(kit.model).blocks)
        if self.register_layer is not None and self.register_layer >= depth:
            raise ValueError(
                f"register_layer must lie between 0 and {depth - 1}; got {self.register_layer}"
            )
        return add_test_time_registers(kit.model, self.registers, self.register_value)


class _Registers(ChangedFeatures):
    """Inputs are the images (G, S, 3, H, W): what is made of them follows from the support."""

    def __init__(
        self, method: TestTimeRegisters, kit: Kit, handle: TestTimeRegistersHandle
    ) -> None:
        super().__init__(method, kit, None)
        self._method, self._model, self._handle = method, kit.model, handle
        self._neurons: list[list[Neuron]] = [[] for _ in kit.seeds]

    def inputs(self, images: Tensor) -> Tensor:
        return images

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Find the neurons, and say where there are none."""
        from tir_kernels.adapters import find_register_neurons

        method = self._method
        self._handle.set_neurons([])
        self._neurons = find_register_neurons(
            self._model,
            self._encoder.embed(inputs.flatten(0, 1)),
            method.register_neurons,
            last_layer=method.register_layer,
            norm_cut=method.norm_cut,
            groups=len(inputs),
        )
        if method.register_neurons and not all(self._neurons):
            _say_none_found(method)
        super().fit(inputs, labels)

    def features(self, inputs: Tensor) -> Tensor:
        import torch

        changed = [index for index, own in enumerate(self._neurons) if own]
        others = [index for index, own in enumerate(self._neurons) if not own]
        parts = [self._part(inputs, rows) for rows in (changed, others) if rows]
        places = torch.tensor([*changed, *others], device=inputs.device).argsort()
        return torch.cat(parts)[places]

    def _part(self, inputs: Tensor, episodes: Sequence[int]) -> Tensor:
        """(g, S, E) features of some episodes, by their neurons."""
        self._handle.set_neurons([self._neurons[index] for index in episodes])
        images = inputs[list(episodes)]
        tokens = self._encoder.embed(images.flatten(0, 1))
        return self._encoder.features(tokens).unflatten(0, images.shape[:2])

    def trained(self) -> dict[str, Tensor]:
        """ "neurons" (G, n, 2), block and number of each, -1 where there is none; centroids."""
        import torch

        table = torch.full((len(self._neurons), self._method.register_neurons, 2), _NONE)
        for row, own in zip(table, self._neurons, strict=True):
            if own:
                row[: len(own)] = torch.tensor(own)
        return {"neurons": table, **super().trained()}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        from tir_kernels.adapters.registers import Neuron

        super().restore(trained)
        self._neurons = [
            [Neuron(*map(int, each)) for each in own if each[0] != _NONE]
            for own in trained["neurons"].tolist()
        ]


@functools.cache  # once for all episodes of an arm
def _say_none_found(method: TestTimeRegisters) -> None:
    warnings.warn(
        f"{method.name}: no register neurons found in an episode, since no patch of its support "
        "images has a norm that stands out; the tower is left as it is there (said once, for all "
        "such episodes)",
        stacklevel=3,
    )
