"""silo.toml: one clear sentence for every mistake in it."""

import re
from pathlib import Path

import pytest

from silo_client.config import (
    CoordinatorSettings,
    DataSource,
    SiloConfig,
    SuperLinkSettings,
    load_config,
    render_config,
)
from silo_client.errors import ConfigInvalid, ConfigMissing

from .conftest import Silo

MISTAKES = {
    "not_toml": ('silo_id = "', "is not valid TOML"),
    "unknown": ("surprise = 1\n", "'surprise' is not a known setting"),
    "threads": ("threads = 0\n", "'threads': Input should be greater than or equal to 1"),
    "bad_id": ('silo_id = "no spaces please"\n', "'silo_id'"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_in_the_settings_is_named(silo: Silo, kind: str) -> None:
    path = silo.directory / "silo.toml"
    text, sentence = MISTAKES[kind]
    name = text.partition(" =")[0]
    kept = [line for line in path.read_text().splitlines(keepends=True) if not line.startswith(f"{name} =")]
    path.write_text(text + "".join(kept))
    with pytest.raises(ConfigInvalid) as caught:
        load_config(silo.directory)
    assert sentence in str(caught.value)


def test_a_missing_setting_is_named(silo: Silo) -> None:
    path = silo.directory / "silo.toml"
    path.write_text(path.read_text().replace("silo_id =", "# silo_id ="))
    with pytest.raises(ConfigInvalid, match="'silo_id' is missing"):
        load_config(silo.directory)


def test_a_data_file_of_unknown_format_is_named(silo: Silo) -> None:
    path = silo.directory / "silo.toml"
    text = path.read_text().replace('format = "jsonl"\n', "").replace("records.jsonl", "records.xlsx")
    path.write_text(text)
    with pytest.raises(ConfigInvalid, match=r"cannot tell the format of records.xlsx"):
        load_config(silo.directory)


def test_a_folder_without_settings_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigMissing, match="run 'seqr silo init"):
        load_config(tmp_path)


def test_an_environment_variable_wins_over_the_file_but_never_moves_the_silo(
    silo: Silo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQR_SILO_THREADS", "3")
    monkeypatch.setenv("SEQR_SILO_DIRECTORY", "/elsewhere")
    config = load_config(silo.directory)
    assert config.threads == 3
    assert config.directory == silo.directory.resolve()


def test_what_init_writes_reads_back_the_same_even_with_quotes_and_umlauts(silo: Silo) -> None:
    values = {
        "silo_id": "x",
        "display_name": 'Käse "&" \\ Söhne\n',
        "base_model": "m",
        "share_counts": True,
        "skip_bad": True,
        "threads": 2,
        "coordinator": {"url": "u", "public_key": "k", "ca_file": "ca.crt"},
        "superlink": {"address": "a:1"},
        "data": [{"path": "ä.csv", "format": "csv", "subject_column": "wer"}],
    }
    (silo.directory / "silo.toml").write_text(render_config(values))
    config = load_config(silo.directory)
    assert config.display_name == values["display_name"]
    assert config.data[0].subject_column == "wer"
    assert config.share_counts and config.skip_bad


def test_the_data_owners_page_names_every_setting_and_the_defaults_of_the_simple_ones() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data-owner.md").read_text()
    part = page.partition("## Settings\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`\[*(\w+)\]*`", part))
    for settings in (SiloConfig, DataSource, CoordinatorSettings, SuperLinkSettings):
        assert set(settings.model_fields) <= named, settings
    rows = [line.split("|")[1:3] for line in part.splitlines() if line.startswith("| `")]
    told = {names.strip(" `"): default.strip() for names, default in rows}
    for name in ("threads", "device", "skip_bad", "share_counts"):
        assert told[name].partition(";")[0] == str(SiloConfig.model_fields[name].default).lower(), name


def test_settings_in_tables_can_be_set_from_the_environment_one_by_one(
    silo: Silo, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_config(silo.directory).coordinator
    monkeypatch.setenv("SEQR_SILO_COORDINATOR__URL", "https://elsewhere.example")
    after = load_config(silo.directory).coordinator
    assert (after.url, after.public_key) == ("https://elsewhere.example", before.public_key)
