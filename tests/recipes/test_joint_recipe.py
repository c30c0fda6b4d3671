"""The recipe for tokens and widths in one budget. Small settings, one thread; the road is the whole one."""

import json
from functools import partial

import pytest
import torch
from invented_tables import block_table, operator_table
from recipes_here import run_recipe

import hf_prune
from hf_prune.allocate.joint_plan import JointPlan
from hf_prune.errors import HfPruneError
from hf_prune.measure.evidence import time_models
from hf_prune.measure.token_cost import count_macs
from hf_prune.tokens.attach import token_pruning_of

QUICK = [
    "--dense_epochs", "1", "--num_train_epochs", "1", "--max_train_samples", "64", "--max_eval_samples", "40",
    "--logging_steps", "2", "--num_threads", "1", "--latency_batch_size", "1", "--calibration_images", "64",
    "--keeps", "0.7", "0.6",
]  # fmt: skip
PUBLISHED = {"README.md", "config.json", "dropped_patches.png", "figures", "joint_plan.json", "latency_accuracy.png",
             "model.safetensors", "preprocessor_config.json", "pruning_history.json", "report.json", "tokens_kept.png",
             "train_log.jsonl"}  # fmt: skip


@pytest.fixture(autouse=True)
def few_timed_batches(monkeypatch):
    """What a run times is told apart from what it does; a second of it is enough here."""
    for module in ("hf_prune.publish.cut_folder", "hf_prune.measure.evidence"):
        monkeypatch.setattr(f"{module}.time_models", partial(time_models, seconds=0.1))


run = partial(run_recipe, "joint", *QUICK)


def evidence(folder):
    return json.loads((folder / "report.json").read_text()), (folder / "README.md").read_text()


def test_a_learned_method_within_milliseconds_leaves_one_model_with_its_evidence(tmp_path, capsys, monkeypatch):
    # The clock of a busy machine is no ground for a test: what is compared are the recipe's own numbers.
    monkeypatch.setattr("hf_prune.recipe.cut.measure_latency_table", operator_table)
    monkeypatch.setattr("hf_prune.measure.token_table.measure_token_table", block_table)
    monkeypatch.setattr("hf_prune.joint.meet_latency", lambda decide, measure, limit: (decide(limit), limit, limit))
    monkeypatch.setattr("hf_prune.tokens.fit.TOLERANCE", 1e9)
    folder = tmp_path / "out"
    run("--target_latency", "0.65", folder=folder)
    assert {path.name for path in folder.iterdir()} == PUBLISHED | {"latency_table.json", "token_table.json"}
    report, card = evidence(folder)
    dense, pruned = report["rows"]
    target, joint = report["target"], JointPlan.read(folder / "joint_plan.json")
    assert target["target_ms"] == pytest.approx(0.65 * target["dense_ms"])
    assert target["predicted_ms"] <= target["target_ms"] * (1 + 1e-6)
    assert joint.measured == pytest.approx(joint.limit)
    assert joint.plan.kept
    assert joint.tokens is not None
    assert pruned["macs"] < 0.75 * dense["macs"]
    shares = [stage["tokens_kept_mean"] / 64 for stage in report["stages"]]
    assert shares == pytest.approx(joint.tokens.keep_ratios, abs=0.1)
    model = hf_prune.load(folder)
    assert token_pruning_of(model).settings.method == "spvit"
    assert sum(p.numel() for p in model.parameters()) == pruned["params"]
    for piece in ("SPViT (Kong et al.", "selector before block", "Latency target",
                  "fewer heads, neurons or channels and fewer patch tokens"):  # fmt: skip
        assert piece in card
    assert "nats off" in capsys.readouterr().out
    hf_prune.write_card(folder)
    assert (folder / "README.md").read_text() == card


def test_a_method_without_parameters_meets_the_budget_to_the_count(tmp_path):
    folder = tmp_path / "out"
    run("--method", "evit", "--target_macs", "0.5", "--before_blocks", "1", "3", folder=folder)
    report, card = evidence(folder)
    dense, pruned, untrained = report["rows"]
    assert 0.45 < pruned["macs"] / dense["macs"] <= 0.5
    assert untrained["name"] == "cut, untrained"
    model = hf_prune.load(folder)
    assert token_pruning_of(model).settings.before_blocks == (1, 3)
    assert count_macs(lambda: model(torch.zeros(1, 3, 32, 32))) == pruned["macs"]
    assert "EViT (Liang et al." in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target_params", "0.5"], "parameters do not become fewer with tokens"),
        (["--steps", "2"], "tokens and widths are decided once"),
        (["--before_blocks", "0", "2", "--dense_epochs", "0"], "`before_blocks` must start at 1"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, arguments, message):
    with pytest.raises(HfPruneError, match=message):
        run(*arguments, folder=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
