"""The errors coatrt raises on purpose; each message says what was given, what is allowed and what to do."""

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

_MOST = 2000  # characters of a message


def one_line(text: str) -> str:
    """Return a text as one line of 2,000 characters at most, without the control characters that inputs may hold."""
    if len(text) > _MOST:
        text = f"{text[:1200]} … {text[-700:]}"
    return "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


class CoatError(Exception):
    """Base of every error a user can cause; the CLI prints it as one line and exits with code 2."""

    def __str__(self) -> str:
        """The message, in one line whatever it quotes."""
        return one_line(super().__str__())


class FormatError(CoatError):
    """A weight format that does not exist, or that a matrix, graph or device cannot hold."""


class ConfigError(CoatError):
    """A configuration, option or data file that does not fit the model or the command."""


class DiskError(ConfigError):
    """A file that cannot be written: the disk is full or read-only, or permissions are missing.

    Args:
        what: the beginning of its line, such as "adapter cannot be written".
        reason: the system's, such as "No space left on device".
        remedy: what to do.
    """

    def __init__(self, what: str, reason: str, remedy: str) -> None:
        super().__init__(f"{what}: {reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


class CheckpointError(CoatError):
    """A model or adapter directory that is missing, damaged or of an unknown family."""


class DeviceError(CoatError):
    """An unknown device, or one that cannot do what was asked of it."""


class BuildError(CoatError):
    """An engine builder or runtime that is absent, refuses a graph, or has no GPU to run on."""


class BundleError(CoatError):
    """A bundle that is incomplete, altered, or made for another version or device."""


def reason(error: BaseException) -> str:
    """Return what an exception of a library says, as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
