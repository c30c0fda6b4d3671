import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from hf_prune.errors import HfPruneError
from hf_prune.measure.report import (
    LatencyStats,
    LatencyTarget,
    ModelRow,
    Report,
    StageRow,
    comparison,
    print_report,
    target_line,
)

DENSE = ModelRow("dense", 0.9778, 360, 0, 212_490, 14_312_448.0, {1: LatencyStats(2.0, 1.9, 2.2)})
PRUNED = ModelRow("pruned", 0.9694, 360, 2, 213_870, 8_112_448.5, {1: LatencyStats(1.0, 0.9, 1.25)})
REPORT = Report(
    method="spvit",
    base_model=None,
    base_license=None,
    dataset="embedded digits",
    split="test",
    num_labels=10,
    command="python spvit.py",
    seed=0,
    device="cpu",
    dtype="float32",
    threads=1,
    versions={"torch": "2.15.0"},
    rows=(DENSE, PRUNED),
    stages=(StageRow(2, 0.7, 44.8, 38.0, 52.0, 64), StageRow(4, 0.5, 31.2, 22.0, 40.0, 64)),
    target=LatencyTarget(1, 2.0, 1.1, 1.05, 1.0),
    train_seconds=83.0,
    figures=("tokens.png",),
    limits=("One seed.",),
)


def printed(report, width=80):
    file = io.StringIO()
    print_report(report, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("report", [REPORT, replace(REPORT, target=None, base_model="a/b", stages=())])
def test_report_survives_json_and_disk(tmp_path, report):
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert Report.read(report.write(tmp_path / "new").parent) == report
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]


def test_parts_survive_json_too():
    for part in (DENSE, DENSE.latency[1], REPORT.stages[0], REPORT.target):
        assert type(part).from_json(part.to_json()) == part


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("colour",), "red", "'Report' must have the keys"),
        (("rows", 0, "flops"), 1, r"'Report.rows\[0\]' must have the keys"),
        (("seed",), "0", "'Report.seed' must be int, got '0'"),
        (("seed",), True, "'Report.seed' must be int"),
        (("rows", 1, "top1"), True, r"'Report.rows\[1\].top1' must be float"),
        (("rows", 1, "top1"), None, r"'Report.rows\[1\].top1' must be float"),
        (("train_seconds",), float("nan"), "'Report.train_seconds' must be float"),
        (("rows", 0, "latency"), {"one": {}}, "keys of 'Report.rows.*latency' must be int, got 'one'"),
        (("limits",), "none", "'Report.limits' must be tuple"),
        (("rows",), [], "`rows` must hold the dense model"),
    ],
)
def test_anything_else_than_a_report_is_refused(tmp_path, path, value, message):
    data = json.loads(json.dumps(REPORT.to_json()))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(HfPruneError, match=message):
        Report.from_json(data)
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(HfPruneError, match="run the recipe again"):
        Report.read(tmp_path)


def test_missing_key_missing_file_and_broken_file_are_refused(tmp_path):
    data = REPORT.to_json()
    del data["seed"]
    with pytest.raises(HfPruneError, match="must have the keys"):
        Report.from_json(data)
    with pytest.raises(HfPruneError, match="No such file"):
        Report.read(tmp_path)
    (tmp_path / "report.json").write_text('{"method": "sp')
    with pytest.raises(HfPruneError, match="must be the report of a run"):
        Report.read(tmp_path)


def test_a_number_that_json_cannot_hold_leaves_the_old_report_in_place(tmp_path):
    REPORT.write(tmp_path)
    with pytest.raises(HfPruneError, match="finite"):
        replace(REPORT, train_seconds=float("nan")).write(tmp_path)
    assert Report.read(tmp_path) == REPORT


def test_comparison_sets_pruned_against_dense():
    header, *lines = comparison(REPORT)
    assert header == ["", "dense", "pruned", "change"]
    assert lines == [
        ["top-1 (%)", "97.78", "96.94", "-0.84 points"],
        ["images scored", "360", "360 (2 unreadable)", ""],
        ["parameters", "212.5 k", "213.9 k", "+0.6 %"],
        ["MACs per image", "14.31 M", "8.112 M", "-43.3 %"],
        ["ms per batch of 1", "2.00 (1.90-2.20)", "1.00 (0.900-1.25)", "2.00x as fast"],
    ]


def test_comparison_leaves_out_batch_sizes_that_one_model_lacks():
    dense = replace(DENSE, latency={**DENSE.latency, 32: LatencyStats(9.0, 9.0, 9.0)})
    assert len(comparison(replace(REPORT, rows=(dense, PRUNED)))) == len(comparison(REPORT))


@pytest.mark.parametrize(
    ("achieved_ms", "verdict"),
    [(1.21, "10.0 % over target"), (1.0, "9.1 % under target"), (1.1, "on target")],
)
def test_target_line_says_by_how_much(achieved_ms, verdict):
    target = replace(REPORT.target, achieved_ms=achieved_ms)
    assert target.relative_error == pytest.approx(achieved_ms / 1.1 - 1)
    assert target_line(target).endswith(verdict)


@pytest.mark.parametrize("width", [80, 100])
def test_printed_report_fits_a_log_file(width):
    text = printed(REPORT, width)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    for piece in (
        "97.78",
        "2.00 (1.90-2.20)",
        "2.00x as fast",
        "44.8 of 64",
        "70 %",
        "9.1 % under",
        "cpu, float32",
    ):
        assert piece in text


def test_printed_names_are_no_markup_and_empty_parts_are_left_out():
    text = printed(replace(REPORT, rows=(DENSE, replace(PRUNED, name="[red]p[/red]")), stages=(), target=None))
    assert "[red]p[/red]" in text
    assert "still alive" not in text
    assert "target" not in text
