"""Small models of transformers with random weights, one of each kind, and texts for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

END_OF_TEXT = 49
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
_TEXT = {**_SIZES, "num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 12,
         "bos_token_id": 48, "eos_token_id": END_OF_TEXT, "pad_token_id": 0}  # fmt: skip
_IMAGE = {**_SIZES, "num_hidden_layers": 3, "patch_size": 8}


def _with_random_values(model: nn.Module) -> nn.Module:
    """Gains, offsets and probes are random too, so that leaving one out is noticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def make_clip(
    implementation: str = "sdpa", image: dict[str, Any] | None = None, **text: Any
) -> Any:
    """17 image tokens of width 32, 3 vision and 2 text blocks, embeddings of width 16."""
    config = transformers.CLIPConfig(
        text_config={**_TEXT, **text},
        vision_config={**_IMAGE, "image_size": 32, **(image or {})},
        projection_dim=16,
    )
    return _made(transformers.CLIPModel, config, implementation)


def make_siglip(
    implementation: str = "sdpa", text: dict[str, Any] | None = None, **image: Any
) -> Any:
    """16 image tokens of width 32, 3 vision and 2 text blocks, embeddings of width 32."""
    config = transformers.SiglipConfig(
        text_config={**_TEXT, "projection_size": 32, **(text or {})},
        vision_config={**_IMAGE, "image_size": 32, **image},
    )
    return _made(transformers.SiglipModel, config, implementation)


def make_siglip2(
    implementation: str = "sdpa",
    text: dict[str, Any] | None = None,
    image: dict[str, Any] | None = None,
) -> Any:
    """As ``make_siglip``, for packed patches."""
    config = transformers.Siglip2Config(
        text_config={**_TEXT, "projection_size": 32, **(text or {})},
        vision_config={**_IMAGE, "num_patches": 16, **(image or {})},
    )
    return _made(transformers.Siglip2Model, config, implementation)


def _made(kind: Any, config: Any, implementation: str) -> Any:
    torch.manual_seed(0)
    return _with_random_values(kind._from_config(config, attn_implementation=implementation))


MODELS: dict[str, Callable[..., Any]] = {
    "clip": make_clip,
    "siglip": make_siglip,
    "siglip2": make_siglip2,
}
WIDTHS = {"clip": 16, "siglip": 32, "siglip2": 32}


def inputs_of(model: Any, images: Tensor) -> dict[str, Tensor]:
    """What the model itself takes for square images."""
    if "Siglip2" not in type(model.vision_model).__name__:  # of a model that PEFT wraps too
        return {"pixel_values": images}
    side = images.shape[-1] // 8
    grid = images.unflatten(3, (side, 8)).unflatten(2, (side, 8))  # (B, 3, side, 8, side, 8)
    packed = grid.permute(0, 2, 4, 3, 5, 1).reshape(len(images), side * side, -1)
    return {
        "pixel_values": packed,
        "pixel_attention_mask": torch.ones(packed.shape[:2], dtype=torch.int64),
        "spatial_shapes": torch.tensor([[side, side]] * len(images)),
    }


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


def image_features(model: Any, images: Tensor) -> Tensor:
    """(B, 3, 32, 32) -> (B, E), by the model's own function."""
    return _tensor(model.get_image_features(**inputs_of(model, images)))


def text_features(model: Any, token_ids: Tensor) -> Tensor:
    """(C, T) -> (C, E), by the model's own function."""
    return _tensor(model.get_text_features(input_ids=token_ids))


def clip_tokenizer() -> Any:
    """CLIP's tokenizer with a token for each character."""
    symbols = [chr(code) for code in range(33, 127)]
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def siglip_tokenizer() -> Any:
    """A tokenizer as SigLIP 2's: lower case, no start, an end, and padding of its own.

    A token is a character with the space in front of it, so that "a" is one as a word.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    symbols = [chr(code) for code in range(33, 127)]
    tokens = ["<pad>", "</s>", "<unk>", *symbols, *(f"▁{symbol}" for symbol in symbols)]
    model = models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=64, model_input_names=["input_ids"],
    )  # fmt: skip


def siglip2_tokenizer() -> Any:
    """The library's own kind for ``siglip2``, with the tokens of ``siglip_tokenizer``."""
    from tokenizers import processors

    symbols = ["▁", *(chr(code) for code in range(33, 127))]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *symbols, *(f"▁{symbol}" for symbol in symbols[1:])]
    tokenizer = transformers.Siglip2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[("▁", symbol) for symbol in symbols[1:]], padding_side="right",
        model_max_length=64, model_input_names=["input_ids"],
    )  # fmt: skip
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


TOKENIZERS = {
    "clip": clip_tokenizer,
    "siglip": siglip_tokenizer,
    "siglip2": siglip2_tokenizer,
}


def write_folder(folder: Any, kind: str) -> Any:
    """A model of a kind as transformers writes it; the model is returned."""
    if kind == "clip":
        tokenizer = clip_tokenizer()
        model = make_clip(
            vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id, max_position_embeddings=77,
        )  # fmt: skip
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    else:
        tokenizer = TOKENIZERS[kind]()
        text = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "eos_token_id": 1}
        if kind == "siglip":
            model = make_siglip(text=text)
            processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
        else:
            model = make_siglip2(text=text)
            processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    return model
