"""Every refusal of the public functions: before any kernel runs, naming the argument."""

import math
from collections.abc import Callable

import pytest
import torch

import tir_kernels
from tir_kernels import JointSpace, WeightRule
from tir_kernels.operators.bias_activation import bias_activation
from tir_kernels.operators.dropout import philox_dropout

Q = torch.randn(2, 3, 10, 64)
WEIGHTS = torch.ones(2, 10)
TOKENS = torch.randn(2, 10, 32)
CLASSES = torch.randn(5, 16)
SPACE = JointSpace(torch.ones(32), torch.zeros(32), 1e-5, torch.randn(32, 16))


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal must come before a backend is even chosen."""

    def fail(*args: object) -> None:
        raise AssertionError("a backend was asked for")

    modules = "relevance attending attention_statistics dropout bias_activation add_norm"
    for name in [*modules.split(), "dropped_product"]:
        monkeypatch.setattr(f"tir_kernels.operators.{name}.choose_backend", fail)


def attend(q=Q, k=Q, v=Q, weights=WEIGHTS, **options):
    return tir_kernels.weighted_attention(q, k, v, weights, **options)


def describe(q=Q, k=Q, weights=WEIGHTS, **options):
    return tir_kernels.attention_statistics(q, k, weights, **options)


def weigh(tokens=TOKENS, classes=CLASSES, joint_space=SPACE, **options):
    return tir_kernels.token_weights(tokens, classes, joint_space=joint_space, **options)


def relate(tokens=TOKENS, classes=CLASSES, joint_space=SPACE, **options):
    return tir_kernels.token_relevance(tokens, classes, joint_space=joint_space, **options)


def reweight(q=Q, k=Q, tokens=TOKENS, classes=CLASSES, **options):
    options.setdefault("joint_space", SPACE)
    return tir_kernels.reweighted_attention(q, k, k, tokens, classes, **options)


def drop(**options):
    step = torch.tensor([0])
    return philox_dropout(torch.ones(1, 2, 3, 4), step, step, **options)


REFUSALS: list[tuple[Callable, type[Exception], str]] = [
    (lambda: attend(q=[1.0]), TypeError, r"^q must be a tensor of shape \(B, H, Lq, d\); got list"),
    (lambda: attend(q=Q[0]), ValueError, r"^q must have shape \(B, H, Lq, d\); got \(3, 10, 64\)"),
    (lambda: attend(q=Q.int()), TypeError, "^q must be float32.*got torch.int32"),
    (lambda: attend(k=Q[:, :2]), ValueError, r"^k must have shape.*= \(2, 3, L, 64\).*\(2, 2, 10"),
    (lambda: attend(v=Q[:, :, :9]), ValueError, r"^v must have shape.*= \(2, 3, 10, 64\).*9, 64"),
    (lambda: attend(v=Q.half()), TypeError, "^v must have the dtype of q.*float32.*float16"),
    (lambda: attend(k=Q.to("meta")), ValueError, "^k must be on the device of q, cpu.*meta"),
    (lambda: attend(k=Q.mT.contiguous().mT), ValueError, r"^k must have unit stride.*contiguous"),
    (lambda: attend(weights=WEIGHTS[:, :9]), ValueError, r"^weights must have shape \(B, L\) = "),
    (
        lambda: attend(weights=WEIGHTS[0]),
        ValueError,
        r"^weights must.*got \(10,\): there are no masks",
    ),
    (lambda: attend(weights=WEIGHTS > 0), TypeError, "^weights must.*bool: there are no masks"),
    (
        lambda: attend(attn_mask=WEIGHTS),
        ValueError,
        "^attn_mask must.*padding is weight 0.*is_causal",
    ),
    (lambda: attend(dropout_p=0.1), ValueError, "^dropout_p must be 0; got 0.1.*no dropout"),
    (lambda: attend(is_causal=None), TypeError, "^is_causal must be True or False; got None"),
    (lambda: attend(weights=WEIGHTS.int()), TypeError, "^weights must be float32"),
    (lambda: attend(weights=WEIGHTS.to("meta")), ValueError, "^weights must be on the device"),
    (lambda: attend(scale="1"), TypeError, "^scale must be a number or None; got str"),
    (lambda: attend(scale=math.nan), ValueError, "^scale must be finite; got nan"),
    (lambda: attend(backend="fast"), ValueError, "^backend must be 'auto' or one of reference.*"),
    (lambda: attend(weights=None, v=Q.half()), TypeError, "^v must have the dtype of q"),
    (lambda: attend(weights=None, backend="fast"), ValueError, "^backend must be 'auto' or one of"),
    (lambda: attend(weights=1.0), TypeError, "^weights must be a tensor"),
    (
        lambda: attend(q=Q[..., :0], k=Q[..., :0], v=Q[..., :0], return_lse=True),
        ValueError,
        "^q mu",
    ),
    (
        lambda: describe(q=[1.0]),
        TypeError,
        r"^q must be a tensor of shape \(B, H, Lq, d\); got list",
    ),
    (
        lambda: describe(q=Q[0]),
        ValueError,
        r"^q must have shape \(B, H, Lq, d\); got \(3, 10, 64\)",
    ),
    (lambda: describe(k=Q[..., :9]), ValueError, r"^k must have shape.*= \(2, 3, L, 64\).*10, 9\)"),
    (lambda: describe(k=Q.half()), TypeError, "^k must have the dtype of q.*float32.*float16"),
    (lambda: describe(k=Q.to("meta")), ValueError, "^k must be on the device of q, cpu.*meta"),
    (lambda: describe(k=Q.mT.contiguous().mT), ValueError, r"^k must have unit stride.*contiguous"),
    (lambda: describe(Q[..., :0], Q[..., :0]), ValueError, "^q must have heads of a width d of at"),
    (lambda: describe(weights=WEIGHTS[0]), ValueError, r"^weights must have shape \(B, L\) = "),
    (lambda: describe(is_causal=1), TypeError, "^is_causal must be True or False; got 1"),
    (lambda: describe(weights=WEIGHTS[:, :9]), ValueError, r"^weights must have shape \(B, L\) = "),
    (lambda: describe(weights=WEIGHTS.to("meta")), ValueError, "^weights must be on the device"),
    (lambda: describe(weights=1.0), TypeError, "^weights must be a tensor"),
    (lambda: describe(num_prefix_tokens=11), ValueError, "^num_prefix_tokens must.*0 and.*Lq = 10"),
    (lambda: describe(num_prefix_tokens=-1), ValueError, "^num_prefix_tokens must lie between 0"),
    (lambda: describe(num_prefix_tokens=True), TypeError, "^num_prefix_tokens must be an int"),
    (lambda: describe(scale="1"), TypeError, "^scale must be a number or None; got str"),
    (lambda: describe(scale=math.nan), ValueError, "^scale must be finite; got nan"),
    (lambda: describe(backend="fast"), ValueError, "^backend must be 'auto' or one of reference.*"),
    (lambda: describe(backend=None), TypeError, "^backend must be a str; got NoneType"),
    (lambda: drop(backend="fast"), ValueError, "^backend must be 'auto' or one of reference.*"),
    (lambda: drop(backend=None), TypeError, "^backend must be a str; got NoneType"),
    (lambda: bias_activation(Q, None, backend=1), TypeError, "^backend must be a str; got int"),
    (lambda: attend(backend=None), TypeError, "^backend must be a str; got NoneType"),
    (lambda: weigh(tokens=TOKENS[0]), ValueError, r"^tokens must have shape \(B, L, D\)"),
    (lambda: weigh(tokens=TOKENS.long()), TypeError, "^tokens must be float32"),
    (lambda: weigh(tokens=TOKENS[..., :0]), ValueError, "^tokens must have a width D of at least"),
    (lambda: weigh(classes=CLASSES[0]), ValueError, r"^class_embeddings must have shape \(C, E\)"),
    (lambda: weigh(classes=[CLASSES]), TypeError, "^class_embeddings must be a tensor"),
    (lambda: weigh(classes=CLASSES[:0]), ValueError, "^class_embeddings must hold at least one"),
    (lambda: weigh(classes=CLASSES.to("meta")), ValueError, "^class_embeddings must be on the dev"),
    (
        lambda: weigh(classes=CLASSES.expand(3, 5, 16)),
        ValueError,
        "^class_embeddings.*groups G that divides the 2 images of tokens; got G = 3",
    ),
    (
        lambda: weigh(classes=CLASSES[:, :8]),
        ValueError,
        r"^joint_space.proj must map to the width of class_embeddings, E = 8; got \(32, 16\)",
    ),
    (
        lambda: weigh(joint_space=None),
        ValueError,
        "^class_embeddings have width E = 16 but tokens have width D = 32; pass joint_space",
    ),
    (lambda: weigh(joint_space=CLASSES), TypeError, "^joint_space must be a JointSpace; got Tenso"),
    (
        lambda: weigh(joint_space=JointSpace(torch.ones(31), proj=None)),
        ValueError,
        r"^joint_space.norm_weight must fit tokens of width D = 32; got \(31,\)",
    ),
    (
        lambda: weigh(joint_space=JointSpace(proj=torch.ones(32, 16, device="meta"))),
        ValueError,
        "^joint_space.proj must be on the device of tokens",
    ),
    (lambda: weigh(num_prefix_tokens=11), ValueError, "^num_prefix_tokens.*between 0 and.*L = 10"),
    (lambda: weigh(num_prefix_tokens=-1), ValueError, "^num_prefix_tokens must lie between 0"),
    (lambda: weigh(num_prefix_tokens=1.0), TypeError, "^num_prefix_tokens must be an int; got fl"),
    (lambda: weigh(rule="linear"), TypeError, "^rule must be a WeightRule; got str"),
    (lambda: weigh(table=torch.ones(5)), ValueError, r"^table must have C \+ 1 = 6 entries.*got 5"),
    (lambda: weigh(table=torch.ones(6, 1)), ValueError, r"^table must have shape \(C \+ 1\)"),
    (lambda: weigh(table=[1.0] * 6), TypeError, "^table must be a tensor"),
    (lambda: weigh(table=torch.ones(6, device="meta")), ValueError, "^table must be on the device"),
    (lambda: weigh(backend="gpu"), ValueError, "^backend must be 'auto' or one of"),
    (lambda: relate(tokens=TOKENS[0]), ValueError, "^tokens must have shape"),
    (lambda: relate(num_prefix_tokens=True), TypeError, "^num_prefix_tokens must be an int"),
    (lambda: relate(backend=1), TypeError, "^backend must be a str"),
    (lambda: reweight(q=Q[0]), ValueError, "^q must have shape"),
    (lambda: reweight(k=Q[:, :, :9]), ValueError, "^tokens.*batch and length of k"),
    (lambda: reweight(tokens=TOKENS.to("meta")), ValueError, "^class_embeddings must be on the d"),
    (lambda: reweight(tokens=TOKENS.double()), TypeError, "^tokens are float64 but q is torch.flo"),
    (lambda: reweight(table=torch.ones(3)), ValueError, "^table must have"),
    (lambda: reweight(scale=math.inf), ValueError, "^scale must be finite"),
    (lambda: tir_kernels.reweight_tokens(TOKENS, WEIGHTS[:1]), ValueError, "^weights must have sh"),
    (lambda: tir_kernels.reweight_tokens(TOKENS[0], WEIGHTS), ValueError, "^tokens must have shap"),
    (lambda: tir_kernels.reweight_tokens(TOKENS, 2.0), TypeError, "^weights must be a tensor"),
    (lambda: WeightRule("sharpen"), ValueError, "^kind must be one of linear.*got 'sharpen'"),
    (lambda: WeightRule(strength=math.inf), ValueError, "^strength must be finite"),
    (lambda: WeightRule(strength="1"), TypeError, "^strength must be a number; got str"),
    (lambda: WeightRule(center=math.nan), ValueError, "^center must be finite"),
    (lambda: WeightRule(top_ratio=1.2), ValueError, r"^top_ratio must lie in \[0, 1\]; got 1.2"),
    (lambda: WeightRule(top_ratio=math.nan), ValueError, "^top_ratio must lie in"),
    (lambda: WeightRule(top_ratio=None), TypeError, "^top_ratio must be a number"),
    (lambda: WeightRule().table(0), ValueError, "^num_classes must be at least 1; got 0"),
    (lambda: WeightRule().table(2.0), TypeError, "^num_classes must be an int; got float"),
    (lambda: JointSpace(norm_weight=torch.ones(2, 2)), ValueError, r"^norm_weight must have shape"),
    (lambda: JointSpace(norm_weight=torch.ones(4).int()), TypeError, "^norm_weight must have a fl"),
    (lambda: JointSpace(proj=[[1.0]]), TypeError, "^proj must be a tensor or None; got list"),
    (
        lambda: JointSpace(torch.ones(3), proj=torch.ones(4, 2)),
        ValueError,
        "^the parts of JointSpace must share one width D",
    ),
    (lambda: JointSpace(norm_eps=-1.0), ValueError, "^norm_eps must not be negative"),
    (lambda: JointSpace(torch.ones(3), norm_eps=None), ValueError, "^norm_eps=None switches Layer"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSALS, ids=lambda v: None)
def test_refusal(call: Callable, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
