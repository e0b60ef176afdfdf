"""The one exception of the driver that is meant for the user."""

from tir_kernels.text import printable


class FewShotError(Exception):
    """Something the user can put right.

    Its text is one line that names the argument or file and says what to do. The command line
    prints it as it is and exits with status 2; any other exception is a bug with a traceback.
    """

    def __init__(self, message: str) -> None:
        # Messages may quote other libraries, whose texts run over several lines.
        super().__init__(printable(" ".join(message.split())))


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
