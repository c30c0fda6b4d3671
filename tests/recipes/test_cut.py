"""The recipes that cut: heads, channels, smcp. Small settings, one thread; the road is the whole one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from recipes_here import run_recipe
from safetensors.torch import load_file
from timm.models import save_for_hf

import hf_prune
from hf_prune.errors import HfPruneError

ROOT = Path(__file__).parents[2]
QUICK = [
    "--dense_epochs", "1", "--num_train_epochs", "1", "--max_train_samples", "256", "--max_eval_samples", "64",
    "--logging_steps", "2", "--num_threads", "1", "--latency_batch_size", "2",
]  # fmt: skip
PUBLISHED = {"README.md", "config.json", "figures", "latency_accuracy.png", "model.safetensors",
             "preprocessor_config.json", "pruning_history.json", "report.json", "train_log.jsonl"}  # fmt: skip


def run(recipe, *arguments, folder):
    few = [] if recipe == "spvit" else ["--calibration_images", "64"]
    run_recipe(recipe, *QUICK, *few, *arguments, folder=folder)


def refuse(recipe, *arguments, folder):
    with pytest.raises(HfPruneError) as caught:
        run(recipe, *arguments, folder=folder)
    return f"{type(caught.value).__name__}: {caught.value}"


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(("recipe", "kind"), [("heads", "ViTForImageClassification"),
                                              ("channels", "ResNetForImageClassification")])  # fmt: skip
def test_a_run_leaves_a_model_with_its_evidence(tmp_path, capsys, recipe, kind):
    folder = tmp_path / "out"
    run(recipe, folder=folder)
    assert {path.name for path in folder.iterdir()} == PUBLISHED | {"plan_1.json"}
    dense, pruned, untrained = report_of(folder)["rows"]
    assert untrained["name"] == "cut, untrained"
    assert 0.4 < pruned["macs"] / dense["macs"] <= 0.5
    assert untrained["macs"] == pruned["macs"]
    assert set(pruned["latency"]) == {"1", "2"}
    model = hf_prune.load(folder)
    assert type(model).__name__ == kind
    assert sum(p.numel() for p in model.parameters()) == pruned["params"]
    card = (folder / "README.md").read_text()
    assert "not measured" not in card
    assert f"{100 * pruned['top1']:.2f}" in card
    assert "latency_accuracy.png" in card
    assert "criterion taylor" in card
    assert "before and after" in capsys.readouterr().out
    # Rendered again from the folder alone, it is the same page.
    hf_prune.write_card(folder)
    assert (folder / "README.md").read_text() == card
    if recipe == "heads":
        assert {name.rpartition(".")[2] for name in hf_prune.Plan.read(folder / "plan_1.json").kept} <= {
            "heads", "hidden"}  # fmt: skip


def test_soft_masks_become_a_cut_within_the_budget(tmp_path, capsys):
    folder = tmp_path / "out"
    run("smcp", "--num_train_epochs", "3", "--rewire_steps", "2", "--target_macs", "0.6",
        "--norm_scaling", "prune_frac", folder=folder)  # fmt: skip
    assert {path.name for path in folder.iterdir()} == PUBLISHED
    dense, pruned = report_of(folder)["rows"]
    assert 0.5 < pruned["macs"] / dense["macs"] <= 0.6
    assert re.search(r"\d+ decisions, \d+ units came back", capsys.readouterr().out)
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    costs = [line["cost"] for line in log if "cost" in line]
    assert costs[0] > costs[-1]
    assert costs[-1] <= 0.6
    assert "SMCP" in (folder / "README.md").read_text()


def test_iterative_cuts_to_a_latency_with_a_table_of_its_own(tmp_path, monkeypatch):
    # The clock of a busy machine is no ground for a test; benchmarks/latency.py measures.
    monkeypatch.setattr("hf_prune.pipeline.meet_latency", lambda decide, measure, limit: (decide(limit), limit, limit))
    run("channels", "--target_latency", "0.8", folder=tmp_path / "one")
    assert (tmp_path / "one" / "latency_table.json").is_file()
    target = report_of(tmp_path / "one")["target"]
    assert target["target_ms"] == pytest.approx(0.8 * target["dense_ms"])
    assert target["predicted_ms"] <= target["target_ms"]
    run("heads", "--steps", "2", "--step_epochs", "0.5", "--target_params", "0.6", "--compensation", "mean",
        folder=tmp_path / "two")  # fmt: skip
    dense, pruned = report_of(tmp_path / "two")["rows"][:2]
    assert pruned["params"] <= 0.6 * dense["params"]
    steps = json.loads((tmp_path / "two" / "pruning_history.json").read_text())
    assert len(steps) == 2
    assert steps[0]["params"][1] / steps[0]["params"][0] == pytest.approx(0.6**0.5, abs=0.05)


def test_a_run_killed_after_the_cut_and_resumed_ends_with_the_same_weights(tmp_path):
    arguments = [*QUICK, "--calibration_images", "64", "--checkpointing_steps", "1"]

    def launch(folder, *more, wait=True):
        command = [
            sys.executable,
            str(ROOT / "recipes" / "channels.py"),
            *arguments,
            *more,
            "--output_dir",
            str(folder),
        ]
        process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, cwd=ROOT)  # fmt: skip
        if wait:
            assert process.wait() == 0, process.stderr.read()[-2000:]
        return process

    launch(tmp_path / "whole")
    folder = tmp_path / "cut"
    process = launch(folder, wait=False)
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("recover-step_000000[2-9]")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "model.safetensors").exists()
    launch(folder, "--resume_from_checkpoint", "latest")
    first, second = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", folder))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_timm_network_and_a_folder_of_pictures(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    model.pretrained_cfg.update(num_classes=3, input_size=(3, 32, 32))
    save_for_hf(model, tmp_path / "dense", safe_serialization=True)
    for split, count in (("train", 8), ("test", 3)):
        for label in range(3):
            (tmp_path / "images" / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                picture = Image.new("RGB", (40, 36), (80 * label, 30 * number, 200 - 60 * label))
                picture.save(tmp_path / "images" / split / f"class{label}" / f"{number}.png")
    folder = tmp_path / "out"
    run("channels", "--model_name_or_path", str(tmp_path / "dense"), "--dataset_name", str(tmp_path / "images"),
        "--dense_epochs", "0", "--per_device_train_batch_size", "4", "--criterion", "magnitude",
        folder=folder)  # fmt: skip
    assert report_of(folder)["rows"][1]["num_images"] == 9
    assert type(hf_prune.load(folder)).__name__ == "ResNet"
    error = refuse("spvit", "--model_name_or_path", str(tmp_path / "dense"), "--dataset_name",
                   str(tmp_path / "images"), "--dense_epochs", "0", folder=tmp_path / "tokens")  # fmt: skip
    assert "UnsupportedModelError: token pruning needs" in error


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("heads", ["--target_macs", "0.5", "--target_latency", "0.5"], "RecipeError: give one of"),
        ("heads", ["--target_macs", "-1"], "BudgetError: `macs` of a budget must be positive"),
        ("heads", ["--kinds", "head"], "PlanError: `kinds` must be of"),
        ("channels", ["--steps", "0"], "RecipeError: `--steps`"),
        ("channels", ["--round_to", "0"], "PlanError: `round_to`"),
        ("channels", ["--latency_table", "table.json"], "RecipeError: `--latency_table` is for"),
        ("channels", ["--model_name_or_path", "no/such-model"], "ModelLoadError: no image classifier"),
        ("channels", ["--dataset_name", "no/such-dataset"], "DataError: "),
        ("smcp", ["--warmup_share", "0.9", "--cooldown_share", "0.2"], "RecipeError: steps between"),
        ("smcp", ["--resume_from_checkpoint", "latest"], "CheckpointError: "),
    ],
)
def test_bad_input_is_one_clear_error_before_any_work(tmp_path, recipe, arguments, message):
    error = refuse(recipe, *arguments, folder=tmp_path / "out")
    assert re.search(message, error), error
    assert not (tmp_path / "out" / "train_log.jsonl").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))
