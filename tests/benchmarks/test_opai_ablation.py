"""The comparison of images to prune by: its layout, its control for noise, and sentences that follow its numbers."""

import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hf_prune
from hf_prune.data.concepts.discover import discover_concepts
from hf_prune.data.concepts.settings import SMALL_IMAGES
from hf_prune.data.images import load_images

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import opai_ablation
from opai_table import CONTROL, FLOOR, REFERENCE, TITLES, Row, differs, findings, rows_of, table

# Fewer of everything: which concepts are found does not matter here.
FEW = replace(SMALL_IMAGES, images_per_class=10, num_clusters=5, min_segments=4, num_random_sets=2, kmeans_starts=1)
SOURCES = (REFERENCE, FLOOR, "concept", CONTROL, "label_noise", "ones", "shuffled units", "worst units", "uniform")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Plans for ResNet-20s by SNIP on digits, as if nothing came of training them."""
    splits, teacher = load_images("digits"), opai_ablation.drawn(100)
    folder = tmp_path_factory.mktemp("concepts")
    concepts = discover_concepts(teacher, splits, folder, preprocessing=opai_ablation.LIKE, settings=FEW)
    images, found = opai_ablation.Images(concepts, splits), []
    for seed in range(4):
        model = opai_ablation.drawn(seed)
        graph = hf_prune.analyze(model, opai_ablation.EXAMPLE)
        sizes = {name: axis.size for name, axis in graph.axes.items()}
        reference = None
        for source, plan in opai_ablation.plans(model, graph, "snip", images, seed, SOURCES):
            reference = reference or plan
            overlap, keep_ratios = opai_ablation.compare(plan, reference, sizes)
            found.append({"saliency": "snip", "source": source, "seed": seed, "overlap": overlap, "plan": plan,
                          "keep_ratios": keep_ratios, "top1": 0.5})  # fmt: skip
    return found


def overlaps(records, source):
    return [run["overlap"] for run in records if run["source"] == source]


def test_random_labels_move_the_cut_no_further_than_another_batch_does(records):
    floor, noise = overlaps(records, FLOOR), overlaps(records, "label_noise")
    assert 0.3 < statistics.fmean(floor) < 0.97
    assert abs(statistics.fmean(noise) - statistics.fmean(floor)) < 2 * statistics.stdev(floor + noise)


def test_controls_are_what_they_are_called(records):
    plans = {(run["source"], run["seed"]): run["plan"] for run in records}
    for seed in range(4):
        reference = plans[REFERENCE, seed]
        sizes = {name: len(units) for name, units in reference.kept.items()}
        for control in ("shuffled units", "worst units"):
            assert {name: len(units) for name, units in plans[control, seed].kept.items()} == sizes
        for name, units in reference.kept.items():
            if 2 * len(units) <= reference.sizes[name]:
                assert not {*units} & {*plans["worst units", seed].kept[name]}
        shares = [
            len(units) / plans["uniform", seed].sizes[name] for name, units in plans["uniform", seed].kept.items()
        ]
        assert max(shares) - min(shares) < 0.15
    assert statistics.fmean(overlaps(records, "worst units")) < statistics.fmean(overlaps(records, "shuffled units"))
    assert statistics.fmean(overlaps(records, "ones")) < statistics.fmean(overlaps(records, FLOOR))


def test_the_table_has_a_line_for_each_source_with_floor_and_control(records):
    lines = table({"snip": rows_of(records, "snip")}).splitlines()
    assert lines[0] == "| pruned by | snip: top-1 | snip: overlap |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [TITLES[source] for source in TITLES
                                                                              if source in SOURCES]  # fmt: skip
    assert lines[2].endswith("| 50.0 ± 0.0 | - |")


def row(source, top1, overlap=(0.6, 0.62, 0.64)):
    return Row(source, tuple(top1), tuple(overlap), {})


BASE = [row(REFERENCE, (0.5, 0.51, 0.52), ()), row(FLOOR, (0.5, 0.51, 0.52))]


@pytest.mark.parametrize(
    ("concept", "control", "against_images", "against_control"),
    [
        ((0.60, 0.61, 0.62), (0.50, 0.51, 0.52), "+10.0 points after training, better", "better by"),
        ((0.40, 0.41, 0.42), (0.40, 0.41, 0.42), "-10.0 points after training, worse", "no difference"),
        ((0.45, 0.51, 0.57), (0.30, 0.31, 0.32), "no difference that 3 seeds can show", "better by"),
    ],
)
def test_sentences_follow_the_numbers(concept, control, against_images, against_control):
    rows = [
        *BASE,
        row("concept", concept, (0.2, 0.21, 0.22)),
        row(CONTROL, control),
        row("label_noise", (0.5, 0.5, 0.5)),
        row("ones", (0.3,), (0.62,)),  # one seed says nothing
    ]
    floor, near, far, images, rectangles = findings("snip", rows)
    assert "0.62 ± 0.02" in floor
    assert TITLES["label_noise"] in near
    assert TITLES["concept"] in far
    assert TITLES["concept"] not in near
    assert TITLES["ones"] not in near + far
    assert against_images in images
    assert against_control in rectangles


def test_without_spread_nothing_is_certain():
    assert differs((0.5,), (0.9, 0.91)) == 0
    assert differs((0.5, 0.5), (0.4, 0.4)) == float("inf")
    assert differs((0.5, 0.5), (0.5, 0.5)) == 0


def test_a_network_learns_after_its_cut():
    torch.manual_seed(0)
    images = torch.randn(256, 3, 32, 32)
    labels = (images.mean((1, 2, 3)) > 0).long()
    shown = images + 4 * (labels[:, None, None, None] - 0.5)
    model = opai_ablation.trained(opai_ablation.drawn(0), (shown, labels), num_epochs=3, seed=0)
    assert opai_ablation.top1(model, shown, labels) > 0.9
