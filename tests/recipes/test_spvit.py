"""The recipe as a user starts it: whole runs in processes of their own, on a handful of images."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from recipes_here import run_recipe
from safetensors.torch import load_file
from tiny_models import build_dense

import hf_prune
from hf_prune.errors import HfPruneError
from hf_prune.tokens.attach import token_pruning_of

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "spvit.py")
QUICK = [
    "--max_train_samples", "64", "--max_eval_samples", "40", "--per_device_train_batch_size", "16",
    "--dense_epochs", "1", "--num_train_epochs", "2", "--logging_steps", "1", "--num_threads", "1",
]  # fmt: skip


def launch(*arguments: str, folder: Path, launcher: tuple[str, ...] = (sys.executable,), **environment: str):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder.parent / "cache"), **environment}
    command = [*launcher, RECIPE, *arguments, "--output_dir", str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=ROOT)


def succeed(*arguments: str, **options) -> str:
    done = launch(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def refuse(*arguments: str, folder: Path) -> str:
    """Run the recipe in this process and return the error it stops with."""
    with pytest.raises(HfPruneError) as caught:
        run_recipe("spvit", *QUICK, *arguments, folder=folder)
    return f"{type(caught.value).__name__}: {caught.value}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_leaves_model_table_report_pictures_and_card(tmp_path):
    folder = tmp_path / "out"
    shown = succeed(*QUICK, "--keep_ratios", "0.6", "0.3", folder=folder)
    assert "before and after" in shown
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "dropped_patches.png", "latency_accuracy.png", "latency_table.json",
        "model.safetensors", "preprocessor_config.json", "report.json", "tokens_kept.png", "train_log.jsonl",
    }  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    dense, pruned = report["rows"]
    assert pruned["macs"] < 0.75 * dense["macs"]
    assert set(pruned["latency"]) == {"1", "32"}
    kept = [stage["tokens_kept_mean"] / 64 for stage in report["stages"]]
    assert kept == pytest.approx([0.6, 0.3], abs=0.1)
    model = hf_prune.load(folder)
    assert type(model).__name__ == "ViTForImageClassification"
    assert "hf_prune.load" in (folder / "README.md").read_text()


def test_a_run_killed_in_mid_epoch_and_resumed_ends_with_the_same_weights(tmp_path):
    arguments = [*QUICK, "--keep_ratios", "0.6", "0.3", "--checkpointing_steps", "1"]
    succeed(*arguments, folder=tmp_path / "whole")
    folder = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, RECIPE, *arguments, "--output_dir", str(folder)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("spvit-step_000000[3-6]")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "model.safetensors").exists()
    succeed(*arguments, "--resume_from_checkpoint", "latest", folder=folder)
    first, second = weights(tmp_path / "whole"), weights(folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_block_to_stage_finds_places_and_resumes_between_insertions(tmp_path):
    arguments = [
        *QUICK, "--num_train_epochs", "1", "--block_to_stage", "--insertion_max_drop", "1", "--target_latency", "0.97",
        "--insertion_epochs", "0.25", "--checkpointing_steps", "epoch",
    ]  # fmt: skip
    shown = succeed(*arguments, folder=tmp_path / "out")
    tried = re.findall(r"selectors before blocks \(([\d, ]+?),?\)", shown)
    assert tried[0] == "5"
    assert all(longer.endswith(shorter) for shorter, longer in pairwise(tried))
    pruning = token_pruning_of(hf_prune.load(tmp_path / "out"))
    assert str(pruning.settings.before_blocks) in shown.split("stages:")[1]
    assert {str(block) for block in pruning.settings.before_blocks} <= set(tried[-1].split(", "))
    before = weights(tmp_path / "out")
    shutil.rmtree(next((tmp_path / "out" / "checkpoints").glob("spvit-*")))
    again = succeed(*arguments, "--resume_from_checkpoint", "latest", folder=tmp_path / "out")
    assert re.findall(r"stages: .*", again) == re.findall(r"stages: .*", shown)
    # Thresholds follow the measured latency; everything that was trained is the same to the bit.
    trained = [name for name in before if "keep_threshold" not in name]
    after = weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in trained)


def test_a_run_pushes_everything_in_one_commit_and_comes_back_from_there(tmp_path):
    with HubServer() as hub:
        there = hub.environment(tmp_path / "home")
        shown = succeed(
            *QUICK, "--keep_ratios", "0.6", "0.3", "--push_to_hub", "--hub_model_id", "me/digits", "--hub_private",
            folder=tmp_path / "out", **there,
        )  # fmt: skip
        assert f"pushed: {hub.url}/me/digits/commit/" in shown
        (commit,) = [commit for commit in hub.commits("me/digits") if "model.safetensors" in commit.files]
        local = {path.name: path for path in (tmp_path / "out").iterdir()}
        assert set(commit.files) - {".gitattributes"} == set(local)
        assert commit.files["model.safetensors"] == local["model.safetensors"].read_bytes()
        code = "import hf_prune; print(type(hf_prune.load('me/digits')).__name__)"
        env = {**os.environ, **there}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "ViTForImageClassification", done.stderr[-2000:]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["phase"] == "spvit"]


def test_two_processes_give_the_losses_of_one_on_the_same_global_batch(tmp_path):
    common = [*QUICK, "--keep_ratios", "0.6", "0.3"]
    succeed(*common, folder=tmp_path / "one")
    half = [*common, "--per_device_train_batch_size", "8", "--expected_processes", "2"]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631")
    shown = succeed(*half, folder=tmp_path / "two", launcher=torchrun, ACCELERATE_USE_CPU="true")
    assert shown.startswith("2 process(es)")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    assert len(losses(tmp_path / "one")) == 8


def test_a_timm_model_and_a_folder_of_pictures(tmp_path):
    from PIL import Image

    model = build_dense("timm-vit")
    from timm.models import save_for_hf

    model.pretrained_cfg["num_classes"] = 7
    save_for_hf(model, tmp_path / "dense", safe_serialization=True)
    for split, count in (("train", 6), ("test", 3)):
        for label in range(7):
            (tmp_path / "images" / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                color = (30 * label, 40 * number, 200 - 20 * label)
                Image.new("RGB", (40, 36), color).save(tmp_path / "images" / split / f"class{label}" / f"{number}.png")
    (tmp_path / "images" / "test" / "class0" / "0.png").write_bytes(b"not a picture")
    folder = tmp_path / "out"
    succeed(
        "--model_name_or_path", str(tmp_path / "dense"), "--dataset_name", str(tmp_path / "images"),
        "--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--num_threads", "1",
        "--before_blocks", "2", "4", "--keep_ratios", "0.6", "0.3", "--learning_rate", "1e-3",
        folder=folder,
    )  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    assert (report["rows"][1]["num_images"], report["rows"][1]["num_unreadable"]) == (20, 1)
    assert type(hf_prune.load(folder)).__name__ == "VisionTransformer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name_or_path", "no/such-model"], "ModelLoadError: no image classifier could be loaded"),
        (["--model_name_or_path", "resnet18"], "ModelLoadError|UnsupportedModelError"),
        (["--target_latency", "0.01"], r"BudgetError: the lowest reachable cost .* is [\d.]+ \([\d.]+% of dense"),
        (["--target_latency", "1.0"], "BudgetError: `target_latency` must be"),
        (["--dataset_name", "no/such-dataset"], "DataError: "),
        (["--before_blocks", "2", "9", "--keep_ratios", "0.6", "0.3"], "ManifestError: "),
        (["--keep_ratios", "0.3", "0.6"], "ManifestError: `keep_ratios` must not grow"),
        (["--expected_processes", "2"], "RecipeError: `--expected_processes` is 2"),
        (["--checkpointing_steps", "often"], "RecipeError: `--checkpointing_steps` must be"),
        (["--resume_from_checkpoint", "latest"], "CheckpointError: "),
        (["--block_to_stage", "--keep_ratios", "0.6"], "RecipeError: `--block_to_stage` finds"),
        (["--block_to_stage", "--target_latency", "0.01"], "BudgetError: the lowest reachable cost"),
        (["--push_to_hub"], "RecipeError: `--push_to_hub` needs `--hub_model_id"),
        (["--latency_table", "nowhere.json"], "LatencyTableError: no latency table"),
        (["--streaming", "--dataset_name", "digits"], "Error: "),
    ],
)
def test_bad_input_is_one_clear_error_before_any_work(tmp_path, arguments, message):
    error = refuse(*arguments, folder=tmp_path / "out")
    assert re.search(message, error), error
    assert not (tmp_path / "out" / "train_log.jsonl").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_error_reaches_the_shell_as_one_line(tmp_path):
    done = launch(*QUICK, "--keep_ratios", "0.3", "0.6", folder=tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ManifestError: `keep_ratios` must not grow")
    assert "Traceback" not in done.stderr


def test_a_folder_in_use_and_one_that_cannot_be_written_are_refused(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    assert "RecipeError: `--output_dir` must be empty" in refuse(folder=folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert "RecipeError: `--output_dir` must be a folder that can be written to" in refuse(folder=folder / "mine.txt")


def test_a_head_that_does_not_fit_the_labels_is_refused(tmp_path):
    build_dense("vit").save_pretrained(tmp_path / "dense")
    import transformers

    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dense")
    error = refuse("--model_name_or_path", str(tmp_path / "dense"), folder=tmp_path / "out")
    assert "DataError: the head of" in error
    assert "7 classes and the dataset has 10" in error
