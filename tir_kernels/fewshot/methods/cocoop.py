"""CoCoOp: a learned prompt context that each image shifts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.coop import CoOp
from tir_kernels.fewshot.methods.frozen_images import FrozenImages
from tir_kernels.fewshot.methods.learned_prompts import LearnedPrompts
from tir_kernels.fewshot.methods.option_fields import context_rate
from tir_kernels.fewshot.methods.protocol import Kit, Learner, ParameterGroup
from tir_kernels.fewshot.methods.templates import single_template

if TYPE_CHECKING:
    from torch import Tensor

# Prompts in one pass through the text tower. More go in parts, of which training keeps nothing for
# the backward pass but what enters them: a third more work, and memory for one part.
PROMPTS_AT_ONCE = 512


@dataclass(frozen=True)
class CoCoOp(LearnedPrompts):
    """CoCoOp: a learned context, shifted for each image by a small network; both towers frozen.

    An image's context is ``v + h(f)``, the same shift for all its vectors, of
    ``h(f) = W_2 ReLU(W_1 f + b_1) + b_2`` and the feature f of unit length; W_1 gives a sixteenth
    of the width of f. So the text tower runs anew for each image, in training and in use: it is by
    far the slowest of the methods that learn prompts.

    Steps are full-batch, by SGD as in CoOp. The published program takes 10 epochs of single images,
    which are 50 steps for 5 classes at 1 shot and 250 at 5; 100 are as many as CoOp takes here.
    """

    name = "cocoop"
    source = "arXiv 2203.05557"

    context_tokens: int = fields.inherited(CoOp, "context_tokens", 4)
    context_lr: float = context_rate("context and network")

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Conditional(self, kit)


class _Conditional(FrozenImages):
    def __init__(self, method: CoCoOp, kit: Kit) -> None:
        import torch
        from torch import nn

        from tir_kernels.fewshot.methods.prompts import Prompts, drawn_layer, generators_of

        super().__init__(kit)
        self._method = method
        self._num_classes = len(kit.class_names[0])
        self._prompts = Prompts.of_kit(kit, method.context_tokens, single_template(method.template))
        words = self._prompts.vectors.detach()  # (G, M, W)
        with torch.no_grad():
            joint = self._prompts()[0].shape[-1]
        hidden = max(1, joint // 16)
        generators = generators_of(kit)
        first, second = (
            drawn_layer(generators, outputs, inputs)
            for outputs, inputs in ((hidden, joint), (words.shape[2], hidden))
        )
        starts = {
            "context": words,
            "network.1.weight": first[0],
            "network.1.bias": first[1],
            "network.2.weight": second[0],
            "network.2.bias": second[1],
        }
        self._parameters = {
            name: nn.Parameter(each.to(words, copy=True)) for name, each in starts.items()
        }

    def classes(self) -> None:
        """Nothing: each image has class embeddings of its own."""

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        import torch
        from torch.nn.functional import normalize
        from torch.utils.checkpoint import checkpoint

        features = normalize(inputs.float(), dim=-1)
        contexts = self._contexts(features)
        images = max(1, PROMPTS_AT_ONCE // (len(inputs) * self._num_classes))
        parts = list(zip(features.split(images, 1), contexts.split(images, 1), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            found = [self._cosines(*part) for part in parts]
        else:
            # Nothing in a text tower that is only evaluated is random.
            found = [
                checkpoint(self._cosines, *part, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ]
        return self._method.logit_scale * torch.cat(found, 1)

    def _contexts(self, features: Tensor) -> Tensor:
        """(G, S, E) features of unit length -> (G, S, M, W)."""
        own = self._parameters
        hidden = features @ own["network.1.weight"].mT + own["network.1.bias"][:, None]
        shift = hidden.relu() @ own["network.2.weight"].mT + own["network.2.bias"][:, None]
        return own["context"][:, None] + shift[:, :, None]

    def _cosines(self, features: Tensor, contexts: Tensor) -> Tensor:
        """(G, n, C) of (G, n, E) features of unit length and (G, n, M, W) contexts."""
        from torch.nn.functional import normalize

        embeddings = normalize(self._prompts.encode(contexts[:, :, None]).float(), dim=-1)
        return (embeddings @ features[..., None])[..., 0]

    def parameters(self) -> list[ParameterGroup]:
        from tir_kernels.fewshot.methods.prompts import prompt_group

        parameters = list(self._parameters.values())
        return [prompt_group(parameters, self._method.context_lr, self._method.steps)]

    def trained(self) -> dict[str, Tensor]:
        """ "context" (G, context_tokens, W), and "network.{1|2}.{weight|bias}" of h."""
        return dict(self._parameters)

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(trained[name])
