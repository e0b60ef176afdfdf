"""One page to look at: a run's findings as a self-contained HTML file."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tir_kernels.analysis.page.page import tables_text, write_page

__all__ = ["tables_text", "write_page"]


def __getattr__(name: str) -> Any:
    # A run's tables in the terminal need nothing that draws.
    if name in __all__:
        from tir_kernels.analysis.page import page

        return getattr(page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
