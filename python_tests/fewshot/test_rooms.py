"""Who knows whom within the driver, and who speaks of options."""

import ast
import re

import pytest
from test_structure import PACKAGE, imports

DRIVER = PACKAGE / "fewshot"
# The files that know a command line: a command has a file of its own.
COMMAND_LINE = {
    "options.py",
    "option_kinds.py",
    *(path.name for path in DRIVER.glob("*command.py")),
}

# All of methods but the seam, their registry and their families.
METHODS_THEMSELVES = (
    r"tir_kernels\.fewshot\.methods\.(?!Method|Observer|METHODS|method_class|families)"
)


@pytest.mark.parametrize("room", ["data", "run"])
def test_data_and_run_know_no_model(room):
    for path in sorted((DRIVER / room).rglob("*.py")):
        for module in imports(path):
            assert not re.match(r"open_clip|transformers|tir_kernels\.(towers|adapters)", module), (
                path
            )
            assert not re.match(r"tir_kernels\.fewshot\.train\.(?!memory)", module), path
            assert not re.match(METHODS_THEMSELVES, module), path


def test_data_knows_no_run():
    for path in sorted((DRIVER / "data").rglob("*.py")):
        assert not any(re.match(r"tir_kernels\.fewshot\.run", name) for name in imports(path)), path


def texts(path):
    """The string constants of a file that are no docstrings."""
    tree = ast.parse(path.read_text())
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


def test_only_the_command_line_speaks_of_options():
    option = re.compile(r"(^|[^\w-])--[a-z]")
    assert any(option.search(text) for text in texts(DRIVER / "command.py"))
    for room in (DRIVER, PACKAGE / "towers"):
        for path in sorted(room.rglob("*.py")):
            if path.name not in COMMAND_LINE:
                assert not [text for text in texts(path) if option.search(text)], path
