"""report.json comes back as it was, and each of its fields is explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up_report import comparison, report

from vitprune.reports.results import Report


def test_report_comes_back_from_its_file(tmp_path: Path) -> None:
    saved = report(calibrated=comparison(0.9), notes=("a note",))
    saved.save(tmp_path / "report.json")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert Report.load(tmp_path / "report.json") == saved
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["schema"] == 1
    assert content["comparison"]["macs"]["ratio"] == pytest.approx(0.6)
    assert content["comparison"]["metrics"]["accuracy"]["difference"] == pytest.approx(-0.003)
    assert content["throughput"][2]["speedup"] == pytest.approx(1.52)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(
        json.dumps({**json.loads(report().model_dump_json(by_alias=True)), "schema": 2})
    )
    with pytest.raises(ValueError, match=r"report\.json is no report that this version of vitprune reads"):
        Report.load(tmp_path / "report.json")


def test_every_field_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    schema = Report.model_json_schema(mode="serialization")
    for part in (schema, *schema["$defs"].values()):
        for name in part["properties"]:
            assert f"`{name}`" in page, name
