"""Methods: ways to turn a few labelled images into a classifier, one file each.

To add one, write a file like ``zero_shot.py`` and name it in ``METHODS``.
"""

from __future__ import annotations

from tir_kernels.fewshot.methods.observer import Observer
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method, ParameterGroup
from tir_kernels.registry import chosen, load

# Name -> "module:Class". A run compares the first two where nothing is said, the demo three.
METHODS = {
    "tir": "tir_kernels.fewshot.methods.tir:TIR",
    "lora": "tir_kernels.fewshot.methods.lora:LoRA",
    "zero-shot": "tir_kernels.fewshot.methods.zero_shot:ZeroShot",
    "centroid": "tir_kernels.fewshot.methods.centroid:Centroid",
    "linear-probe": "tir_kernels.fewshot.methods.linear_probe:LinearProbe",
    "zs-lp": "tir_kernels.fewshot.methods.zs_lp:ZSLP",
    "clap": "tir_kernels.fewshot.methods.clap:CLAP",
    "lp++": "tir_kernels.fewshot.methods.lp_plus_plus:LPPlusPlus",
    "tip-adapter": "tir_kernels.fewshot.methods.tip_adapter:TipAdapter",
    "tip-adapter-loo": "tir_kernels.fewshot.methods.tip_adapter_loo:TipAdapterLOO",
    "tip-adapter-f": "tir_kernels.fewshot.methods.tip_adapter_f:TipAdapterF",
    "clip-adapter": "tir_kernels.fewshot.methods.clip_adapter:CLIPAdapter",
    "taskres": "tir_kernels.fewshot.methods.taskres:TaskRes",
    "prolip": "tir_kernels.fewshot.methods.prolip:ProLIP",
    "coop": "tir_kernels.fewshot.methods.coop:CoOp",
    "cocoop": "tir_kernels.fewshot.methods.cocoop:CoCoOp",
    "maple": "tir_kernels.fewshot.methods.maple:MaPLe",
    "plot": "tir_kernels.fewshot.methods.plot:PLOT",
    "mind": "tir_kernels.fewshot.methods.mind:Mind",
    "atha": "tir_kernels.fewshot.methods.atha:ATHA",
    # The tower's forward pass is changed, and nothing is trained.
    "test-time-registers": "tir_kernels.fewshot.methods.registers:TestTimeRegisters",
    "sink-redistribution": "tir_kernels.fewshot.methods.sink_redistribution:SinkRedistribution",
    "sink-suppression": "tir_kernels.fewshot.methods.sink_suppression:SinkSuppression",
    "attention-temperature": "tir_kernels.fewshot.methods.temperature:AttentionTemperature",
    "paint": "tir_kernels.fewshot.methods.paint:Paint",
    # Published with training on a source domain, here on the support images alone.
    "temperature-dropout": "tir_kernels.fewshot.methods.temperature_dropout:TemperatureDropout",
    "random-registers": "tir_kernels.fewshot.methods.random_registers:RandomRegisters",
}
DEFAULT_METHODS = tuple(METHODS)[:2]
DEMO_METHODS = tuple(METHODS)[:3]

__all__ = [
    "DEFAULT_METHODS",
    "DEMO_METHODS",
    "METHODS",
    "Kit",
    "Learner",
    "Method",
    "Observer",
    "ParameterGroup",
    "method_class",
]


def __getattr__(name: str) -> type[Method]:
    # methods.TIR and its like, each from its own file.
    for path in METHODS.values():
        if path.endswith(f":{name}"):
            return load(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def method_class(name: str) -> type[Method]:
    """The class of a method in the registry.

    Raises:
        ValueError: There is none of that name.
    """
    return chosen(METHODS, "method", name)
