"""The command line drives the whole road, and errors are one line."""

import json
import re

import pytest
import timm
import torch
from typer.testing import CliRunner

from hf_prune.cli import app


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A folder that the command line made, and what it said."""
    folder = tmp_path_factory.mktemp("cli") / "small"
    said = run("prune", "resnet18", "--no-pretrained", "--macs", 0.5, "--image-size", 64, "--batch-size", 1,
               "--output", folder)  # fmt: skip
    return folder, said


def test_prune_measures_and_saves_with_a_card(pruned):
    folder, said = pruned
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    params = sum(p.numel() for p in model.parameters())
    assert f"-> {params:,}" in said
    assert re.search(r"ms per batch of 1: .* as fast", said)
    page = (folder / "README.md").read_text()
    assert f"{params:,}" in page
    assert "base_model" not in page  # random weights come from nowhere
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_measure_prints_what_it_found(pruned):
    found = json.loads(run("measure", f"local-dir:{pruned[0]}", "--image-size", 64))
    dense = json.loads(run("measure", "resnet18", "--no-pretrained", "--image-size", 64))
    assert found["macs"] <= 0.5 * dense["macs"]
    assert found["latency"]["p10_ms"] <= found["latency"]["median_ms"] <= found["latency"]["p90_ms"]


def test_card_is_rendered_again_from_what_was_recorded(pruned):
    folder = pruned[0]
    page = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    run("card", folder)
    assert (folder / "README.md").read_text() == page
    assert "small-one" in run("card", folder, "--model-id", "me/small-one") + (folder / "README.md").read_text()


def test_a_plan_made_before_is_used(tmp_path):
    run("plan", "resnet18", "--no-pretrained", "--params", 0.7, "--output", tmp_path / "plan.json")
    said = run("prune", "resnet18", "--no-pretrained", "--plan", tmp_path / "plan.json", "--image-size", 64,
               "--batch-size", 1, "--output", tmp_path / "out")  # fmt: skip
    assert float(re.search(r"parameters: .*\((\d+)%\)", said).group(1)) <= 70


def test_a_latency_table_is_measured_and_used(tmp_path):
    said = run("latency-table", "test_vit", "--no-pretrained", "--output", tmp_path / "table.json")
    assert "operators added up" in said
    run("plan", "test_vit", "--no-pretrained", "--latency-ms", 1e9, "--latency-table", tmp_path / "table.json",
        "--output", tmp_path / "plan.json", code=1)  # fmt: skip
    said = run("plan", "test_vit", "--no-pretrained", "--latency-ms", 0.9, "--latency-table",
                              tmp_path / "no.json", "--output", tmp_path / "plan.json", code=1)  # fmt: skip
    assert "no latency table could be read" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("prune", "resnet18", "--no-pretrained", "--macs", 1e15, "--output", "x"),
            "must be below what the dense model costs",
        ),
        (("prune", "resnet18", "--no-pretrained", "--output", "x"), "must set one of"),
        (("card", "nowhere"), "must be there"),
        (("push", "nowhere", "me/x"), "must be there"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run(*arguments, code=1)
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
