"""Every error Puna raises on purpose, each with what to do next.

What it is: one small tree of exceptions. `UserError` and its children mean that the input (a file, a flag, a prompt)
is at fault: the command line prints them without a traceback and exits with 2. Any other `PunaError` exits with 1, and
so do the two kinds of `HubError` for which the input is not at fault: the network, and the disk.
What it is not: a place for messages; whoever finds the fault words it.
What is surprising: `remedy` is not optional prose. An error without a next step is half an error.
"""

from __future__ import annotations


class PunaError(Exception):
    """Something Puna noticed and can explain. `str()` gives the message, then the remedy on its own line."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class UserError(PunaError):
    """The user's input is at fault: exit code 2, no traceback."""

    exit_code = 2


class UsageError(UserError):
    """A flag or option that cannot be honoured as given."""


class ConfigError(UserError):
    """A model configuration with a missing, unknown or unimplemented value."""


class CheckpointError(UserError):
    """A weight file that is damaged, hostile, incomplete, or not what its name says."""


class TokenizerError(UserError):
    """A tokenizer file that cannot be read, or text it cannot encode."""


class ChatFormatError(UserError):
    """A chat template that fails or exceeds its limits, or messages it cannot express."""


class PictureError(UserError):
    """Data that is no picture, or one that is too large, damaged or of a kind that is not taken."""


class VerdictError(PunaError):
    """A guard model that gave no verdict: what it was to judge is not known to be safe."""


class ContextError(UserError):
    """A prompt (with the answer asked for) longer than the model's context. Nothing is ever cut to fit."""


class QueueFullError(PunaError):
    """So many requests wait already that one more is not taken in; the input is not at fault."""


class NothingLeftError(UserError):
    """Bans, a grammar and stop tokens that may not come yet leave no token to choose.

    `row` is the row of the batch that it concerns.
    """

    def __init__(self, message: str, *, remedy: str = "", row: int = 0) -> None:
        super().__init__(message, remedy=remedy)
        self.row = row


class GrammarError(UserError):
    """A schema or grammar that cannot be honoured, that takes too much to compile, or that an answer has left."""


class AdapterError(UserError):
    """An adapter that is not loaded, cannot be yet, or is in use."""


class UnknownModelError(UserError):
    """A request names a model that is not served here."""


class NoRoomError(PunaError):
    """A model that does not fit the memory beside what must stay; the message has the arithmetic."""


class CatalogError(UserError):
    """A person's own file of prices that is not as it must be, or a name that the catalog does not know."""


class HubError(UserError):
    """A model that could not be found or fetched."""


class UnreachableError(HubError):
    """The hub or the network failed; the input is not at fault."""

    exit_code = 1


class StorageError(HubError):
    """A fetched model has no room on the disk, or its folder cannot be written; the input is not at fault."""

    exit_code = 1


class DeviceError(UserError):
    """A device, extra or kernel that was asked for and is not available here."""


class StoppedError(PunaError):
    """The engine cannot answer: it was closed, it failed, or its step does not come back."""
