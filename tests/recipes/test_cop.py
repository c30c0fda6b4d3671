"""The recipe that prunes by concepts. Small settings, one thread; the road is the whole one."""

import json
from functools import partial

import pytest
from recipes_here import run_recipe
from torch import nn

import hf_prune
from hf_prune.allocate.plan import Plan
from hf_prune.data.concepts.cache import ConceptCache
from hf_prune.errors import HfPruneError
from hf_prune.measure.evidence import time_models

QUICK = [
    "--dense_epochs", "2", "--num_train_epochs", "1", "--max_train_samples", "220", "--max_eval_samples", "40",
    "--logging_steps", "2", "--num_threads", "1", "--latency_batch_size", "1", "--calibration_images", "64",
]  # fmt: skip
PUBLISHED = {"README.md", "concepts", "concepts.png", "config.json", "figures", "latency_accuracy.png",
             "model.safetensors", "plan_1.json", "preprocessor_config.json", "pruning_history.json", "report.json",
             "train_log.jsonl"}  # fmt: skip


@pytest.fixture(autouse=True)
def few_timed_batches(monkeypatch):
    """What a run times is told apart from what it does; a moment of it is enough here."""
    monkeypatch.setattr("hf_prune.publish.cut_folder.time_models", partial(time_models, seconds=0.05))


run = partial(run_recipe, "cop", *QUICK)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with the defaults: GraSP on stitched concepts, from random weights."""
    folder = tmp_path_factory.mktemp("cop") / "out"
    run(folder=folder)
    return folder


def test_a_fresh_network_is_cut_by_concepts_and_published_with_them(finished):
    assert {path.name for path in finished.iterdir()} == PUBLISHED
    report, card = json.loads((finished / "report.json").read_text()), (finished / "README.md").read_text()
    dense, pruned = report["rows"]
    assert 0.4 < pruned["macs"] / dense["macs"] <= 0.5
    assert report["figures"][0] == "concepts.png"
    how = json.loads((finished / "pruning_history.json").read_text())[0]["plan"]["how"]
    assert (how["criterion"], how["weights"]) == ("grasp", "random")
    assert how["images"] == "300 of 'stitch'"
    for piece in ("COP (Yang et al.", "![concepts](concepts.png)", "drawn at random before the cut",
                  "trained teacher, the dense model that the same run trained", "reconstruction"):  # fmt: skip
        assert piece in card
    assert "Taylor" not in card
    model = hf_prune.load(finished)
    assert sum(p.numel() for p in model.parameters()) == pruned["params"]
    hf_prune.write_card(finished)
    assert (finished / "README.md").read_text() == card


def test_concepts_are_found_once_and_other_images_may_decide(finished, tmp_path):
    before = (finished / "concepts" / "class_00003.npz").stat().st_mtime_ns
    folder = tmp_path / "out"
    run("--pruning_data", "rect_matched", "--criterion", "snip", "--concepts_dir", str(finished / "concepts"),
        folder=folder)  # fmt: skip
    assert "100 of 'rect" in (folder / "README.md").read_text()
    assert (finished / "concepts" / "class_00003.npz").stat().st_mtime_ns == before
    assert len(ConceptCache.open(finished / "concepts").labels) == 10
    assert Plan.read(folder / "plan_1.json").kept != Plan.read(finished / "plan_1.json").kept


def test_a_trained_network_keeps_its_weights_and_the_card_says_so(finished, tmp_path):
    folder = tmp_path / "out"
    run("--initialisation", "pretrained", "--compensation", "least_squares", "--concepts_dir",
        str(finished / "concepts"), "--num_train_epochs", "0", folder=folder)  # fmt: skip
    report, card = json.loads((folder / "report.json").read_text()), (folder / "README.md").read_text()
    assert [row["name"] for row in report["rows"]] == ["dense", "pruned", "cut, untrained"]
    norms = [module for module in hf_prune.load(folder).modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any((norm.weight == 1).all() for norm in norms)  # as a network drawn anew would have it
    assert "trained by the same run" in card
    assert "close to zero and noisy" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2"], "this is one cut"),
        (["--streaming", "--max_train_steps", "1"], "which a stream cannot do"),
        (["--compensation", "mean"], "add `--initialisation pretrained`"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, arguments, message):
    with pytest.raises(HfPruneError, match=message):
        run(*arguments, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cache_of_another_teacher_is_refused(finished, tmp_path):
    with pytest.raises(HfPruneError, match="teacher"):
        run("--seed", "1", "--concepts_dir", str(finished / "concepts"), folder=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
