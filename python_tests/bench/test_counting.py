"""Useful work against numbers worked out by hand."""

import pytest

from bench import bounds
from bench.counting import (
    Cost,
    Transformer,
    attention_cost,
    fused_memory,
    relevance_cost,
    reweighted_attention_cost,
    step_cost,
    token_weights_cost,
    transformer_flops,
)
from bench.shapes import Point

# L 5, d 8, B 2, H 3, numbers of 2 bytes.
ATTENTION = Point(5, 8, 2, 3, 7, "bfloat16")
# L 5, so N 4; d 2, B 2, H 3, so D 6; C 5, E 3.
TOKENS = Point(5, 2, 2, 3, 5, "bfloat16", joint_dim=3)


def test_attention_forward():
    # One of q, k, v, output: 2·3·5·8 numbers of 2 bytes. Weights: 2·5 of 4.
    # One product: 2 operations for each of 2·3·5·5·8.
    assert attention_cost(ATTENTION, "forward") == Cost(4 * 480 + 40, 2 * 2400)


def test_attention_backward():
    # Log-sum-exp: 2·3·5 numbers of 4 bytes.
    assert attention_cost(ATTENTION, "backward") == Cost(8 * 480 + 40 + 120, 5 * 2400)


def test_attention_both_directions():
    both = attention_cost(ATTENTION, "forward+backward")
    assert both == Cost(12 * 480 + 80 + 120, 7 * 2400)


def test_relevance():
    # B 2, N 4, D 6, E 3, C 5: tokens 48, projection 18, norm 12, classes 15 numbers of 2 bytes,
    # and 2·5·4 cosines of 4. Products: 2·(2·4·3)·6 and 2·(2·4·3)·5.
    assert relevance_cost(TOKENS) == Cost(2 * 93 + 160, 288 + 240)


def test_token_weights():
    # One prefix token: weights 2·5 of 4 bytes, counts 2·4 of 4.
    assert token_weights_cost(TOKENS) == Cost(2 * 93 + 40 + 32, 528)


def test_whole_operator_moves_no_cosines():
    attention = attention_cost(TOKENS, "forward")
    whole = reweighted_attention_cost(TOKENS, "forward")
    assert whole == Cost(2 * 93, 528) + attention
    backward = reweighted_attention_cost(TOKENS, "backward")
    assert backward == attention_cost(TOKENS, "backward")


def test_vit_b16_forward_is_as_published():
    # The paper's 17.6 G multiply-adds at 224 x 224 include the patch embedding's 0.1.
    assert transformer_flops(Transformer(1, 197, 768, 12)) / 2 == pytest.approx(17.4e9, rel=0.01)


def test_step_is_two_forward_passes():
    cost = step_cost(Transformer(3, 5, 8, 2), Transformer(4, 6, 4, 1))
    image = 2 * 3 * 2 * (12 * 5 * 64 + 2 * 25 * 8)
    text = 2 * 4 * 1 * (12 * 6 * 16 + 2 * 36 * 4)
    assert cost == Cost(2 * 12 * (2 * 64 + 16) * 4, 2 * (image + text))


def test_fused_memory():
    # Output 480 bytes, statistics 30·4, cosines 2·C·4·4, counts 2·4·4; then three gradients and
    # statistics again.
    assert fused_memory(ATTENTION, "forward") == 480 + 120 + 224 + 32
    assert fused_memory(ATTENTION, "forward+backward") == 856 + 3 * 480 + 120


def test_bound_is_the_longer_of_memory_and_arithmetic(monkeypatch):
    monkeypatch.setattr(bounds, "bytes_per_second", lambda device: 1e6)
    assert bounds.bound_ms(Cost(1000, 10), "cpu", 1e6) == 1.0
    assert bounds.bound_ms(Cost(10, 1000), "cpu", 1e6) == 1.0
    assert bounds.bound_ms(Cost(1000, 4000), "cpu", 1.5e6, 2.5e6) == 2.0


def test_a_cpu_without_short_products_converts_numbers(monkeypatch):
    rates = {"float32": 4e6, "bfloat16": 1e6}
    monkeypatch.setattr(bounds, "_product_rate", lambda device, dtype: rates[dtype])
    bounds.known_flops_per_second.cache_clear()
    assert bounds.flops_per_second("cpu", "bfloat16") == 4e6
    assert bounds.flops_per_second("cuda", "bfloat16") == 1e6
    rates |= {"bfloat16": 8e6, "float32": 5e6}
    assert bounds.flops_per_second("cpu", "bfloat16") == 8e6
    assert bounds.flops_per_second("cpu", "float32") == 5e6
    assert bounds.known_flops_per_second("cpu", "float32") == 4e6
    bounds.known_flops_per_second.cache_clear()
