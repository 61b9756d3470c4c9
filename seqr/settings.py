"""What the settings of silo, coordinator and gateway have in common: a TOML file that the environment may override,
and which addresses secrets may be sent to.
"""

import json
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from seqr.errors import SeqrError


class NotText(SeqrError):
    """A path or an argument that came to us as bytes of no known text."""

    code = "setting_not_text"


# Where a server that sends secrets in the clear is heard by this machine alone.
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def is_loopback(url: str) -> bool:
    """Whether ``url`` leads to this machine itself."""
    return _scheme_and_host(url)[1] in LOOPBACK


def is_safe_url(url: str) -> bool:
    """Whether nobody on the way can read or change what is sent there: https, or http to this machine itself."""
    scheme, host = _scheme_and_host(url)
    return bool(host) and (scheme == "https" or (scheme == "http" and host in LOOPBACK))


def _scheme_and_host(url: str) -> tuple[str, str]:
    """In lower case, without port and brackets. Empty for what is no URL, or one that parsers read differently."""
    if not url.isprintable() or " " in url or "\\" in url:
        return "", ""
    try:
        parts = urlsplit(url)
        _ = parts.port  # a port that is none raises
    except ValueError:
        return "", ""
    return ("", "") if "@" in parts.netloc else (parts.scheme, parts.hostname or "")


class FileSettings(BaseSettings):
    """Settings from a file, given as keyword arguments; an environment variable wins over the file, and nothing else
    is read: no ``.env``, no secrets directory.
    """

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


def read_toml(path: Path, refusal: type[SeqrError]) -> dict[str, Any]:
    """The values of a TOML file. Raises ``refusal`` when it is not UTF-8 or not TOML, ``OSError`` when unreadable."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except UnicodeDecodeError:
        raise refusal(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise refusal(f"{path} is not valid TOML: {error}") from None


def toml_value(value: str | bool | int) -> str:
    """``value`` as TOML that reads back as the same. Raises ``NotText``."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise NotText(f"{value!r:.80} is not UTF-8 text and cannot be a setting") from None
    # JSON's booleans, integers and strings are TOML's too, but for one control character that JSON does not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def wrong_fields(error: ValidationError) -> str:
    """Each wrong field and why. The values are not repeated: a database URL may hold a password."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
