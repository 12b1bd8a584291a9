"""Sealed JSON: one canonical form that holds a hash of itself, so that any changed bit is noticed when it is read."""

import json
from typing import Any

from schemas.fingerprint import digest


def seal(content: dict[str, Any]) -> bytes:
    """`content` as JSON text with its own `hash`."""
    return _text({**content, "hash": digest(content)})


def unseal(data: bytes) -> dict[str, Any]:
    """The content of sealed JSON. Raises ValueError, saying why, if a bit of it was changed."""
    try:
        sealed = json.loads(data)
        content = {key: value for key, value in sealed.items() if key != "hash"}
        whole = sealed.get("hash") == digest(content) and _text(sealed) == data
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except AttributeError:
        raise ValueError("not a JSON object") from None
    if not whole:
        raise ValueError("its hash does not match its content" if "hash" in sealed else "it holds no hash of itself")
    return content


def _text(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
