"""The errors coatrt raises on purpose; each message says what is wrong, what is allowed and what to do."""

__all__ = [
    "BuildError",
    "BundleError",
    "CheckpointError",
    "CoatError",
    "ConfigError",
    "DeviceError",
    "DiskError",
    "FormatError",
    "one_line",
    "reason",
]

_MAX_LENGTH = 2000  # characters of a message


def one_line(text: str) -> str:
    """Return a text as one line of at most 2,000 characters, control characters escaped."""
    if len(text) > _MAX_LENGTH:
        text = f"{text[:1200]} … {text[-700:]}"
    return "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


class CoatError(Exception):
    """Base of every error a user can cause; the CLI prints it as one line and exits with code 2."""

    def __str__(self) -> str:
        """The message as one line, even where it quotes several."""
        return one_line(super().__str__())


class FormatError(CoatError):
    """A weight format that does not exist, or that a matrix, graph or device cannot hold."""


class ConfigError(CoatError):
    """A configuration, option or data file that does not fit the model or the command."""


class DiskError(ConfigError):
    """A file that cannot be written: the disk is full or read-only, or permissions are missing.

    Args:
        what: start of the message, such as "adapter cannot be written".
        reason: the operating system's reason, such as "No space left on device".
        remedy: what to do.
    """

    def __init__(self, what: str, reason: str, remedy: str) -> None:
        super().__init__(f"{what}: {reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


class CheckpointError(CoatError):
    """A model or adapter directory that is missing, damaged or of an unknown family."""


class DeviceError(CoatError):
    """An unknown device, or one that does not support the request."""


class BuildError(CoatError):
    """An engine builder or runtime that is absent, refuses a graph, or has no GPU to run on."""


class BundleError(CoatError):
    """A bundle that is incomplete, altered, or made for another version or device."""


def reason(error: BaseException) -> str:
    """Return the message of a library's exception as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
