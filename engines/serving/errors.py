"""Errors in OpenAI's form: a status, a type, the field, a code."""

from typing import Any

from coatrt.errors import CoatError

__all__ = ["ApiError", "context_exceeded", "invalid", "queue_full", "stopping", "time_limit"]


class ApiError(CoatError):
    """An error that a client gets.

    Args:
        message: what is wrong, what is allowed, what to do.
        status: of the answer.
        param: the field, if it is of one.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def to_json(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str) -> ApiError:
    """Return the error of a field with a bad value."""
    return ApiError(message, param=param)


def context_exceeded(prompt: int, wanted: int | None, context: int, param: str) -> ApiError:
    """Return the error of a request that does not fit the context of `context` tokens."""
    size = f"the prompt has {prompt} tokens"
    if wanted is not None:
        size += f" and max_tokens is {wanted}"
    advice = "shorten the prompt or ask for fewer tokens"
    return ApiError(f"{size}; the context has {context}: {advice}", param=param, code="context_length_exceeded")


def queue_full(limit: int) -> ApiError:
    """Return the error of a request that finds the queue full."""
    message = f"{limit} requests wait already; try again later"
    return ApiError(message, 503, code="queue_full", headers={"Retry-After": "1"})


def stopping() -> ApiError:
    """Return the error of requests that the end of the server meets."""
    return ApiError("the server is stopping; ask another one, or later", 503, code="stopping")


def time_limit(seconds: float) -> ApiError:
    """Return the error of a request that takes too long."""
    return ApiError(f"the request took longer than {seconds:g} s; ask for fewer tokens", 504, code="time_limit")
