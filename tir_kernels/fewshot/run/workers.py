"""The processes that share a run, and the place of this one among them."""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import dataclass

from tir_kernels.errors import FewShotError, first_line


@dataclass(frozen=True)
class Place:
    """The place of this process among those of a run.

    Args:
        group: A name that the processes of one run have in common, and no others have.
        rank: The process's number. The first, 0, creates the run's folder and reports on the run.
        count: Processes in the group.
        local_rank: Its number on its machine; ``None`` where ``torchrun`` did not start it.
    """

    group: str
    rank: int = 0
    count: int = 1
    local_rank: int | None = None

    @classmethod
    def of_this_process(cls) -> Place:
        """The place ``torchrun`` gave this process; without it, the process is a group alone.

        Raises:
            FewShotError: The environment holds a part of what ``torchrun`` sets.
        """
        host, values = socket.gethostname(), os.environ
        if "TORCHELASTIC_RUN_ID" not in values:
            return cls(f"process {os.getpid()} on {host}, {uuid.uuid4()}")
        try:
            group = "torchrun {TORCHELASTIC_RUN_ID} {MASTER_ADDR}:{MASTER_PORT}".format_map(values)
            if values["GROUP_WORLD_SIZE"] == "1":
                # On one machine, the defaults of name and address are those of any other too.
                group += f" on {host}"
            numbers = [int(values[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        except (KeyError, ValueError) as error:
            raise FewShotError(
                "the environment has TORCHELASTIC_RUN_ID but not all else that torchrun sets "
                f"({type(error).__name__}: {first_line(error)}); start all processes with "
                "torchrun, or unset TORCHELASTIC_RUN_ID"
            ) from error
        return cls(group, *numbers)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the group."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """The start of this process's messages, by which they can be told from the others'."""
        return f"[{self.rank}]" if self.count > 1 else ""

    def own_device(self, device: str) -> str:
        """``device``, but a GPU for each process of a machine where it is just "cuda"."""
        if device == "cuda" and self.local_rank is not None:
            return f"cuda:{self.local_rank}"
        return device

    def let_others_speak(self) -> None:
        """Wait a moment before telling an error that lower ranks may be telling too.

        ``torchrun`` stops all processes when one has failed, so that what all of them meet, such as
        a wrong path, is told once.
        """
        if self.rank > 0:
            time.sleep(2 + min(self.rank, 16) / 2)
