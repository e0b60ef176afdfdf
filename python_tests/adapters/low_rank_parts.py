"""Parts of LoRA by themselves, for tests."""

from tiny_clip import make_images, make_token_ids
from torch import Tensor, nn

from tir_kernels.adapters.low_rank import LowRank, LowRankSettings
from tir_kernels.towers.open_clip.blocks import OpenClipBlock
from tir_kernels.towers.opening import put_on


def make_low_rank(
    width: int, rank: int, dropout: float, passes: bool, num_episodes: int | None = None
) -> LowRank:
    """The change of query, key and value, with alpha 8."""
    return LowRank((3, width, width), LowRankSettings(rank, 8, dropout, passes, num_episodes))


def encode(model: nn.Module) -> tuple[Tensor, Tensor]:
    images = make_images().to(model.visual.proj.dtype)
    return model.encode_image(images), model.encode_text(make_token_ids())


def opened(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    put_on(attention, object(), OpenClipBlock.opened)
    return attention
