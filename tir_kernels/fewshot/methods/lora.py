"""LoRA and a learned prompt context: plain few-shot fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.frozen_images import FrozenImages
from tir_kernels.fewshot.methods.option_fields import context_rate, context_tokens, steps
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method, ParameterGroup
from tir_kernels.fewshot.methods.schedules import cosine
from tir_kernels.fewshot.methods.second_stream import SecondStream
from tir_kernels.fewshot.methods.templates import single_template, templates
from tir_kernels.fewshot.methods.zero_shot import LOGIT_SCALE_HELP, TEMPLATE_HELP

if TYPE_CHECKING:
    from torch import Tensor

    from tir_kernels.adapters import LoRA as Adapter


FACTOR_PREFIX = "lora."  # of the names of its factors among all that was trained
TOWERS = {"both": ("visual", "text"), "vision": ("visual",), "text": ("text",)}
SCHEDULES = ("constant", "cosine", "cosine/8")


# What the paper and the program of arXiv 2605.25799 set alike for LoRA, alone and re-weighted.
PAPER = {
    "lora_towers": "vision",
    "context_tokens": 0,
    "logit_scale": 100.0,
    "lora_schedule": "cosine/8",
}
PROGRAM = {
    "steps": 100,
    "lora_towers": "both",
    "context_tokens": 4,
    "logit_scale": None,
    "lora_schedule": "constant",
}


@dataclass(frozen=True)
class LoRA(Method):
    """LoRA on query, key and value of both towers or one, AdamW; a prompt context, SGD.

    Full-batch steps of cross entropy over scaled cosines, as in the program of arXiv 2605.25799.
    """

    name = "lora"
    source = "arXiv 2405.18541, as trained in arXiv 2605.25799"
    family = "tuned towers"
    presets: ClassVar = {
        "paper": {"steps": 250, **PAPER},
        "program": PROGRAM,
        "clip-lora": {
            "steps": 500,  # a shot
            "lora_rank": 2,
            "lora_alpha": 1,
            "lora_towers": "both",
            "context_tokens": 0,
            "logit_scale": 100.0,
            "lora_schedule": "cosine",
        },
    }

    steps: int = steps(100, least=1)
    lora_rank: int = fields.whole(
        16,
        "Rank of LoRA on the query, key and value projections of the towers that have it.",
        least=1,
        most=8192,
        reason="no layer is as wide",
    )
    lora_alpha: float = fields.real(8, "LoRA's scale is lora_alpha / sqrt(lora_rank).", least=0)
    lora_dropout: float = fields.real(
        0.25, "Dropout in front of LoRA's A while training, in [0, 1).", least=0, below=1
    )
    lora_lr: float = fields.real(2e-4, "AdamW's learning rate for LoRA.", least=0)
    context_tokens: int = context_tokens(
        4,
        'Learned prompt context vectors, started as "a photo of a" or the words of the template; '
        "0 for none.",
        least=0,
    )
    context_lr: float = context_rate("the context")
    logit_scale: float | None = fields.real(None, LOGIT_SCALE_HELP)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    lora_towers: str = fields.added_later(
        fields.choice("both", tuple(TOWERS), 'Towers with LoRA: "both", "vision" or "text".')
    )
    lora_schedule: str = fields.added_later(
        fields.choice(
            "constant",
            SCHEDULES,
            'LoRA\'s learning rate: "constant"; "cosine", which falls to 0 over the steps; or '
            '"cosine/8", which falls as a cosine over eight times the steps, to 0.96.',
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        single_template(self.template)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        with self.adapted(kit) as lora:
            yield TunedTowers(self, kit, lora)

    @contextmanager
    def adapted(self, kit: Kit) -> Iterator[Adapter]:
        """LoRA on the kit's model, seeded an episode each."""
        from tir_kernels.adapters import add_lora

        with add_lora(
            kit.model,
            self.lora_rank,
            self.lora_alpha,
            self.lora_dropout,
            towers=TOWERS[self.lora_towers],
            passes_input_gradient=False,  # as the published program trains
            num_episodes=len(kit.seeds),
            backend=kit.backend,
        ) as lora:
            lora.seed(kit.seeds)
            yield lora


@dataclass(frozen=True)
class VisionLoRA(LoRA):
    """LoRA on the vision tower alone, as the works that build on it train it: their base."""

    context_tokens: int = fields.inherited(LoRA, "context_tokens", 0)
    logit_scale: float | None = fields.inherited(LoRA, "logit_scale", 100.0)
    lora_towers: str = fields.inherited(LoRA, "lora_towers", "vision")
    lora_schedule: str = fields.inherited(LoRA, "lora_schedule", "cosine/8")


class TunedTowers(Learner):
    """Towers with LoRA and a prompt context.

    Inputs are the embedded tokens (G, S, L, D), or the features (G, S, E) of an image tower that
    nothing changes.

    Attributes:
        lora: Handle of the adapter.
        prompts: The class prompts.
        beside: What lets the text tower run beside the image tower.
    """

    leaves_images_to_lora = True  # whether nothing else changes the image tower
    # Whether ``logits``, where a learner has its own, calls ``beside.join`` before reading classes.
    joins_late = False

    def __init__(self, method: LoRA, kit: Kit, lora: Adapter) -> None:
        from tir_kernels.fewshot.methods.prompts import Prompts, default_logit_scale

        self.lora, self.beside = lora, SecondStream()
        self.prompts = Prompts.of_kit(kit, method.context_tokens, single_template(method.template))
        self._method = method
        self._encoder = kit.encoder
        self._logit_scale = default_logit_scale(method.logit_scale, kit.shots)
        if method.lora_towers == "text" and self.leaves_images_to_lora:
            self.inputs_kind = FrozenImages.inputs_kind
        self._texts_are_frozen = method.lora_towers == "vision" and not method.context_tokens
        self._frozen_texts: tuple[Tensor, Tensor] | None = None

    def inputs(self, images: Tensor) -> Tensor:
        inputs = self._encoder.embed(images.flatten(0, 1))
        if self.inputs_kind is not None:
            inputs = self._encoder.features(inputs)
        return inputs.unflatten(0, images.shape[:2])

    def texts(self, text_layer: int | None = None) -> tuple[Tensor, Tensor]:
        """What ``Prompts`` gives for a layer that is always the same, once where nothing in it is
        trained.
        """
        import torch

        if not self._texts_are_frozen:
            return self.prompts(text_layer)
        if self._frozen_texts is None:
            with torch.no_grad():
                self._frozen_texts = self.prompts(text_layer)
        return self._frozen_texts

    def classes(self) -> Any:
        """(G, C, E) class embeddings of unit length."""
        from torch.nn.functional import normalize

        return normalize(self.texts()[0].float(), dim=-1)

    def show_classes(self, classes: Any) -> Tensor:
        return classes

    def features(self, inputs: Tensor) -> Tensor:
        """(G, S, ...) inputs -> (G, S, E), not normalised."""
        if self.inputs_kind is not None:
            return inputs
        return self._encoder.features(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        features = self.features(inputs)
        self.beside.join()
        return self.cosine_logits(features, classes)

    def cosine_logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """(G, S, E) and unit (G, C, E) -> (G, S, C)."""
        from tir_kernels.fewshot.methods.prompts import cosine_logits

        return cosine_logits(features, classes, self._logit_scale)

    def training_losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """(G,) losses of a step; on a GPU, the text tower runs beside the image tower."""
        with self.lora.one_pass() as made:
            classes = self.beside.run(self.classes, inputs.device, made)
            if type(self).logits is not TunedTowers.logits and not self.joins_late:
                self.beside.join()
            return self.loss(self.logits(inputs, classes), labels)

    def parameters(self) -> list[ParameterGroup]:
        method = self._method
        lora = {"lr": method.lora_lr, "weight_decay": 0.01}
        period = {"constant": None, "cosine": method.steps, "cosine/8": 8 * method.steps}
        steps = period[method.lora_schedule]
        schedule = None if steps is None else cosine(steps)
        groups = [ParameterGroup(list(self.lora.parameters()), "AdamW", lora, schedule)]
        if self._method.context_tokens:
            context = {"lr": self._method.context_lr, "momentum": 0.9, "weight_decay": 5e-4}
            groups.append(ParameterGroup([self.prompts.vectors], "SGD", context))
        return groups

    def train(self, mode: bool) -> None:
        self.lora.train(mode)

    def next_step(self) -> None:
        self.lora.next_step()

    def trained(self) -> dict[str, Tensor]:
        """ "context" (G, context_tokens, W), and "lora.{visual|text}.{layer}.{q|k|v}.{A|B}"."""
        return {"context": self.prompts.vectors, **named_factors(self.lora.factors())}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        import torch

        self.lora.set_factors(*factors_in(trained))
        with torch.no_grad():
            self.prompts.vectors.copy_(trained["context"])


def named_factors(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """LoRA's factors by the names that ``trained`` gives them."""
    return {
        f"{FACTOR_PREFIX}{name}.{letter}": factor
        for name, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }


def factors_in(trained: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The A and the B in what was trained, if any, by the names of ``LoRA.factors``."""
    factors: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for name, tensor in trained.items():
        if name.startswith(FACTOR_PREFIX):
            place, _, letter = name.removeprefix(FACTOR_PREFIX).rpartition(".")
            factors[letter][place] = tensor
    return factors["A"], factors["B"]
