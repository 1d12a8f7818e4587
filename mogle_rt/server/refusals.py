"""What the server answers where it can't do what was asked: a status and one sentence, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refusal(Exception):  # noqa: N818  not an error of the server
    """A request that is refused.

    Args:
        status: the HTTP status.
        message: one sentence that says what was wrong, and what would be right.
        code: a short name of the reason, for programs.
        param: the name of the field that is wrong.
        headers: to send with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, " ".join(message.split()), code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def shutting_down() -> Refusal:
    """The refusal of everything that comes, or waits, once the server is to stop."""
    message = "the server is shutting down; ask again when it is back"
    return Refusal(503, message, code="shutting_down", headers={"Retry-After": "10"})


def of_validation(error: ValidationError, known: list[str]) -> Refusal:
    """The refusal of a request whose fields are wrong. It tells of the first of them.

    Args:
        error: pydantic's.
        known: the names of all fields.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    name = ".".join(place)[:60]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {first['msg']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return Refusal(
            422, f"unknown field {name!r}; the fields are {', '.join(known)}", code="unknown_field", param=name
        )
    if not place:
        return Refusal(422, "the body must be a JSON object of fields", code="invalid_value")
    text = first["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    got = repr(first["input"])
    got = f", got {got[:80]}" if first["type"] not in ("value_error", "missing") else ""
    return Refusal(422, f"{name}: {text}{got}", code="invalid_value", param=name)
