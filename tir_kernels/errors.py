"""The one exception of the driver that is meant for the user."""

from __future__ import annotations

from tir_kernels.text import Notice


class FewShotError(Exception):
    """An error that the user can put right.

    Its text is one line that names the setting or file and says what to do. The command line prints
    it, with its own names for the settings, and exits with status 2; any other exception is a bug
    with a traceback.

    Args:
        message: The text, in which ``tir_kernels.text.setting`` marks the names of settings.

    Attributes:
        notice: The text, for those who spell settings in another way.
    """

    def __init__(self, message: str) -> None:
        # Messages may quote other libraries, whose texts run over several lines.
        self.notice = Notice(" ".join(message.split()))
        super().__init__(str(self.notice))


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type's name if it has none.

    The names of settings are marked in it, for use in the text of another error.
    """
    notice = getattr(error, "notice", None)
    text = notice.marked if isinstance(notice, Notice) else str(error)
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
