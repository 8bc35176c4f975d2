"""The one exception that bad input raises."""

from __future__ import annotations


class InvalidArgument(ValueError):
    """An argument that sonicmoe does not accept.

    The message names the argument, what came and what is accepted, so that the caller need not open a stack trace:
    ``w1.shape: got (4, 30, 16), accepted (E, 2*I, H)``.
    """

    def __init__(self, argument: str, got: object, accepted: str) -> None:
        super().__init__(argument, got, accepted)
        self.argument = argument
        self.got = got
        self.accepted = accepted

    def __str__(self) -> str:
        return f"{self.argument}: got {self.got}, accepted {self.accepted}"
