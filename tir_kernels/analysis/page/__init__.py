"""One page to look at: a run's findings as a self-contained HTML file."""

from tir_kernels.analysis.page.page import tables_text, write_page

__all__ = ["tables_text", "write_page"]
