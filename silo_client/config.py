"""The silo's one settings class, read from ``silo.toml``; ``SEQR_SILO_*`` environment variables win over the file."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, ValidationError, model_validator
from pydantic_settings import SettingsConfigDict

from seqr.enrolment import SILO_ID
from seqr.settings import FileSettings, read_toml, toml_value
from silo_client.errors import ConfigInvalid, ConfigMissing

CONFIG_NAME = "silo.toml"
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}

SiloId = Annotated[str, StringConstraints(pattern=f"^{SILO_ID}$")]


class DataSource(BaseModel):
    """One file of records and the names of its columns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    format: Literal["jsonl", "csv"]
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    subject_column: str | None = None
    key_column: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _format_from_suffix(cls, values: Any) -> Any:
        if isinstance(values, dict) and "format" not in values and "path" in values:
            known = FORMATS.get(Path(str(values["path"])).suffix.lower())
            if known is None:
                raise ValueError(f"cannot tell the format of {values['path']} by its name; set format to jsonl or csv")
            return {**values, "format": known}
        return values


class CoordinatorSettings(BaseModel):
    """Where the coordinator's REST API is, and the Ed25519 key (base64 of 32 bytes) that signs its plans and orders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    public_key: str
    url: str = ""
    ca_file: Path | None = None


class SuperLinkSettings(BaseModel):
    """The Flower SuperLink that brings this silo its jobs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str = ""
    ca_file: Path | None = None


class SiloConfig(FileSettings):
    """Settings of one silo. Relative paths are relative to the silo directory."""

    model_config = SettingsConfigDict(
        env_prefix="SEQR_SILO_", env_nested_delimiter="__", extra="forbid", frozen=True, protected_namespaces=()
    )

    # Set by load_config and by nothing else: no setting, and no environment variable, may point elsewhere.
    _directory: Path = PrivateAttr(default_factory=Path.cwd)

    silo_id: SiloId
    display_name: str = ""
    base_model: Path
    data: tuple[DataSource, ...] = Field(min_length=1)
    coordinator: CoordinatorSettings
    superlink: SuperLinkSettings = SuperLinkSettings()
    share_counts: bool = False
    skip_bad: bool = False
    # Part of what decides the adapter's bytes, so it is fixed in the file and never guessed at run time.
    threads: int = Field(default=1, ge=1, le=1024)
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def directory(self) -> Path:
        """The absolute path of the folder that holds ``silo.toml``."""
        return self._directory

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    def resolve(self, path: Path) -> Path:
        """``path`` as written in the file, taken from the silo directory."""
        return path if path.is_absolute() else self.directory / path

    @property
    def base_model_path(self) -> Path:
        return self.resolve(self.base_model)


def load_config(directory: Path | str) -> SiloConfig:
    """Read ``<directory>/silo.toml``.

    Raises:
        ConfigMissing: there is no such file.
        ConfigInvalid: it is not TOML, or a setting is unknown, missing or of the wrong kind.
    """
    root = Path(directory).resolve()
    path = root / CONFIG_NAME
    try:
        values = read_toml(path, ConfigInvalid)
    except FileNotFoundError:
        raise ConfigMissing(
            f"there is no {CONFIG_NAME} in {root}; run 'seqr silo init {directory}' or give --dir"
        ) from None
    except OSError as error:
        raise ConfigMissing(f"{path} cannot be read: {error.strerror}") from None
    try:
        config = SiloConfig(**values)
    except ValidationError as error:
        raise ConfigInvalid(f"{path}: {_first_problem(error)}") from None
    config._directory = root
    return config


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    what = {
        "extra_forbidden": "is not a known setting",
        "missing": "is missing",
    }.get(first["type"], first["msg"].removeprefix("Value error, "))
    return f"'{where}': {what}" if what not in ("is missing", "is not a known setting") else f"'{where}' {what}"


def render_config(values: dict[str, Any]) -> str:
    """``silo.toml`` as text, with a word on every setting an owner may want to change."""
    lines = [
        "# This silo's settings. What is written here is all that the silo client reads; records stay where they are.",
        f"silo_id = {toml_value(values['silo_id'])}",
        f"display_name = {toml_value(values['display_name'])}",
        "",
        "# The base model every silo of the federation trains with; 'seqr silo check' compares it with the plan.",
        f"base_model = {toml_value(values['base_model'])}",
        "",
        "# Say in the manifest how many records and tokens were trained on (default: nobody is told).",
        f"share_counts = {toml_value(values['share_counts'])}",
        "# Leave bad rows out and report them, instead of stopping at the first one.",
        f"skip_bad = {toml_value(values['skip_bad'])}",
        "# CPU threads of training. The adapter's bytes depend on it: change it, and the next adapter differs.",
        f"threads = {toml_value(values['threads'])}",
        "",
        "[coordinator]",
        f"url = {toml_value(values['coordinator']['url'])}",
        "# Plans and orders signed with any other key are refused.",
        f"public_key = {toml_value(values['coordinator']['public_key'])}",
        *_optional("ca_file", values["coordinator"].get("ca_file")),
        "",
        "[superlink]",
        f"address = {toml_value(values['superlink']['address'])}",
        *_optional("ca_file", values["superlink"].get("ca_file")),
    ]
    for source in values["data"]:
        lines += ["", "[[data]]"]
        for name in ("path", "format", "prompt_column", "completion_column", "subject_column", "key_column"):
            lines += _optional(name, source.get(name))
    return "\n".join(lines) + "\n"


def _optional(name: str, value: str | None) -> list[str]:
    return [] if value is None else [f"{name} = {toml_value(value)}"]
