"""``python -m tir_kernels``: what runs here, and the facts a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

import torch

import tir_kernels
from tir_kernels.fewshot.streams import forgiving_output
from tir_kernels.operators.choose import choose_backend, load_backend

PACKAGES = ("torch", "triton", "open_clip_torch", "numpy", "torchvision", "safetensors", "peft")


def versions() -> dict[str, str]:
    found = {"tir_kernels": tir_kernels.__version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        return "not found"
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    lines = [line for line in output.splitlines() if line.strip()]
    # nvcc names its release in a later line, other compilers in the first.
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown")


def machine() -> dict[str, str]:
    facts = {
        "system": platform.platform(),
        "processor": processor(),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"
        if hasattr(os, "sched_getaffinity")
        else str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "C++ compiler": compiler(os.environ.get("CXX", "c++")),
        "nvcc": compiler("nvcc"),
        "torch's CUDA": torch.version.cuda or "none (CPU build)",
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        chosen = choose_backend(
            "auto", "attention_forward", torch.device("cuda", index), torch.float32
        )
        facts[f"GPU {index}"] = (
            f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} "
            f"GiB; 'auto' takes {chosen.name}"
        )
    return facts


def backends() -> dict[str, str]:
    found = {}
    for name, reason in tir_kernels.available_backends().items():
        found[name] = f"does not run here: {reason}" if reason else "runs"
        describe = getattr(load_backend(name), "description", None)
        if describe is not None and (description := describe()):
            found[name] += f" ({description})"
    return found


def main() -> None:
    for title, facts in (
        ("Versions", versions()),
        ("Backends", backends()),
        ("Machine", machine()),
    ):
        print(title)
        width = max(map(len, facts))
        for name, fact in facts.items():
            print(f"  {name:{width}}  {fact}")


if __name__ == "__main__":
    with forgiving_output():  # as that of a pipe whose reader has seen enough
        main()
