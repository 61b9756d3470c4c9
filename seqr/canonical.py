"""One byte string per value: canonical JSON, strict parsing and digests, on which every signature and id rests."""

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from seqr.errors import SeqrError


class NotCanonical(SeqrError):
    """A value that has no canonical JSON form."""

    code = "not_canonical"


class JsonMalformed(SeqrError):
    """Bytes that are not one strict JSON document."""

    code = "json_malformed"


def canonical_json(value: Any) -> bytes:
    """The canonical UTF-8 JSON of ``value``: keys sorted by code point, no spaces, no NaN or infinity.

    Floats are written in Python's shortest form that reads back to the same double. Raises ``NotCanonical`` for what
    JSON cannot carry without loss: other types, keys that are not strings, numbers not finite, lone surrogates.
    """
    try:
        _require_json(value)
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except RecursionError:
        raise NotCanonical("the value is nested too deeply for canonical JSON") from None
    except ValueError as error:
        raise NotCanonical(f"the value has no canonical JSON form: {error}") from None


def parse_json(data: bytes, what: str, max_bytes: int) -> Any:
    """Parse ``data`` strictly: size first, then UTF-8, no duplicate keys, no NaN or infinity.

    ``what`` names the document in the message of ``JsonMalformed``. Two readers of one strict document cannot see
    different values, which a signature over its bytes silently relies on.
    """
    if len(data) > max_bytes:
        raise JsonMalformed(f"{what} has {len(data)} bytes, more than the {max_bytes} allowed")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise JsonMalformed(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise JsonMalformed(f"{what} is not valid JSON: {error}") from None


def sha256_hex(data: bytes) -> str:
    """The SHA-256 of ``data`` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def array_digest(array: npt.NDArray[Any]) -> str:
    """SHA-256 (hex) over dtype, shape and the little-endian, row-major bytes of ``array``."""
    little = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    header = canonical_json({"dtype": array.dtype.name, "shape": list(array.shape)})
    return sha256_hex(header + b"\n" + little.tobytes())


def is_sha256_hex(value: object) -> bool:
    """Whether ``value`` is a SHA-256 as this module writes it: 64 lower-case hex digits."""
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)


def _require_json(value: Any) -> None:
    # json.dumps turns keys such as 1, None and True into strings: two different values would share their bytes.
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise NotCanonical(f"canonical JSON keys are strings, got {key!r} of type {type(key).__name__}")
            _require_json(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_json(item)
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise NotCanonical(f"canonical JSON has no form for a {type(value).__name__}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
