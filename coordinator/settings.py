"""The coordinator's settings, read from ``coordinator.toml``; ``SEQR_COORDINATOR_*`` variables win over it."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from coordinator.errors import SettingsInvalid, StateDirMissing
from seqr.settings import FileSettings, read_toml, wrong_fields

CONFIG_NAME = "coordinator.toml"


class Settings(FileSettings):
    """Settings of one coordinator. Relative paths are relative to ``directory``, which also holds keys and bundles."""

    model_config = SettingsConfigDict(env_prefix="SEQR_COORDINATOR_", extra="forbid", frozen=True)

    directory: Path
    federation: str = Field(default="seqr", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    database_url: str = ""
    policy_database_url: str = ""
    policy_pepper_file: Path = Path("policy.pepper")

    host: str = "127.0.0.1"
    port: int = Field(default=8443, ge=0, le=65535)
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    # For a reverse proxy on the same network that speaks TLS to the outside.
    allow_plain_http: bool = False

    # Where the filter listens through which silos reach the SuperLink, over TLS.
    superlink_host: str = "127.0.0.1"
    superlink_port: int = Field(default=8000, ge=1, le=65535)
    superlink_certfile: Path | None = None
    superlink_keyfile: Path | None = None
    superlink_ca_file: Path | None = None
    # Set when the SuperLink, its SuperExec and the filter before it run elsewhere: where it listens, as host:port.
    superlink_address: str = Field(default="", pattern=r'^([^\s"]+:[0-9]+)?$')

    deletion_due_days: int = Field(default=30, ge=1, le=365)
    # A queued job this old means that its silo is not connected.
    silo_grace_seconds: float = Field(default=15.0, ge=0)
    job_lifetime_days: int = Field(default=7, ge=1, le=90)
    job_attempts: int = Field(default=10, ge=1)
    max_pending_enrolments: int = Field(default=100, ge=1)
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024)
    # Flower's own limit for one message is 2 GiB - 1.
    max_bundle_bytes: int = Field(default=2**31 - 1, ge=1)
    loop_seconds: float = Field(default=0.3, gt=0)

    def model_post_init(self, _context: Any) -> None:
        directory = self.directory.expanduser().absolute()
        self._set("directory", directory)
        for name in ("coordinator", "policy"):
            field = "database_url" if name == "coordinator" else "policy_database_url"
            self._set(field, getattr(self, field) or f"sqlite:///{directory / name}.db")
        for field in ("policy_pepper_file", "ssl_certfile", "ssl_keyfile", *_SUPERLINK_FILES):
            path = getattr(self, field)
            self._set(field, None if path is None else directory / path.expanduser())

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    @property
    def config_file(self) -> Path:
        return self.directory / CONFIG_NAME

    @property
    def signing_key_file(self) -> Path:
        return self.directory / "coordinator.key"

    @property
    def public_key_file(self) -> Path:
        return self.directory / "coordinator.pub"

    @property
    def subject_salt_file(self) -> Path:
        return self.directory / "subject.salt"

    @property
    def bundles(self) -> Path:
        return self.directory / "bundles"

    @property
    def keystore(self) -> Path:
        return self.directory / "keystore"

    @property
    def certificates(self) -> Path:
        return self.directory / "certs"


_SUPERLINK_FILES = ("superlink_certfile", "superlink_keyfile", "superlink_ca_file")


def load_settings(directory: str | Path, **overrides: Any) -> Settings:
    """Read ``coordinator.toml`` in ``directory`` if it is there. Raises SettingsInvalid naming the field."""
    folder = Path(directory)
    path = folder / CONFIG_NAME
    values = read_toml(path, SettingsInvalid) if path.exists() else {}
    return make_settings(**{**values, "directory": folder, **overrides})


def make_settings(**values: Any) -> Settings:
    """The settings of these values and the environment. Raises SettingsInvalid naming each wrong field."""
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise SettingsInvalid(f"the coordinator's settings are wrong: {wrong_fields(error)}") from None
    if settings.database_url == settings.policy_database_url:
        raise SettingsInvalid("database_url and policy_database_url must name two databases, got the same one twice")
    if (settings.ssl_certfile is None) != (settings.ssl_keyfile is None):
        raise SettingsInvalid("ssl_certfile and ssl_keyfile belong together, got only one of them")
    return settings


def require_state(settings: Settings) -> None:
    """Raises StateDirMissing unless ``seqr coordinator init`` has been run for this directory."""
    if not settings.signing_key_file.exists():
        raise StateDirMissing(
            f"{settings.directory} holds no coordinator; run `seqr coordinator init --dir {settings.directory}`"
        )
