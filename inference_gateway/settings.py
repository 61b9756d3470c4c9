"""The gateway's settings, read from ``gateway.toml``; ``SEQR_GATEWAY_*`` variables win over it."""

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import SettingsConfigDict

from inference_gateway.errors import InsecureListen, SettingsInvalid
from inference_gateway.oidc.settings import OidcSettings
from policy.limits import Limits
from seqr.settings import LOOPBACK, FileSettings, is_safe_url, read_toml, wrong_fields

CONFIG_NAME = "gateway.toml"
# What `serve` cannot do without, and `init` need not know yet.
REQUIRED = ("coordinator_url", "coordinator_public_key", "policy_database_url", "base_model")
_MAX_SECRET_BYTES = 4096


class SubjectLimits(BaseModel):
    """What one user, or one key, may ask for; unset means without limit. See ``policy.limits.Limits``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_day: int | None = Field(default=None, ge=1)
    concurrent_requests: int | None = Field(default=None, ge=1)

    def limits(self) -> Limits:
        return Limits(**self.model_dump())


class DefaultLimits(BaseModel):
    """Limits of every user and every key for whom the policy sets none; the tables [limits.user] and [limits.key]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: SubjectLimits = SubjectLimits()
    key: SubjectLimits = SubjectLimits()


class Telemetry(BaseModel):
    """The table [telemetry]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # The collector's base URL, to which /v1/traces is added; empty: no traces.
    otlp_endpoint: str = ""

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_a_collector(cls, value: str) -> str:
        if value and not is_plain_url(value):
            raise ValueError("must be a URL like http://127.0.0.1:4318, without user, password, query and fragment")
        return value


class Settings(FileSettings):
    """Settings of one gateway. Relative paths are relative to ``directory``, which also holds the keys."""

    model_config = SettingsConfigDict(
        env_prefix="SEQR_GATEWAY_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    directory: Path
    coordinator_url: str = ""
    coordinator_ca_file: Path | None = None
    # The file with this gateway's API key at the coordinator (scope gateway).
    coordinator_key_file: Path = Path("coordinator-api.key")
    # The coordinator's Ed25519 key, base64: the only signature that makes a plan a plan.
    coordinator_public_key: str = ""
    policy_database_url: str = ""
    policy_pepper_file: Path = Path("policy.pepper")
    base_model: Path | None = None

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    # For a reverse proxy on the same network that speaks TLS to the outside.
    allow_plain_http: bool = False
    # Each takes a file descriptor, of which a process has often no more than 1,024.
    max_connections: int = Field(default=800, ge=1)
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024)
    max_body_seconds: float = Field(default=30.0, gt=0)
    # A client that has something to read and takes none of it for this long loses its connection.
    send_timeout_seconds: float = Field(default=30.0, gt=0)
    poll_seconds: float = Field(default=0.5, gt=0)
    # Whether the page at / is there.
    playground: bool = True
    # Log-ins through an identity provider; without the table there are API keys only.
    oidc: OidcSettings | None = None

    max_concurrent: int = Field(default=16, ge=1, le=1024)
    # Of these for one user; unset: all but one, so that nobody can hold them all.
    max_concurrent_per_user: int | None = Field(default=None, ge=1, le=1024)
    # Requests that wait for one of the places; beyond them the gateway answers 503 at once.
    max_waiting: int = Field(default=256, ge=0)
    queue_timeout_seconds: float = Field(default=60, gt=0)
    # From a request's arrival to the last token of its answer.
    request_timeout_seconds: float = Field(default=600, gt=0)
    # Unset: what the model's context holds.
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    limits: DefaultLimits = DefaultLimits()
    max_batch_tokens: int = Field(default=256, ge=1)
    kv_tokens: int = Field(default=16_384, ge=64)
    max_model_length: int | None = Field(default=None, ge=1)
    # Compute what prompts of one user begin with once, among requests that may use the same silos (decision 14).
    prefix_sharing: bool = False
    # Answers whose bits do not depend on what else is asked at the same time; slower, on CPUs only.
    deterministic: bool = False
    # What computes: "cuda", "cpu", or "auto": a CUDA device where there is one and ``deterministic`` is not asked for.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    default_max_tokens: int = Field(default=512, ge=1)
    # A stream that is silent for this long sends a comment, so that nothing on the way takes it for dead.
    keep_alive_seconds: float = Field(default=15, gt=0)
    # A reader that falls behind by more events than this loses its stream.
    stream_buffer_events: int = Field(default=256, ge=1)
    # Processor threads of the engine; unset leaves the choice to torch.
    threads: int | None = Field(default=None, ge=1)

    log_format: Literal["text", "json"] = "text"
    # Count each silo's share in every answer for /metrics, not only in those that were asked for attribution.
    count_all_shares: bool = False
    telemetry: Telemetry = Telemetry()

    def model_post_init(self, _context: Any) -> None:
        directory = self.directory.expanduser().absolute()
        object.__setattr__(self, "directory", directory)
        for name in (
            "coordinator_ca_file", "coordinator_key_file", "policy_pepper_file", "base_model", "ssl_certfile",
            "ssl_keyfile",
        ):  # fmt: skip
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else directory / path.expanduser())

    @property
    def places_per_user(self) -> int:
        """How many answers to one user are written at once, at most."""
        return min(self.max_concurrent, self.max_concurrent_per_user or max(1, self.max_concurrent - 1))

    @property
    def config_file(self) -> Path:
        return self.directory / CONFIG_NAME

    @property
    def sealing_key_file(self) -> Path:
        return self.directory / "sealing.key"

    @property
    def signing_key_file(self) -> Path:
        return self.directory / "signing.key"

    @property
    def public_key_file(self) -> Path:
        return self.directory / "gateway-key.json"


def is_plain_url(value: str) -> bool:
    """Whether this is an http or https URL of a host, perhaps a port and a path, and nothing else."""
    try:
        url = urlsplit(value)
        port = url.port
    except ValueError:
        return False
    extra = url.username or url.password or url.query or url.fragment or port == 0
    return url.scheme in ("http", "https") and bool(url.hostname) and not extra


def load_settings(directory: str | Path, **overrides: Any) -> Settings:
    """Read ``gateway.toml`` in ``directory`` if it is there. Raises SettingsInvalid naming the field."""
    folder = Path(directory)
    path = folder / CONFIG_NAME
    values = read_toml(path, SettingsInvalid) if path.exists() else {}
    try:
        return Settings(**{**values, "directory": folder, **overrides})
    except ValidationError as error:
        raise SettingsInvalid(f"the gateway's settings are wrong: {wrong_fields(error)}") from None


def read_secret(path: Path, setting: str, what: str) -> str:
    """The secret in the file that ``setting`` names. Raises SettingsInvalid, which says to put ``what`` there."""
    try:
        with path.open("rb") as file:
            secret = file.read(_MAX_SECRET_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise SettingsInvalid(f"{setting} {path} cannot be read; put {what} there") from None
    if not secret:
        raise SettingsInvalid(f"{setting} {path} is empty; put {what} there")
    return secret


def require_complete(settings: Settings) -> None:
    """Raises SettingsInvalid naming every setting that `serve` needs and that is not there."""
    missing = [name for name in REQUIRED if not getattr(settings, name)]
    if missing:
        raise SettingsInvalid(
            f"{', '.join(missing)} must be set in {settings.config_file} or as SEQR_GATEWAY_{missing[0].upper()}"
        )
    if not is_safe_url(settings.coordinator_url):
        raise SettingsInvalid(
            f"coordinator_url must be https:// (or http:// to this machine), got {settings.coordinator_url!r}: this "
            "gateway's API key would cross the network in the clear"
        )
    if (settings.ssl_certfile is None) != (settings.ssl_keyfile is None):
        raise SettingsInvalid("ssl_certfile and ssl_keyfile belong together, got only one of them")
    if not settings.signing_key_file.exists():
        raise SettingsInvalid(
            f"{settings.directory} holds no gateway; run `seqr gateway init --dir {settings.directory}`"
        )


def require_tls(settings: Settings) -> None:
    """Raises InsecureListen where API keys would cross a network in the clear."""
    if settings.ssl_certfile is None and settings.host not in LOOPBACK and not settings.allow_plain_http:
        raise InsecureListen(
            f"listening on {settings.host} without TLS would send API keys in the clear; set ssl_certfile and "
            "ssl_keyfile (`seqr coordinator certs` makes a pair), or allow_plain_http behind a TLS proxy"
        )
