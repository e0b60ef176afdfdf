"""The CUDA kernels of relevance and selection, emulated: what test_token_weights.py does not reach.

Tiles of each size, tokens that stay in shared memory and tokens that pass through it, every way a
projection can lie in memory, more classes than a block takes, and selection among thousands.
"""

from __future__ import annotations

import math
from pathlib import Path

import cuda_emulation
import oracle
import pytest
import torch
from torch import Tensor

import tir_kernels
from tir_kernels import JointSpace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(bool(cuda_emulation.missing()), reason=cuda_emulation.missing() or "runs"),
    pytest.mark.slow,
]


def draw_tokens(
    batch: int, patches: int, width: int, dtype: torch.dtype = torch.float32, prefix: int = 1
) -> Tensor:
    generator = torch.Generator().manual_seed(width * patches + batch)
    return torch.randn(batch, patches + prefix, width, generator=generator).to(dtype)


def draw_space(width: int, joint: int, dtype: torch.dtype = torch.float32) -> JointSpace:
    generator = torch.Generator().manual_seed(width + joint)
    weight = 1 + 0.1 * torch.randn(width, generator=generator)
    bias = 0.1 * torch.randn(width, generator=generator)
    proj = torch.randn(width, joint, generator=generator) * width**-0.5
    return JointSpace(weight.to(dtype), bias.to(dtype), 1e-5, proj.to(dtype))


def draw_classes(
    groups: int, num_classes: int, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(num_classes)
    return torch.randn(groups, num_classes, width, generator=generator).to(dtype)


def run(tokens: Tensor, classes: Tensor, space: JointSpace, prefix: int = 1) -> Tensor:
    return tir_kernels.token_relevance(
        tokens,
        classes,
        joint_space=space,
        num_prefix_tokens=prefix,
        backend=cuda_emulation.NAME,
    )


def check(tokens: Tensor, classes: Tensor, space: JointSpace, prefix: int = 1) -> None:
    oracle.assert_as_accurate(
        "relevance",
        run(tokens, classes, space, prefix),
        oracle.plain_relevance(tokens, classes, space, prefix),
        *oracle.exact_relevance(tokens, classes, space, prefix),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "images", "patches"), [(1, 2, 7), (3, 3, 13), (2, 4, 31), (1, 7, 54)]
)
def test_tiles_end_anywhere(
    kernels, groups: int, images: int, patches: int, dtype: torch.dtype
) -> None:
    """Blocks of 32, 64 and 96 tokens, which begin and end within images but never span groups."""
    tokens = draw_tokens(groups * images, patches, 40, dtype)
    check(tokens, draw_classes(groups, 5, 72, dtype), draw_space(40, 72, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", cuda_emulation.DEVICES)
@pytest.mark.parametrize("transposed", [False, True])
def test_tokens_that_stay_or_pass(
    kernels, device: str, dtype: torch.dtype, transposed: bool
) -> None:
    """Two slices of features over tokens of which little shared memory holds a part at a time."""
    kernels.set_device(*cuda_emulation.DEVICES[device])
    width = 560 if dtype == torch.float32 else 1100
    space = draw_space(width, 260, dtype)
    if transposed:
        space = JointSpace(space.norm_weight, None, 1e-5, space.proj.T.contiguous().T)
    check(draw_tokens(1, 20, width, dtype), draw_classes(1, 9, 260, dtype), space)
    # Means far from 0, where a sum of squares would lose the variance.
    check(draw_tokens(1, 3, width, dtype) + 50, draw_classes(1, 2, 260, dtype), space)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("proj_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_projections_as_they_lie(
    kernels, dtype: torch.dtype, proj_dtype: torch.dtype, transposed: bool, offset: int
) -> None:
    """Any type, rows or columns contiguous, on 16-byte boundaries or off them."""
    space = draw_space(48, 80)
    store = torch.full((100, 120), math.nan, dtype=proj_dtype)
    proj = store[8 : 8 + 80, offset : offset + 48].T if transposed else store[:48, offset:][:, :80]
    proj.copy_(space.proj)
    space = JointSpace(space.norm_weight, space.norm_bias, 1e-5, proj)
    check(draw_tokens(1, 11, 48, dtype), draw_classes(1, 3, 80, dtype), space)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 40, 2), (33, 1, 3), (7, 257, 1), (129, 65, 17)])
def test_odd_sizes(kernels, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """Widths, features and classes that fill no vector; norm and classes of every type."""
    width, joint, num_classes = sizes
    for other in DTYPES:
        tokens = draw_tokens(2, 3, width, dtype, prefix=4)
        space = draw_space(width, joint)
        parts = (space.norm_weight.to(other), space.norm_bias.to(other))
        # Rounding of a variance of 0 says nothing: width 1 goes without LayerNorm.
        eps = 1e-5 if width > 1 else None
        space = JointSpace(*(parts if eps else (None, None)), eps, space.proj)
        check(tokens, draw_classes(2, num_classes, joint, other), space, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 70, 256, 300, 513])
def test_without_projection(kernels, dtype: torch.dtype, width: int) -> None:
    """Features are the tokens, which pass by in slices where there are more than 256."""
    tokens, classes = draw_tokens(2, 19, width, dtype), draw_classes(2, 4, width, dtype)
    norm = draw_space(width, 1)
    check(tokens, classes, JointSpace(norm.norm_weight, norm.norm_bias, 1e-5))
    check(tokens, classes, JointSpace(norm_eps=1e-5))
    check(tokens, classes, JointSpace(norm_eps=None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_tokens(kernels, dtype: torch.dtype) -> None:
    """Any stride of images and tokens; rows that begin off 16-byte boundaries."""
    space, classes = draw_space(32, 40, dtype), draw_classes(1, 5, 40, dtype)
    store = draw_tokens(3, 20, 48, dtype)
    aligned, shifted = store[:, ::2, 8:40], store[..., 3:35]
    check(aligned, classes, space)
    check(shifted, classes, space)
    check(store.transpose(0, 1)[..., :32], classes, space)
    check(store[:1, :, :32].expand(3, -1, -1), classes, space)


@pytest.mark.parametrize("num_classes", [8, 9, 100, 300, 513])
def test_many_classes(kernels, num_classes: int) -> None:
    """More than one block takes; sums of two slices meet in the output."""
    tokens = draw_tokens(4, 9, 24, torch.bfloat16)
    joint = 264 if num_classes < 300 else 24
    check(tokens, draw_classes(2, num_classes, joint), draw_space(24, joint))
    assert torch.equal(
        run(tokens, draw_classes(2, num_classes, 24), JointSpace())[:, -3:],
        run(tokens, draw_classes(2, num_classes, 24)[:, -3:], JointSpace()),
    )


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_zero_stay_with_their_token(kernels, dtype: torch.dtype, projected: bool) -> None:
    tokens, classes = draw_tokens(2, 40, 72, dtype), draw_classes(1, 5, 72, dtype)
    proj = draw_space(72, 72, dtype).proj if projected else None
    clean = run(tokens, classes, JointSpace(norm_eps=1e-5, proj=proj))
    tokens[1, 8, 70] = math.nan
    tokens[0, 3, 0] = math.inf
    ours = run(tokens, classes, JointSpace(norm_eps=1e-5, proj=proj))
    spoilt = torch.zeros(2, 40, dtype=torch.bool)
    spoilt[1, 7] = spoilt[0, 2] = True
    assert torch.equal(ours.isnan(), spoilt[:, None].expand(2, 5, 40))
    good = ~spoilt[:, None].expand_as(ours)
    assert torch.equal(ours[good], clean[good])
    tokens = torch.zeros(1, 9, 72, dtype=dtype)
    assert (run(tokens, classes, JointSpace(norm_eps=None, proj=proj)) == 0).all()
    assert (run(tokens, torch.zeros(2, 72), JointSpace(norm_eps=1e-5, proj=proj)) == 0).all()


def hard_problem(kind: str, width: int) -> tuple[Tensor, Tensor, JointSpace]:
    """float32 problems whose products are sums of unlike, or of like, numbers."""
    generator = torch.Generator().manual_seed(width)
    tokens, classes = draw_tokens(2, 48, width), draw_classes(1, 16, 64)
    space = draw_space(width, 64)

    def spread(values: Tensor, decades: int) -> Tensor:
        exponents = torch.rand(values.shape, generator=generator) * 2 - 1
        return values * 10 ** (decades * exponents)

    plain = JointSpace(norm_eps=None, proj=space.proj)
    if kind == "far from 0":
        return tokens + 30, classes, space
    if kind == "one channel large":
        tokens[..., 3] *= 300
        return tokens, classes, space
    if kind == "unlike magnitudes":
        return spread(tokens, 3), classes, JointSpace(norm_eps=None, proj=spread(space.proj, 3))
    if kind == "all positive":
        return tokens.abs(), classes.abs(), JointSpace(norm_eps=None, proj=space.proj.abs())
    if kind == "tiny":
        return tokens * 1e-30, classes, plain
    if kind == "tiny features":
        proj = space.proj * 1e-9
        return tokens, classes, JointSpace(space.norm_weight, space.norm_bias, 1e-5, proj)
    return tokens, classes, plain


HARD = ("far from 0", "one channel large", "unlike magnitudes", "all positive", "tiny",
        "tiny features", "nothing special")  # fmt: skip


def relevance_errors(kind: str, width: int) -> tuple[Tensor, Tensor]:
    """Of ours, and of plain PyTorch in float32."""
    problem = hard_problem(kind, width)
    exact, _ = oracle.exact_relevance(*problem, 1)
    plain = oracle.plain_relevance(*problem, 1)
    return (run(*problem).double() - exact).abs(), (plain.double() - exact).abs()


@pytest.mark.parametrize("width", [24, 768])
@pytest.mark.parametrize("kind", HARD)
def test_tensor_cores_multiply_float32_accurately(kernels, kind: str, width: int) -> None:
    """No allowance for terms that cancel, as other tests have."""
    ours, plain = relevance_errors(kind, width)
    assert ours.max() <= 2 * plain.max()
    assert ours.mean() <= 2 * plain.mean()


FLOAT_MISTAKES = {
    "none": ("float_product.cuh", "", ""),
    "the left is not split": (
        "float_product.cuh",
        "small[i] = parts.small;",
        "small[i] = 0;",
    ),
    "the right is not split": (
        "float_product.cuh",
        "multiply_add_tf32(sum, large, first.small, second.small);",
        "",
    ),
    "totals stay in tensor cores": (
        "float_product.cuh",
        "multiply_add_tf32(sum, large, first.large, second.large);",
        "multiply_add_tf32(total, large, first.large, second.large);",
    ),
    "numbers are not cut": ("float_product.cuh", "kTaken = 0xffffe000", "kTaken = 0xfffff000"),
}


@pytest.mark.parametrize("mistake", FLOAT_MISTAKES)
def test_mistakes_in_float32_products_are_seen(
    kernels, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = FLOAT_MISTAKES[mistake]
    faulty = cuda_emulation.load(cuda_emulation.build_with(edit, "relevance", "float", tmp_path))
    monkeypatch.setattr(cuda_emulation.register(), "_kernels", faulty)
    ours, plain = relevance_errors("nothing special", 768)
    is_accurate = bool(ours.isfinite().all()) and bool(ours.mean() <= 2 * plain.mean())
    assert is_accurate == (mistake == "none")


def test_ends_of_the_range_of_float32(kernels) -> None:
    tokens, classes = draw_tokens(1, 40, 24), draw_classes(1, 5, 24)
    space = JointSpace(norm_eps=None, proj=draw_space(24, 24).proj)
    clean = run(tokens, classes, space)
    # NaN as a GPU makes it, and NaN of which tensor cores would see infinity.
    patterns = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    odd = tokens.clone()
    odd[0, 5, 3], odd[0, 9, 23], odd[0, 20, 0] = patterns
    odd[0, 30, 7], odd[0, 33, 7] = math.inf, -math.inf
    odd[0, 12, 4] = 1e-42  # too small to matter, or to harm
    ours = run(odd, classes, space)
    spoilt = torch.zeros(40, dtype=torch.bool)
    spoilt[[4, 8, 19, 29, 32]] = True
    assert torch.equal(ours.isnan().all(1)[0] | ~spoilt, torch.ones(40, dtype=torch.bool))
    assert torch.equal(ours.isnan().any(1)[0], spoilt)
    spoilt[11] = True
    assert torch.equal(ours[..., ~spoilt], clean[..., ~spoilt])
    # Features beside which the norm's 1e-8 is large: what is lost of them is lost there too.
    tiny = (tokens * 1e-40, classes, space)
    exact, _ = oracle.exact_relevance(*tiny, 1)
    assert (run(*tiny).double() - exact).abs().max() < 1e-32
    # Features whose squares overflow have no norm; plain PyTorch says 0 as well.
    assert (run(tokens * 1e30, classes, space) == 0).all()


def test_any_order_of_threads_gives_the_same_bits(kernels) -> None:
    kernels.set_device(*cuda_emulation.DEVICES["little shared memory"])
    tokens = draw_tokens(2, 16, 1100, torch.bfloat16)
    classes = draw_classes(1, 11, 264, torch.bfloat16)
    copied, converted = draw_space(1100, 264, torch.bfloat16), draw_space(1100, 264)
    scores = torch.randint(-2, 2, (2, 40, 300)) * 0.5
    results = []
    for order in (0, 1, 5):
        kernels.set_thread_order(order)
        results.append(
            (
                run(tokens, classes, copied),
                run(tokens, classes, converted),
                run(tokens, draw_classes(1, 3, 1100), JointSpace()),
                *select(kernels, scores, 90),
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def select(kernels, relevance: Tensor, top_k: int, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Counts and weights from the kernel, without weights too."""
    batch, num_classes, patches = relevance.shape
    table = torch.arange(num_classes + 1) * 0.25 - 1
    weights = torch.full((batch, prefix + patches), math.nan)
    sizes = (batch, num_classes, patches, prefix)
    found = []
    for address in (weights.data_ptr(), 0):
        counts = torch.full((batch, patches), -7, dtype=torch.int32)
        kernels.select_tokens(
            sizes, top_k, relevance.data_ptr(), table.data_ptr(), counts.data_ptr(), address, 0
        )
        found.append(counts)
    assert torch.equal(*found)
    assert torch.equal(weights[:, prefix:], table[found[0].long()])
    assert (weights[:, :prefix] == 1).all()
    return found[0], weights


def tied(batch: int, num_classes: int, patches: int, values: int) -> Tensor:
    """Relevance that takes few values, among them NaN, infinities and zeros of both signs."""
    generator = torch.Generator().manual_seed(patches)
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-42, -1e-42])
    pool = torch.cat([special, torch.randn(max(values, 1), generator=generator)])[:values]
    choice = torch.randint(0, values, (batch, num_classes, patches), generator=generator)
    return pool[choice]


@pytest.mark.parametrize("patches", [1, 31, 32, 33, 255, 256, 257, 799, 801, 4096])
@pytest.mark.parametrize("device", cuda_emulation.DEVICES)
def test_selection_is_exact(kernels, device: str, patches: int) -> None:
    kernels.set_device(*cuda_emulation.DEVICES[device])
    generator = torch.Generator().manual_seed(patches)
    distinct = torch.randn(2, 3, patches, generator=generator)
    # Short mantissas are where a search by bits may be off by one.
    whole = torch.stack([torch.randperm(patches, generator=generator) for _ in range(2)])
    whole = (whole - patches // 2).float()[:, None].contiguous()
    for relevance in (distinct, whole, tied(2, 3, patches, 1), tied(2, 3, patches, 9)):
        for top_k in {0, 1, patches // 3, patches - 1, patches}:
            counts, _ = select(kernels, relevance, top_k)
            assert torch.equal(counts, oracle.pick_counts(relevance, top_k)), top_k


@pytest.mark.parametrize("num_classes", [1, 33, 200])
def test_selection_by_many_classes(kernels, num_classes: int) -> None:
    relevance = tied(2, num_classes, 60, 20)
    counts, _ = select(kernels, relevance, 18, prefix=5)
    assert torch.equal(counts, oracle.pick_counts(relevance, 18))


def test_selection_without_room_for_keys(kernels) -> None:
    """Rows too long for shared memory are read again and again."""
    kernels.set_device(4, 4096)
    for relevance in (torch.randn(2, 5, 1500), tied(2, 40, 700, 12)):
        for top_k in (0, 200, 700):
            counts, _ = select(kernels, relevance, top_k, prefix=0)
            assert torch.equal(counts, oracle.pick_counts(relevance, top_k))
