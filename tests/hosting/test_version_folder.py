"""What counts as a version, and when it is whole."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from headrace.config import EngineConfig, ServerOptions, option_specs
from headrace.errors import CheckpointError, ConfigError
from headrace.hosting import version_folder as module
from headrace.hosting.version_folder import VersionFolder, version_folder
from headrace.loading.checkpoint import open_checkpoint
from headrace.observability.families import FAMILIES


def put(folder: Path, name: str) -> Path:
    version = folder / name
    version.mkdir(parents=True)
    (version / "model.gguf").write_bytes(b"weights")
    return version


def opened(folder: Path, **options: object) -> VersionFolder | None:
    return version_folder(EngineConfig(model=str(folder)), ServerOptions(**options))  # type: ignore[arg-type]


def whole(folder: VersionFolder) -> set[int]:
    return {number for number, content in folder.look().items() if content is not None}


def test_numbered_folders_and_files_are_versions(tmp_path):
    for name in ("1", "0012", "v3", "4.tmp", ".5", "1_Pooling"):
        put(tmp_path, name)
    (tmp_path / "6.gguf").write_bytes(b"weights")
    (tmp_path / "7").write_text("a file")
    folder = opened(tmp_path)
    assert folder is not None
    assert set(folder.look()) == {1, 12, 6}
    assert folder.path_of(12) == tmp_path / "0012"
    assert folder.path_of(6) == tmp_path / "6.gguf"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
def test_a_checkpoint_is_a_checkpoint_whatever_else_is_in_its_folder(tmp_path, name):
    put(tmp_path, "1")
    assert opened(tmp_path) is not None
    (tmp_path / name).touch()
    assert opened(tmp_path) is None


def test_other_models_have_no_versions(tmp_path):
    assert opened(tmp_path) is None, "an empty folder"
    assert opened(tmp_path / "missing") is None
    assert version_folder(EngineConfig(), ServerOptions()) is None
    assert version_folder(EngineConfig(model="org/name"), ServerOptions()) is None


def test_options_that_do_not_fit(tmp_path):
    put(tmp_path, "1")
    with pytest.raises(ConfigError, match=r"--model-versions all: .*1 has no versions"):
        opened(tmp_path / "1", model_versions="all")
    with pytest.raises(ConfigError, match="not in .* which has 1"):
        opened(tmp_path, model_versions="2,3")
    with pytest.raises(ConfigError, match="--model-poll-interval"):
        opened(tmp_path, model_poll_interval=0.0)


def test_a_copy_that_goes_on_is_waited_for(tmp_path):
    version = put(tmp_path, "1")
    folder = opened(tmp_path)
    assert folder is not None
    assert folder.look() == {1: None}, "it is new"
    for _ in range(3):
        with (version / "model.gguf").open("ab") as file:
            file.write(b"more")
        assert folder.look() == {1: None}
    assert whole(folder) == {1}
    (version / "tokenizer.json").touch()
    assert folder.look() == {1: None}
    assert whole(folder) == {1}
    (tmp_path / "2").mkdir()
    assert [folder.look()[2] for _ in range(3)] == [None] * 3, "it has no files"
    shutil.rmtree(version)
    assert 1 not in folder.look()


def test_what_was_there_for_long_is_whole_at_once(tmp_path, monkeypatch):
    version = put(tmp_path, "1")
    # A copy sets the times of its files to old ones, and is none the older for it.
    os.utime(version / "model.gguf", (0, 0))
    os.utime(version, (0, 0))
    folder = opened(tmp_path)
    assert folder is not None and folder.look() == {1: None}
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + module.QUIET_SECONDS + 1)
    folder = opened(tmp_path)
    assert folder is not None and whole(folder) == {1}


def test_a_folder_that_cannot_be_read_says_nothing(tmp_path):
    put(tmp_path / "models", "1")
    folder = opened(tmp_path / "models")
    assert folder is not None
    (tmp_path / "models").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="models"):
        folder.look()


def test_other_commands_are_told_to_take_one_version(tmp_path):
    put(tmp_path, "3")
    with pytest.raises(CheckpointError, match=r"has versions: give one, such as .*/3\."):
        open_checkpoint(tmp_path)


def test_the_page_names_what_there_is():
    page = (Path(__file__).parents[2] / "docs" / "versions.md").read_text()
    options = {f"--{spec.name.replace('_', '-')}" for spec in option_specs()}
    assert set(re.findall(r"--[a-z-]+[a-z]", page)) <= options
    families = {family.full_name for family in FAMILIES}
    assert set(re.findall(r"headrace_[a-z_]+", page)) <= families
    assert {"--model-versions", "--model-poll-interval"} <= set(re.findall(r"--[a-z-]+", page))
