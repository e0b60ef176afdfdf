"""MaPLe: deep prompts of both towers, the images' made of the texts'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.learned_prompts import LearnedPrompts
from tir_kernels.fewshot.methods.protocol import Kit, Learner, ParameterGroup
from tir_kernels.fewshot.methods.templates import single_template

if TYPE_CHECKING:
    from torch import Tensor

    from tir_kernels.adapters import DeepPrompts
    from tir_kernels.fewshot.methods.prompts import Prompts

DEFAULT_DEPTH = 9  # arXiv 2210.03117


@dataclass(frozen=True)
class MaPLe(LearnedPrompts):
    """MaPLe: learned prompts in the first blocks of both towers, coupled by a linear map a block.

    In texts, P_0 takes the places of the first n words of the template, and P_j those places in
    front of block j. Behind the image's tokens, without positions, are Q_0 in front of the tower's
    first norm, and Q_j in their places in front of block j, with ``Q_j = P_j F_jᵀ + b_j``. P_0
    starts as the words, the other P_j from N(0, 0.02²); F_0 as PyTorch's linear layers do, and all
    other F_j alike, as another such layer.

    Steps are full-batch, by SGD as in CoOp. The published program takes 5 epochs in batches of 4,
    which are 10 steps for 5 classes at 1 shot and 35 at 5; 100 are as many as CoOp and LoRA take
    here. The maps have the towers' own widths, where that program has 512 and 768.
    """

    name = "maple"
    source = "arXiv 2210.03117"

    prompt_tokens: int = fields.whole(
        2,
        "Learned tokens of each block that has some, in either tower; at most the words of the "
        "template in front of {}.",
        least=1,
        most=1024,
        reason="no text tower has as many positions",
    )
    prompt_depth: int | None = fields.whole(
        None,
        "Blocks with learned prompts, from the first on; unset: 9, or all of a shallower tower.",
        least=1,
    )
    prompt_lr: float = fields.real(
        3.5e-3,
        "SGD's learning rate for prompts and their maps (momentum 0.9, weight decay 5e-4).",
        least=0,
    )

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        from tir_kernels.adapters import add_image_prompts, add_text_prompts
        from tir_kernels.fewshot.methods.prompts import Prompts

        prompts = Prompts.of_kit(kit, 0, single_template(self.template))
        self._require_words(kit)
        depth = self._depth(kit, prompts.num_blocks)
        with (
            add_image_prompts(kit.model, depth) as images,
            add_text_prompts(kit.model, depth, prompts.first) as texts,
        ):
            yield _Coupled(self, kit, prompts, (images, texts), depth)

    def _depth(self, kit: Kit, text_depth: int) -> int:
        from tir_kernels.towers import vision_tower

        most = min(len(vision_tower(kit.model).blocks), text_depth)
        if self.prompt_depth is None:
            return min(DEFAULT_DEPTH, most)
        if self.prompt_depth > most:
            raise ValueError(
                f"prompt_depth must be at most {most}, the blocks of the shallower tower; got "
                f"{self.prompt_depth}"
            )
        return self.prompt_depth

    def _require_words(self, kit: Kit) -> None:
        from tir_kernels.adapters.prompt_text import words_in_front

        count = words_in_front(kit.tokenizer, single_template(self.template))
        if self.prompt_tokens > count:
            raise ValueError(
                f"prompt_tokens must be at most {count}, the tokens in front of the name in the "
                f"template, whose places they take; got {self.prompt_tokens}: set template to one "
                "with more"
            )


class _Coupled(Learner):
    """Inputs are embedded images (G, S, L D), flat since no measure knows of the prompts behind."""

    def __init__(
        self,
        method: MaPLe,
        kit: Kit,
        prompts: Prompts,
        handles: tuple[DeepPrompts, DeepPrompts],
        depth: int,
    ) -> None:
        import torch
        from torch import nn

        from tir_kernels.fewshot.methods.prompts import drawn_layer, drawn_vectors, generators_of
        from tir_kernels.towers import vision_tower

        self._method, self._encoder, self._prompts = method, kit.encoder, prompts
        self._images, self._texts = handles
        words = prompts.words(method.prompt_tokens)  # (G, n, W)
        self._width = vision_tower(kit.model).blocks[0].linears["q"].shape[2]
        generators = generators_of(kit)
        widths = (self._width, words.shape[2])
        first = drawn_layer(generators, *widths)
        others = drawn_layer(generators, *widths)
        deep = drawn_vectors(generators, depth - 1, *words.shape[1:])

        def stacked(part: int) -> nn.Parameter:
            """(G, J, ...): the first layer, and clones of the other."""
            each = [first[part], *(others[part] for _ in range(depth - 1))]
            return nn.Parameter(torch.stack(each, 1).to(words))

        self._parameters = {
            "context": nn.Parameter(words.clone()),
            "deep": nn.Parameter(deep.to(words)),  # (G, J - 1, n, W)
            "coupling.weight": stacked(0),  # (G, J, D, W)
            "coupling.bias": stacked(1),  # (G, J, D)
        }

    def inputs(self, images: Tensor) -> Tensor:
        tokens = self._encoder.embed(images.flatten(0, 1))
        return tokens.flatten(1).unflatten(0, images.shape[:2])

    def classes(self) -> Tensor:
        """(G, C, E) class embeddings of unit length."""
        from torch.nn.functional import normalize

        own = self._parameters
        self._texts.set_prompts(own["deep"].transpose(0, 1))
        embeddings = self._prompts.encode(own["context"][:, None, None])[:, 0]
        return normalize(embeddings.float(), dim=-1)

    def show_classes(self, classes: Any) -> Tensor:
        return classes

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        from tir_kernels.fewshot.methods.prompts import cosine_logits

        self._images.set_prompts(self._coupled())
        tokens = inputs.flatten(0, 1).unflatten(1, (-1, self._width))
        features = self._encoder.features(tokens).unflatten(0, inputs.shape[:2])
        return cosine_logits(features, classes, self._method.logit_scale)

    def _coupled(self) -> Tensor:
        """(J, G, n, D) prompts of the image tower."""
        import torch

        own = self._parameters
        prompts = torch.cat([own["context"][:, None], own["deep"]], 1)  # (G, J, n, W)
        coupled = prompts @ own["coupling.weight"].mT + own["coupling.bias"][:, :, None]
        return coupled.transpose(0, 1)

    def parameters(self) -> list[ParameterGroup]:
        from tir_kernels.fewshot.methods.prompts import prompt_group

        parameters = [each for each in self._parameters.values() if each.numel()]
        return [prompt_group(parameters, self._method.prompt_lr, self._method.steps)]

    def trained(self) -> dict[str, Tensor]:
        """ "context" (G, n, W) and "deep" (G, J - 1, n, W), the texts' prompts; and
        "coupling.weight" (G, J, D, W) and "coupling.bias" (G, J, D).
        """
        return dict(self._parameters)

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(trained[name])
