"""Checks of the public functions' arguments: each refuses before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from tir_kernels.backends.inputs import RelevanceInputs
from tir_kernels.operators.choose import require_backend
from tir_kernels.rules import JointSpace, WeightRule
from tir_kernels.scalars import finite_number, whole_number

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

NO_MASKS = "there are no masks; padding is weight 0, as in weights=is_token.float(), (B, L)"

NO_MAP = JointSpace(norm_eps=None)  # tokens are in the joint space


def require_float(name: str, value: object, shape: str) -> Tensor:
    """Refuse what is no floating point tensor; ``shape`` is for the message alone."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}; got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, float16, bfloat16 or (backend='reference') float64; "
            f"got {value.dtype}"
        )
    return value


def require_tensor(name: str, value: object, shape: str) -> Tensor:
    """Refuse what is no floating point tensor of the rank that ``shape`` spells, "(B, L, D)"."""
    value = require_float(name, value, shape)
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
    return value


def require_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}; it is on {value.device}"
        )


def require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def refuse_mask_and_dropout(attn_mask: object, dropout_p: object) -> None:
    """Refuse what PyTorch's attention has and this one has not, with the way out."""
    if attn_mask is not None:
        raise ValueError(
            f"attn_mask must be None: {NO_MASKS}; for a causal mask pass is_causal=True, and for "
            "others use torch.nn.functional.scaled_dot_product_attention"
        )
    if dropout_p != 0:
        raise ValueError(
            f"dropout_p must be 0; got {dropout_p!r}. Attention has no dropout here: drop channels "
            "of its output instead, or use torch.nn.functional.scaled_dot_product_attention"
        )


def check_num_prefix_tokens(
    num_prefix_tokens: object, length: int, of_what: str = "tokens L"
) -> int:
    number = whole_number("num_prefix_tokens", num_prefix_tokens)
    if number < 0 or number > length:
        raise ValueError(
            f"num_prefix_tokens must lie between 0 and the number of {of_what} = {length}; "
            f"got {number}"
        )
    return number


def check_relevance_inputs(
    tokens: Tensor,
    class_embeddings: Tensor,
    joint_space: JointSpace | None,
    num_prefix_tokens: int,
    backend: str,
) -> RelevanceInputs:
    """The inputs of relevance, to which no gradient flows."""
    require_backend(backend)
    require_tensor("tokens", tokens, "(B, L, D)")
    if not isinstance(class_embeddings, Tensor) or class_embeddings.dim() != 3:
        require_tensor("class_embeddings", class_embeddings, "(C, E)")
        class_embeddings = class_embeddings.unsqueeze(0)
    require_tensor("class_embeddings", class_embeddings, "(G, C, E)")
    require_same_device("class_embeddings", class_embeddings, "tokens", tokens)
    batch, length, width = tokens.shape
    num_groups, num_classes, joint_width = class_embeddings.shape
    if width < 1:
        raise ValueError(f"tokens must have a width D of at least 1; got {tuple(tokens.shape)}")
    if num_classes < 1 or joint_width < 1:
        raise ValueError(
            f"class_embeddings must hold at least one class of width 1; "
            f"got {tuple(class_embeddings.shape)}"
        )
    if num_groups < 1 or batch % num_groups != 0:
        raise ValueError(
            f"class_embeddings of shape (G, C, E) need a number of groups G that divides the "
            f"{batch} images of tokens; got G = {num_groups}"
        )
    num_prefix_tokens = check_num_prefix_tokens(num_prefix_tokens, length)
    if joint_space is None:
        joint_space = NO_MAP
    _check_joint_space(joint_space, tokens, joint_width)
    # A number read from an attribute would be no constant of a compiled graph.
    norm_eps = None if joint_space.norm_eps is None else float(joint_space.norm_eps)
    return RelevanceInputs(
        tokens.detach(),
        class_embeddings.detach(),
        _detached(joint_space.norm_weight),
        _detached(joint_space.norm_bias),
        norm_eps,
        _detached(joint_space.proj),
        num_prefix_tokens,
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check_joint_space(joint_space: JointSpace, tokens: Tensor, joint_width: int) -> None:
    if not isinstance(joint_space, JointSpace):
        raise TypeError(f"joint_space must be a JointSpace; got {type(joint_space).__name__}")
    width = tokens.shape[2]
    for name in ("norm_weight", "norm_bias", "proj"):
        part = getattr(joint_space, name)
        if part is None:
            continue
        require_same_device(f"joint_space.{name}", part, "tokens", tokens)
        if part.shape[0] != width:
            raise ValueError(
                f"joint_space.{name} must fit tokens of width D = {width}; got {tuple(part.shape)}"
            )
    if joint_space.proj is None:
        if joint_width != width:
            raise ValueError(
                f"class_embeddings have width E = {joint_width} but tokens have width D = {width}; "
                "pass joint_space=JointSpace(..., proj=(D, E) tensor) to map one to the other"
            )
    elif joint_space.proj.shape[1] != joint_width:
        raise ValueError(
            f"joint_space.proj must map to the width of class_embeddings, E = {joint_width}; "
            f"got {tuple(joint_space.proj.shape)}"
        )


def resolve_table(rule: WeightRule, table: Tensor | None, inputs: RelevanceInputs) -> Tensor:
    """The table that applies, (C + 1,) on the device of the tokens: the caller's or the rule's.

    It is float32; float64 tokens with a float64 table keep it float64, so that the reference can be
    differentiated numerically.
    """
    tokens, num_classes = inputs.tokens, inputs.class_embeddings.shape[1]
    if not isinstance(rule, WeightRule):
        raise TypeError(f"rule must be a WeightRule; got {type(rule).__name__}")
    if table is None:
        return _table_of(rule, num_classes, tokens.device)
    require_tensor("table", table, "(C + 1,)".replace(",", ""))
    if table.shape[0] != num_classes + 1:
        raise ValueError(
            f"table must have C + 1 = {num_classes + 1} entries, one per count from 0 to "
            f"{num_classes}; got {table.shape[0]}"
        )
    require_same_device("table", table, "tokens", tokens)
    is_double = tokens.dtype == torch.float64 and table.dtype == torch.float64
    return table if is_double else table.float()


_tables: dict[tuple[WeightRule, int, torch.device], Tensor] = {}


def _table_of(rule: WeightRule, num_classes: int, device: torch.device) -> Tensor:
    """A rule's table, kept: on a GPU, copying it there would be a call's slowest part."""
    if torch.compiler.is_compiling() or _makes_other_tensors():
        return rule.table(num_classes).to(device)
    key = (rule, num_classes, device)
    table = _tables.get(key)
    if table is None:
        # An inference tensor could not be saved for a backward pass later on.
        with torch.inference_mode(False), torch.no_grad():
            table = rule.table(num_classes).to(device)
        if len(_tables) < 1024:
            _tables[key] = table
    return table


def _makes_other_tensors() -> bool:
    """Whether a mode or a transform is on under which a new tensor may be of use in there only."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def check_attention_inputs(
    query: Tensor, others: dict[str, Tensor], scale: float | None, backend: str
) -> float:
    """The scale that applies; ``others`` are keys, or keys and values, by the argument's name."""
    require_backend(backend)
    require_tensor("q", query, "(B, H, Lq, d)")
    batch, heads, _, head_dim = query.shape
    for name, tensor in others.items():
        require_tensor(name, tensor, "(B, H, L, d)")
        num_keys = others["k"].shape[2]
        if tensor.shape != (batch, heads, num_keys, head_dim):
            length = "L" if name == "k" else f"{num_keys}"
            raise ValueError(
                f"{name} must have shape (B, H, L, d) = ({batch}, {heads}, {length}, {head_dim}) "
                f"to fit q and k; got {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of q, {query.dtype}; got {tensor.dtype}")
        require_same_device(name, tensor, "q", query)
    for name, tensor in {"q": query, **others}.items():
        if head_dim > 1 and tensor.stride(3) != 1:
            raise ValueError(
                f"{name} must have unit stride in its last dimension; got strides "
                f"{tensor.stride()}. Call {name}.contiguous() first"
            )
    if scale is None:
        return max(head_dim, 1) ** -0.5
    return finite_number("scale", scale, "a number or None")


def require_head_width(query: Tensor) -> None:
    """Refuse heads of no channels, which give an output without numbers but have statistics."""
    if query.shape[3] < 1:
        raise ValueError(
            f"q must have heads of a width d of at least 1; got shape {tuple(query.shape)}"
        )


def check_weights(weights: Tensor, batch: int, length: int, other_name: str) -> None:
    if isinstance(weights, Tensor) and weights.dtype == torch.bool:
        raise TypeError(f"weights must be floating point; got torch.bool: {NO_MASKS}")
    require_float("weights", weights, "(B, L)")
    if tuple(weights.shape) != (batch, length):
        hint = f": {NO_MASKS}" if weights.dim() != 2 else ""
        raise ValueError(
            f"weights must have shape (B, L) = ({batch}, {length}) to fit {other_name}; "
            f"got {tuple(weights.shape)}{hint}"
        )
