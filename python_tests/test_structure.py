"""Who may import whom, so that data flows one way through the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tir_kernels"
# Rooms that import nothing of the package beside one another: whoever needs them may.
TOOLS = {"allocator", "errors", "files", "precision", "registry", "scalars", "text"}

# Their arguments are fixed by what they promise to users.
CONTRACTS = {"reweighted_attention", "weighted_attention"}

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
    "analysis": {"__init__", "fewshot", "towers", *TOOLS},
    "fewshot": {"__init__", "analysis", "towers", "adapters", "demo", "operators", "rules", *TOOLS},
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


def test_pages_and_figures_alone_read_runs() -> None:
    """And they do so by the run's own readers; a measure knows of no training."""
    allowed = ("tir_kernels.fewshot.run.", "tir_kernels.fewshot.methods.families.")
    rooms = [PACKAGE / "analysis" / name for name in ("page", "figures")]
    for path in (PACKAGE / "analysis").rglob("*.py"):
        used = {each for each in imports(path) if each.startswith("tir_kernels.fewshot")}
        if any(room in path.parents for room in rooms):
            used = {each for each in used if not each.startswith(allowed)}
        assert not used, f"{path} imports {used}"


def test_one_file_names_the_published_method() -> None:
    """Beside its registry, none but its own file compares with its name."""
    own = {PACKAGE / "fewshot" / "methods" / name for name in ("tir.py", "__init__.py")}
    for path in sorted(PACKAGE.rglob("*.py")):
        names = [
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and node.value == "tir"
        ]
        assert not names or path in own, path


def test_protocols_are_short_and_no_file_is_long() -> None:
    root = PACKAGE.parent
    for folder in ("tir_kernels", "python_tests", "bench", "csrc"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".sh"):
                length = len(path.read_text().splitlines())
                assert length <= (100 if path.name == "protocol.py" else 400), f"{path}: {length}"


def test_no_function_takes_more_than_eight() -> None:
    """Kernels, the operators' own calls and what stands in for PyTorch's aside."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if "kernels" in path.parts[-3:-1]:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in CONTRACTS:
                arguments = node.args
                given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                own = [each for each in given if each.arg not in ("self", "cls", "ctx")]
                assert len(own) <= 8, f"{path}: {node.name} takes {len(own)}"
