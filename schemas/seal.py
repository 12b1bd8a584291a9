"""Sealed JSON: one canonical form that holds a hash of itself, so that any changed bit is noticed when it is read."""

import hashlib
import json
from typing import Any

DEPTH = 16  # levels of nesting; what we write has five


def digest(value: Any) -> str:
    """Short stable name of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def seal(content: dict[str, Any]) -> bytes:
    """`content` as JSON text with its own `hash`."""
    return _text({**content, "hash": digest(content)})


def unseal(data: bytes) -> dict[str, Any]:
    """The content of sealed JSON. Raises ValueError, saying why, if a bit of it was changed."""
    sealed = parse(data)
    content = {key: value for key, value in sealed.items() if key != "hash"}
    if sealed.get("hash") != digest(content) or _text(sealed) != data:
        raise ValueError("its hash does not match its content" if "hash" in sealed else "it holds no hash of itself")
    return content


def parse(data: bytes) -> dict[str, Any]:
    """A JSON object from outside, safe to walk by recursion. Raises ValueError, saying why it is none."""
    try:
        value = json.loads(data, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    level: list[Any] = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level for inner in _inner(outer) if isinstance(inner, dict | list)]
    if level:
        raise ValueError("nested too deeply")
    return value


def _inner(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _text(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
