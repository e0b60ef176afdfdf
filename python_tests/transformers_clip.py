"""An open_clip model's weights in a CLIPModel of transformers, written down from both libraries'
module names.
"""

from typing import Any

import torch
from torch import Tensor, nn


def as_clip_model(transformers: Any, model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """A ``CLIPModel`` that computes what a plain open_clip model computes."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=config["embed_dim"],
            vision_config={
                "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"],
                "num_hidden_layers": vision["layers"], "patch_size": vision["patch_size"],
                "num_attention_heads": vision["width"] // vision["head_width"],
                "image_size": vision["image_size"], "hidden_act": "gelu",
            },
            text_config={
                "hidden_size": text["width"], "intermediate_size": 4 * text["width"],
                "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"],
                "max_position_embeddings": text["context_length"],
                "vocab_size": text["vocab_size"], "hidden_act": "gelu",
                "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0,
            },
        )
    )  # fmt: skip
    texts = getattr(model, "text", model)
    visual = model.visual
    state: dict[str, Tensor] = {
        "logit_scale": torch.zeros(()),
        "visual_projection.weight": visual.proj.T,
        "text_projection.weight": texts.text_projection.T,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "text_model.embeddings.token_embedding.weight": texts.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": texts.positional_embedding,
    }
    for name, norm in (
        ("vision_model.pre_layrnorm", visual.ln_pre),
        ("vision_model.post_layernorm", visual.ln_post),
        ("text_model.final_layer_norm", texts.ln_final),
    ):
        state |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    for part, blocks in (
        ("vision_model", visual.transformer.resblocks),
        ("text_model", texts.transformer.resblocks),
    ):
        for layer, block in enumerate(blocks):
            place = f"{part}.encoder.layers.{layer}"
            weights = block.attn.in_proj_weight.chunk(3)
            biases = block.attn.in_proj_bias.chunk(3)
            for letter, weight, bias in zip("qkv", weights, biases, strict=True):
                state[f"{place}.self_attn.{letter}_proj.weight"] = weight
                state[f"{place}.self_attn.{letter}_proj.bias"] = bias
            for name, module in (
                ("self_attn.out_proj", block.attn.out_proj), ("layer_norm1", block.ln_1),
                ("layer_norm2", block.ln_2), ("mlp.fc1", block.mlp.c_fc),
                ("mlp.fc2", block.mlp.c_proj),
            ):  # fmt: skip
                state |= {
                    f"{place}.{name}.{kind}": getattr(module, kind) for kind in ("weight", "bias")
                }
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all("position_ids" in name for name in missing), missing
    return theirs.eval().requires_grad_(False)
