"""Re-weighted attention: weighted attention whose weights are those of the tokens, in one piece."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled

from tir_kernels.backends.inputs import AttentionInputs, BackwardInputs
from tir_kernels.backends.optional import BackwardLaunch, SelectionLaunch
from tir_kernels.backends.protocol import Gradients
from tir_kernels.operators.attending import (
    attend,
    attend_backward,
    attention_backend,
    attention_gradients,
    laid_out,
    laid_out_gradients,
    lie_packed,
    like_gradients,
    like_outputs,
    with_unit_stride,
)
from tir_kernels.operators.checks import (
    NO_MAP,
    check_attention_inputs,
    check_relevance_inputs,
    require_head_width,
    require_same_device,
    resolve_table,
)
from tir_kernels.operators.known_calls import Key, KnownCalls, key_of
from tir_kernels.operators.library import Operator, define, define_fake
from tir_kernels.operators.relevance import is_empty, relevance_backend
from tir_kernels.operators.second_derivative import differentiable_once
from tir_kernels.operators.token_weights import (
    DEFAULT_RULE,
    SELECTION_ARGUMENTS,
    Selection,
    TokenWeights,
    differentiable_weights,
    selection_arguments,
    table_gradient,
    weigh,
)
from tir_kernels.operators.weighted_attention import (
    WAY_OUT,
    KnownAttention,
    cast_for_autocast,
    differentiable_attention,
    known_attention,
)
from tir_kernels.rules import JointSpace, WeightRule


def reweighted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    class_embeddings: Tensor,
    *,
    joint_space: JointSpace | None = None,
    rule: WeightRule = DEFAULT_RULE,
    table: Tensor | None = None,
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    backend: str = "auto",
    return_weights: bool = False,
    return_counts: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor | TokenWeights, ...]:
    """:func:`token_weights` of the tokens, and :func:`weighted_attention` with them.

    Args:
        q, k, v, scale: As for :func:`weighted_attention`; (B, H, Lq, d), and twice (B, H, L, d).
        tokens: (B, L, D), what entered the block.
        class_embeddings, joint_space, rule, table, num_prefix_tokens, backend: As for
            :func:`token_weights`.
        return_weights: Also return the ``TokenWeights``.
        return_counts: Also return their counts alone, for which no weights are written.
        return_lse: Also return the log-sum-exp, as :func:`weighted_attention` does.

    Returns:
        (B, H, Lq, d) in the dtype of q, or in autocast's; or a tuple of it and what is asked for,
        in this order: with ``return_weights`` the ``TokenWeights``, else with ``return_counts`` the
        counts, (B, N) int32; with ``return_lse`` the log-sum-exp, (B, H, Lq) float32, which has no
        gradient. Gradients flow to q, k, v and the table.

    Raises:
        ValueError, TypeError: A wrong rank, shape, dtype, device, group count or table length.
        RuntimeError: A backend that cannot run here.
    """
    asked_for = _AskedFor(return_weights, return_counts, return_lse)
    space = NO_MAP if joint_space is None else joint_space
    key = known = None
    if type(space) is JointSpace and type(rule) is WeightRule:
        parts = (space.norm_weight, space.norm_bias, space.proj)
        tensors = (q, k, v, tokens, class_embeddings, *parts, table)
        key = key_of(tensors, space.norm_eps, num_prefix_tokens, scale, backend)
    if key is not None:
        key = (rule, key)
        known = _known_calls.get(key, tensors)
    if known is not None:
        if not (known.learns and is_grad_enabled()):
            return asked_for.of(*known.attend(*tensors))
        if not return_weights:  # which have a gradient of their own
            options = num_prefix_tokens, known.attention.scale, backend
            output, log_sum_exp, counts = known.differentiable(options, *tensors)
            return asked_for.of(output, log_sum_exp, None, counts)

    q, k, v = cast_for_autocast(q, k, v)
    scale = check_attention_inputs(q, {"k": k, "v": v}, scale, backend)
    inputs = check_relevance_inputs(
        tokens, class_embeddings, joint_space, num_prefix_tokens, backend
    )
    require_same_device("tokens", tokens, "q", q)
    if tokens.shape[:2] != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"tokens must have the batch and length of k, ({k.shape[0]}, {k.shape[2]}, D); "
            f"got {tuple(tokens.shape)}"
        )
    if tokens.dtype == torch.float64 and q.dtype != torch.float64:
        raise TypeError(f"tokens are float64 but q is {q.dtype}; pass tokens.float()")
    table = resolve_table(rule, table, inputs)
    if return_lse:
        require_head_width(q)
    attention = AttentionInputs(q, k, v, None, scale)
    arguments = selection_arguments(inputs, table, rule)
    if key is not None and known is None:
        _remember(key, tensors, attention, Selection.of(arguments), backend)
    if return_weights:
        weights, counts = differentiable_weights(inputs, table, rule, backend)
        attention = attention._replace(weights=weights)
        output, log_sum_exp = differentiable_attention(attention, backend)
        return asked_for.of(output, log_sum_exp, weights, counts)
    output, log_sum_exp, counts = ReweightedAttention.call(q, k, v, *arguments, scale, backend)
    return asked_for.of(output, log_sum_exp, None, counts)


class _AskedFor(NamedTuple):
    """What is returned beside the output."""

    weights: bool
    counts: bool
    log_sum_exp: bool

    def of(
        self, output: Tensor, log_sum_exp: Tensor, weights: Tensor | None, counts: Tensor
    ) -> Tensor | tuple[Tensor | TokenWeights, ...]:
        found: list[Tensor | TokenWeights] = [output]
        if self.weights and weights is not None:
            found.append(TokenWeights(weights, counts))
        elif self.counts:
            found.append(counts)
        if self.log_sum_exp:
            found.append(log_sum_exp)
        return tuple(found) if len(found) > 1 else output


class _KnownCall(NamedTuple):
    """What is known of a call: its selection, who serves it, and whether a tensor that has a
    gradient here requires one.
    """

    table: Tensor | None  # the rule's, where the caller gave none
    select: SelectionLaunch
    attention: KnownAttention
    learns: bool

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *selection: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Output, log-sum-exp, weights and counts, without gradients."""
        *tensors, table = selection
        weights, counts = self.select(*tensors, self.table if table is None else table)
        return (*self.attention.launch(q, k, v, weights), weights, counts)

    def differentiable(
        self, options: tuple, query: Tensor, key: Tensor, value: Tensor, *selection: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, log-sum-exp and counts, with gradients; options are the operator's last."""
        table = self.table if selection[-1] is None else selection[-1]

        def serve(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
            output, log_sum_exp, _weights, counts = self.attend(query, key, value, *selection)
            return output, log_sum_exp, counts

        # What selects has no gradient: autograd need not see it.
        unseen = (None,) * 6
        arguments = (query, key, value, *unseen, table, 0.0, *options)
        return ReweightedAttention.call_by(serve, *arguments)


_known_calls: KnownCalls[_KnownCall] = KnownCalls()


def _remember(
    key: Key,
    tensors: tuple[Tensor | None, ...],
    attention: AttentionInputs,
    selection: Selection,
    name: str,
) -> None:
    inputs, table, top_k = selection
    known = known_attention(attention, name)
    if known is None or is_empty(inputs):
        return
    backend = known.backend
    serves_both = (
        backend is relevance_backend(name, "token_weights", inputs, table)
        and hasattr(backend, "selection_launch")
        and not hasattr(backend, "reweighted_forward")
    )
    # A launch gets the caller's table, which must not be one that had to be converted.
    given = tensors[-1]
    is_as_given = given is None or given is table
    if serves_both and is_as_given and backend.takes(inputs, table):
        own = table if given is None else None
        select = backend.selection_launch(inputs, top_k)
        learns = known.learns or table.requires_grad
        _known_calls.add(key, tensors, _KnownCall(own, select, known, learns))


@define(
    f"reweighted_attention(Tensor query, Tensor key, Tensor value, {SELECTION_ARGUMENTS}, "
    "float scale, str backend) -> (Tensor output, Tensor log_sum_exp, Tensor counts)"
)
def _reweighted_attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, *rest, scale, name = arguments
    selection = Selection.of(tuple(rest))
    inputs, table, top_k = selection
    backend: Any = attention_backend(name, query)
    is_fused = (
        hasattr(backend, "reweighted_forward")
        and backend is relevance_backend(name, "token_weights", inputs, table)
        and query.numel() > 0
        and key.numel() > 0
        and not is_empty(inputs)
    )
    if is_fused:
        attention = AttentionInputs(query, key, value, None, scale)
        output, *others = backend.reweighted_forward(attention, inputs, table, top_k)
        return (laid_out(output, query), *others)
    weights, counts = weigh(selection, name)
    return (*attend(AttentionInputs(query, key, value, weights, scale), name), counts)


@define_fake("reweighted_attention")
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, num_prefix_tokens = rest[2], rest[-3]
    counts_shape = (tokens.shape[0], tokens.shape[1] - num_prefix_tokens)
    return (*like_outputs(query), tokens.new_empty(counts_shape, dtype=torch.int32))


@define(
    "reweighted_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
    "Tensor counts, Tensor table, Tensor output, Tensor log_sum_exp, float scale, "
    "bool needs_weights_grad, bool is_packed, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weights)"
)
def _reweighted_attention_backward(grad_output: Tensor, *rest: Any) -> Gradients:
    query, key, value, counts, table, output, log_sum_exp, scale, *options, name = rest
    backward = BackwardInputs(output, log_sum_exp, grad_output, *options)
    backend: Any = attention_backend(name, query)
    if hasattr(backend, "reweighted_backward") and query.numel() > 0 and counts.numel() > 0:
        inputs = AttentionInputs(query, key, value, None, scale)
        grads = backend.reweighted_backward(inputs, with_unit_stride(backward), counts, table)
        return laid_out_gradients(grads, inputs, backward.is_packed)
    num_prefix_tokens = key.shape[2] - counts.shape[1]
    weights = torch.nn.functional.pad(table[counts.long()], (num_prefix_tokens, 0), value=1.0)
    return attend_backward(AttentionInputs(query, key, value, weights, scale), backward, name)


def _backward_launch(backend: Any, arguments: tuple) -> BackwardLaunch:
    grad_output, query, key, value, counts, _, output, log_sum_exp, scale, *options = arguments
    inputs = AttentionInputs(query, key, value, None, scale)
    attend = backend.backward_launch(
        inputs, BackwardInputs(output, log_sum_exp, grad_output, *options)
    )
    num_prefix_tokens = key.shape[2] - counts.shape[1]

    def launch(
        grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Tensor
    ) -> Gradients:
        counts, table, output, log_sum_exp = others
        weights = backend.weights_of_counts(counts, table, num_prefix_tokens)
        return attend(grad_output, query, key, value, weights, output, log_sum_exp)

    return launch


@define_fake("reweighted_attention_backward")
def _(grad_output: Tensor, *rest: Any) -> Gradients:
    query, key, value, _, table, *_, needs_weights_grad, is_packed, _ = rest
    # The weights have the type of the table that they are looked up in.
    inputs = AttentionInputs(query, key, value, table, 1.0)
    return like_gradients(inputs, needs_weights_grad, is_packed)


class ReweightedAttention(Operator):
    """Attention whose key weights are derived from tokens and class embeddings.

    ``ReweightedAttention.apply(query, key, value, tokens, class_embeddings, norm_weight, norm_bias,
    norm_eps, proj, table, top_ratio, num_prefix_tokens, scale, backend)`` takes what
    ``tir_kernels.reweighted_attention`` has validated: class embeddings as (G, C, E) and the table
    as (C + 1,) on the device of the tokens. It returns ``(output, log_sum_exp, counts)``; query,
    key, value and the table receive gradients.
    """

    operator = "reweighted_attention"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        query, key, value = inputs[:3]
        table, ctx.scale, ctx.backend = inputs[9], inputs[12], inputs[13]
        attended, log_sum_exp, counts = output
        ctx.mark_non_differentiable(log_sum_exp, counts)
        ctx.save_for_backward(query, key, value, counts, table, attended, log_sum_exp)

    @staticmethod
    @differentiable_once(WAY_OUT)
    def backward(
        ctx: Any, saved: tuple, grad_output: Tensor, grad_lse: None, grad_counts: None
    ) -> tuple:
        _, _, _, counts, table, _, _ = saved
        needs_table_grad = ctx.needs_input_grad[9]
        options = ctx.scale, needs_table_grad, lie_packed(*saved[:3]), ctx.backend
        *grads, grad_weights = attention_gradients(
            "reweighted_attention_backward", (grad_output, *saved), options, _backward_launch
        )
        grad_table = None
        if needs_table_grad:
            grad_table = table_gradient(grad_weights, counts, table)
        return (*grads, *(None,) * 6, grad_table, *(None,) * 4)
