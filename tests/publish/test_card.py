import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_prune.errors import HfPruneError
from hf_prune.measure.report import LatencyStats, LatencyTarget, ModelRow, Report, StageRow
from hf_prune.publish.card import render_card

SNIPPET = 'model = AutoModelForImageClassification.from_pretrained("me/pruned")'
OWN = Report(
    method="spvit",
    base_model=None,
    base_license=None,
    dataset="embedded digits",
    split="test",
    num_labels=10,
    command="python spvit.py \\\n  --output_dir out",
    seed=7,
    device="cpu (x86_64)",
    dtype="float32",
    threads=2,
    versions={"torch": "2.15.0", "hf_prune": "0.1.0"},
    rows=(
        ModelRow("dense", 0.9778, 360, 0, 212_490, 14_312_448.0, {8: LatencyStats(2.0, 1.9, 2.2)}),
        ModelRow("pruned", 0.9694444444444444, 360, 0, 213_870, 8e6, {8: LatencyStats(1.0, 0.95, 1.1)}),
    ),
    stages=(StageRow(2, 0.7, 44.8, 38.0, 52.0, 64),),
    target=LatencyTarget(8, 2.0, 1.1, 1.05, 1.0),
    train_seconds=83.0,
    figures=("dropped patches.png", "tokens.png"),
    limits=("Trained for 8 epochs only.",),
)
BARE = replace(OWN, stages=(), target=None, figures=(), limits=())
HUB = replace(OWN, base_model="timm/deit_small.fb_in1k", base_license="mit", dataset="ILSVRC/imagenet-1k")


def render(report, **options):
    return render_card(report, load_snippet=SNIPPET, **options)


def metadata(card, tmp_path):
    """What the Hub would read from the saved file."""
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict()
    return loaded.data


@pytest.mark.parametrize("report", [OWN, BARE, HUB])
def test_card_is_read_back_with_the_numbers_of_the_report(tmp_path, report):
    card = render(report, model_id="me/pruned")
    data = metadata(card, tmp_path)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", report.pruned.top1)
    assert (result.task_type, result.dataset_split) == ("image-classification", "test")
    assert data.model_name == "pruned"
    assert {"hf_prune", "pruning", "token-pruning", "spvit"} <= set(data.tags)
    assert not re.search(r"\b(None|nan|inf)\b", card.content)


def test_body_says_what_it_is_how_to_load_it_and_what_was_measured():
    text = render(OWN, model_id="me/pruned").text
    first = text.strip().splitlines()[2]
    assert "token pruning by SPViT" in first
    assert "`import hf_prune`" in first
    assert f"```python\nimport hf_prune\n{SNIPPET}\n```" in text
    for piece in (
        "| top-1 (%) | 97.78 | 96.94 | -0.84 points |",
        "| 2 | 44.8 of 64 | 70 % | 70 % | 38 to 52 |",
        "9.1 % under target",
        "cpu (x86_64), float32, 2 threads; torch 2.15.0",
        "![dropped patches](dropped%20patches.png)",
        "    python spvit.py \\\n      --output_dir out",
        "Seed 7; 83 s of training",
        "arXiv:2112.13890",
        "- Trained for 8 epochs only.",
        "not the results of the SPViT paper",
    ):
        assert piece in text


def test_snippet_with_its_own_import_is_shown_as_given():
    text = render_card(OWN, load_snippet="import hf_prune, timm").text
    assert "```python\nimport hf_prune, timm\n```" in text


def test_own_weights_are_ours_to_license_and_the_digits_are_no_hub_data_set(tmp_path):
    data = metadata(render(OWN), tmp_path)
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", None, None)
    assert data.eval_results[0].dataset_name == "embedded digits"


def test_base_weights_keep_their_licence_and_are_named(tmp_path):
    data = metadata(render(HUB, library_name="timm"), tmp_path)
    assert (data.license, data.base_model, data["base_model_relation"]) == ("mit", HUB.base_model, "finetune")
    assert (data.datasets, data.library_name) == (["ILSVRC/imagenet-1k"], "timm")


def test_unknown_licence_is_said_in_words(tmp_path):
    card = render(replace(HUB, base_license=None))
    assert metadata(card, tmp_path).license == "unknown"
    assert "licence of those weights is not known" in card.text


def test_folders_are_neither_linked_nor_shown_whole(tmp_path):
    folder = tmp_path / "home" / "dense"
    card = render(replace(OWN, base_model=str(folder), dataset=str(tmp_path / "pets")))
    data = metadata(card, tmp_path)
    assert (data.base_model, data.datasets) == (None, None)
    assert "`dense`" in card.text
    assert str(tmp_path) not in card.content


@pytest.mark.parametrize("name", ["a\n---\nlicense: evil\n---\n# b", "x: [y] | `z` {{ 7 * 7 }} {% raw", "'\"#*_-&!"])
def test_odd_model_id_breaks_neither_metadata_nor_page(tmp_path, name):
    rows = (OWN.dense, replace(OWN.pruned, name="a|b"))
    card = render(replace(OWN, rows=rows), model_id=name)
    data = metadata(card, tmp_path)
    assert (data.model_name, data.license) == (name, "apache-2.0")
    assert yaml.safe_load(card.content.split("\n---\n")[0])["model-index"][0]["name"] == name
    assert sum(line.startswith("# ") for line in card.text.splitlines()) == 1
    assert "| dense | a\\|b | change |" in card.text


def test_report_of_another_method_is_refused():
    with pytest.raises(HfPruneError, match=r"got a report of 'magnitude'"):
        render(replace(OWN, method="magnitude"))
