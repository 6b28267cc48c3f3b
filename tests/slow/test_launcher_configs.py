"""Accelerate reads the configurations that come with vitprune."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

FOLDER = Path(__file__).parents[2] / "integrations" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes > 1
    assert f"--config_file integrations/accelerate/{file.name}" in file.read_text()
    assert file.name in (FOLDER / "README.md").read_text()


def test_there_is_one_for_each_kind() -> None:
    assert {file.stem for file in FILES} == {"ddp", "fsdp2", "multi-node"}
