"""Who may import whom, so that data flows one way through the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tir_kernels"
# Rooms that import nothing of the package beside one another: whoever needs them may.
TOOLS = {"errors", "files", "precision", "scalars", "text"}

# Room -> the rooms of the package it may import from.
ALLOWED = {
    **{tool: TOOLS for tool in sorted(TOOLS)},
    "flops": {"operators"},
    "rules": TOOLS,
    "backends": {"rules", *TOOLS},
    "operators": {"backends", "rules", *TOOLS},
    "towers": {"__init__", "operators", *TOOLS},
    "adapters": {"__init__", "towers", "operators", "rules", *TOOLS},
    "demo": {"towers"},
    "fewshot": {"__init__", "towers", "adapters", "demo", "operators", "rules", *TOOLS},
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, as dotted absolute names."""
    package = ["tir_kernels", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str | None:
    """The room a module of the package lies in; None for _C and other packages."""
    parts = module.split(".")
    if parts[0] != "tir_kernels" or parts[1:2] == ["_C"]:
        return None
    if len(parts) == 1:
        return "__init__"
    is_room = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()
    return parts[1] if is_room else "__init__"  # a public name of the package itself


@pytest.mark.parametrize("room", ALLOWED)
def test_imports(room: str) -> None:
    folder = PACKAGE / room
    for path in sorted(folder.rglob("*.py")) or [folder.with_suffix(".py")]:
        used = {room_of(module) for module in imports(path)} - {None, room}
        assert used <= ALLOWED[room], f"{path} imports from {used - ALLOWED[room]}"


def test_model_libraries_are_known_to_towers_alone() -> None:
    libraries = {"open_clip", "timm", "transformers"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != "towers":
            used = {module.split(".")[0] for module in imports(path)}
            assert not used & libraries, f"{path} imports {used & libraries}"


def test_backends_do_not_know_each_other() -> None:
    names = {"reference", "cpu", "cuda", "triton"}
    for path in (PACKAGE / "backends").rglob("*.py"):
        own = path.relative_to(PACKAGE / "backends").parts[0].removesuffix(".py")
        for module in imports(path):
            parts = module.split(".")
            if parts[:2] == ["tir_kernels", "backends"] and len(parts) > 2:
                assert parts[2] == own or parts[2] not in names, f"{path} imports {module}"
