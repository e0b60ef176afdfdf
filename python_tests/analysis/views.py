"""Block views of random numbers, and small random towers, for tests of measures."""

import numpy as np
import open_clip
import timm
import torch

from tir_kernels.analysis.measures import BlockView
from tir_kernels.towers.protocol import AttentionCall

IMAGES, HEADS, PATCHES, WIDTH = 4, 2, 16, 12


def make_view(
    prefix=1, seed=0, batch=IMAGES, patches=PATCHES, classes=3, dtype=torch.float32, **fields
):
    """A view of random tokens, attention and classes; ``fields`` replace its own."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    length = prefix + patches
    query, key, value = (random(batch, HEADS, length, 6) for _ in range(3))
    own = {
        "block": 0,
        "num_blocks": 1,
        "hidden": random(batch, length, WIDTH),
        "output": random(batch, length, WIDTH),
        "call": AttentionCall(2 * query, key, value),
        "num_prefix_tokens": prefix,
        "labels": torch.arange(batch) % classes,
        "class_embeddings": random(classes, WIDTH),
    }
    return BlockView(**{**own, **fields})


def found(measure, view):
    """The measure's findings of a view, by name."""
    findings = list(measure.of_block(view))
    names = [each.name for each in findings]
    assert len(set(names)) == len(names)
    for each in findings:
        assert each.block == view.block
        assert each.values.shape == (len(view.hidden),)
        assert each.values.dtype == torch.float32
        if isinstance(each.chance, torch.Tensor):
            assert each.chance.shape == each.values.shape
    return {each.name: each for each in findings}


def softmax(scores):
    terms = np.exp(scores - scores.max(-1, keepdims=True))
    return terms / terms.sum(-1, keepdims=True)


def attention(view):
    """(B, H, L, L) in float64, by NumPy."""
    query, key = (part.double().numpy() for part in view.call[:2])
    scores = query @ key.swapaxes(2, 3) * query.shape[3] ** -0.5
    if view.call.key_weights is not None:
        scores = scores + np.log(view.call.key_weights.double().numpy())[:, None, None]
    return softmax(scores)


def make_towers():
    """Name -> (model, joint width), with 0, 1, 4 and 5 tokens in front of the patches."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 5, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2}
    make_timm = timm.models.VisionTransformer
    no_class_token = {"class_token": False, "global_pool": "avg"}
    with torch.random.fork_rng():
        alone = make_timm(**sizes, **no_class_token, reg_tokens=4, num_classes=0).eval()
    return {
        "open_clip": (open_clip.CLIP(16, vision, text).eval(), 16),
        "registers": (make_timm(**sizes, reg_tokens=4, num_classes=0).eval(), 32),
        "patches alone": (make_timm(**sizes, **no_class_token, num_classes=0).eval(), 32),
        "registers alone": (alone, 32),
    }


def encode(model, images):
    return model.encode_image(images) if hasattr(model, "encode_image") else model(images)


@torch.no_grad()
def real_images(root, domain, ways, shots):
    """The real model, images of a domain, their labels and the embeddings of their classes."""
    from PIL import Image

    from tir_kernels.fewshot.data.dataset import load_data
    from tir_kernels.towers.loading.models import load_model

    loaded = load_model(str(root / "model"))
    chosen = load_data(root / domain).classes[:ways]
    files = [sorted((root / domain / each.folder).iterdir())[:shots] for each in chosen]
    images = [loaded.preprocess(Image.open(file).convert("RGB")) for own in files for file in own]
    labels = torch.arange(ways).repeat_interleave(shots)
    texts = loaded.tokenizer([f"a photo of a {each.words}." for each in chosen])
    return loaded.model, torch.stack(images), labels, loaded.model.encode_text(texts)
