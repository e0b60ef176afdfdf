"""Where a merged model can go: ONNX and TorchScript without re-weighting, torch.export with it."""

import pytest
import torch
from fewshot.classifier.test_export import METHODS, drawn, logits_of
from torch import Tensor, nn

from tir_kernels import WeightRule, adapters
from tir_kernels.demo import model_directory
from tir_kernels.fewshot.classifier.export import CLASSES_FILE, EMBEDDINGS_FILE, export_merged
from tir_kernels.towers.loading.models import load_model

pytestmark = pytest.mark.slow


class Tower(nn.Module):
    """Images (N, 3, H, W) to features (N, E)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images, normalize=True)


class Logits(Tower):
    """Images (N, 3, H, W) to logits (N, C), as the README.md of a merged folder has it."""

    def __init__(self, model: nn.Module, embeddings: Tensor, scale: float) -> None:
        super().__init__(model)
        self.register_buffer("embeddings", embeddings)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * super().forward(images) @ self.embeddings.T


def exported(method: str, folder):
    """A merged folder's towers with logits, opened by open_clip; its images and their logits."""
    import json

    import open_clip
    import safetensors.torch

    loaded = load_model(str(model_directory()))
    classifier = drawn(loaded, str(model_directory()), None, METHODS[method])
    batches = [torch.randn(n, *loaded.preprocess.shape) for n in (4, 3)]
    expected = [logits_of(classifier, batch) / 1.3 for batch in batches]
    export_merged(classifier, folder)
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    classes = json.loads((folder / CLASSES_FILE).read_text())
    embeddings = safetensors.torch.load_file(folder / EMBEDDINGS_FILE)
    if settings := classes["reweighting"]:
        adapters.add_reweighting(
            model, settings["layers"], settings["placement"], WeightRule(**settings["rule"])
        ).set_class_embeddings(embeddings["deciding"])
    scale = classes["logit_scale"] / classes["temperature"]
    return Logits(model.eval(), embeddings["final"], scale).eval(), batches, expected


def saved_as_onnx(module, images, path):
    """An ONNX file for any number of images."""
    sizes = ({0: torch.export.Dim("N")},)
    with torch.no_grad():
        program = torch.onnx.export(
            module, (images,), dynamo=True, dynamic_shapes=sizes, verbose=False
        )
    program.save(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_without_reweighting_onnx_computes_the_same(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, batches, expected = exported("lora", tmp_path / "out")

    def run(path, images):
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(found)

    for name, part in (("tower", Tower(module.model)), ("logits", module)):
        path = tmp_path / f"{name}.onnx"
        saved_as_onnx(part, batches[0], path)
        for images, logits in zip(batches, expected, strict=True):
            with torch.no_grad():
                known = part(images) if name == "tower" else logits
            torch.testing.assert_close(run(path, images), known, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_without_reweighting_torchscript_computes_the_same(tmp_path):
    module, batches, expected = exported("lora", tmp_path / "out")
    for name, part in (("tower", Tower(module.model)), ("logits", module)):
        with torch.no_grad():
            torch.jit.trace(part, batches[0]).save(tmp_path / f"{name}.pt")
            traced = torch.jit.load(tmp_path / f"{name}.pt")
            for images, logits in zip(batches, expected, strict=True):
                known = part(images) if name == "tower" else logits
                torch.testing.assert_close(traced(images), known, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_with_reweighting_torch_export_alone_works(tmp_path):
    module, batches, expected = exported("tokens", tmp_path / "out")
    with torch.no_grad():
        sizes = ({0: torch.export.Dim("N")},)
        program = torch.export.export(module, (batches[0],), dynamic_shapes=sizes)
        torch.export.save(program, tmp_path / "it.pt2")
        again = torch.export.load(tmp_path / "it.pt2").module()
        for images, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(again(images), logits, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="JointSpace"):
            torch.jit.trace(module, batches[0])
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        saved_as_onnx(module, batches[0], tmp_path / "it.onnx")
    assert "No ONNX function found for <OpOverload(op='tir_kernels.token_weights'" in str(
        caught.value
    )
