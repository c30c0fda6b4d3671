"""Does pruning at initialisation care what images it sees? One cut by concepts, and by what they must be compared with.

Run     python benchmarks/opai_ablation.py --weights resnet20-cifar10/model.safetensors --data cifar10/
        python benchmarks/opai_ablation.py ... --saliencies snip --seeds 0    (parts; they add up in the same file)
Writes  a line for each trained network to benchmarks/results/opai_ablation.jsonl, the concepts and a picture of them to
        outputs/benchmarks/concepts-cifar10, and prints table and findings.
Needs   a trained CIFAR ResNet-20 as the teacher (keys as in cifar_resnet.py), CIFAR-10 as parquet
        files, whose images are scaled by ImageNet's mean and deviation.

A ResNet-20 is drawn at random, its channels are scored once on a hundred images (SNIP) or three hundred (GraSP) of one
source, ranked over all layers, cut to a quarter of the MACs, and trained. A seed decides weights, images, and the order
of training; within a seed, only the source differs. Weights and order are the same for all sources of a seed.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar_images import MEAN, STD, augmented, top1
from cifar_images import load_images as load_tensors
from cifar_resnet import CifarResNet
from opai_table import FLOOR, REFERENCE, TITLES, findings, rows_of, table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hf_prune
from hf_prune.allocate.allocators import best
from hf_prune.allocate.plan import Plan
from hf_prune.analyse.graph import AxisGraph
from hf_prune.data.concept_sets import FOR_GRASP, FOR_SNIP, SourceSettings, pruning_source
from hf_prune.data.concepts.cache import ConceptCache
from hf_prune.data.concepts.discover import discover_concepts
from hf_prune.data.concepts.settings import SMALL_IMAGES
from hf_prune.data.images import ImageSplits, load_images
from hf_prune.data.transforms import Preprocessing
from hf_prune.measure.concept_sheet import plot_concept_sheet
from hf_prune.score.random import Random
from hf_prune.score.registry import criterion
from hf_prune.tokens.site import logits_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "opai_ablation.jsonl"
CONCEPTS = ROOT / "outputs" / "benchmarks" / "concepts-cifar10"
SALIENCIES = {"snip": FOR_SNIP, "grasp": FOR_GRASP}
LIKE = Preprocessing(size_px=(32, 32), mean=MEAN, std=STD)
KEEP_MACS, EXAMPLE, BRIGHTNESS, RATE = 0.25, torch.zeros(1, 3, 32, 32), 0.05, 0.1
# A seed for images that no other seed of the benchmark has.
ELSEWHERE = 1000


@dataclass(frozen=True)
class Images:
    """What sources are made of: concepts and the dataset that they come from."""

    concepts: ConceptCache
    splits: ImageSplits
    preprocessing: Preprocessing = LIKE


def drawn(seed: int) -> nn.Module:
    """Return an untrained ResNet-20."""
    torch.manual_seed(seed)
    return CifarResNet(20).eval()


def batches_of(source: str, images: Images, settings: SourceSettings, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return the images of a source, with labels, in batches."""
    name = REFERENCE if source == FLOOR else source
    settings = replace(
        settings,
        seed=seed + ELSEWHERE if source == FLOOR else seed,
        brightness=BRIGHTNESS if name == "brightness" else 1.0,
    )
    chosen = pruning_source(
        name, preprocessing=images.preprocessing, concepts=images.concepts, splits=images.splits, settings=settings
    )
    return [(batch["pixel_values"], batch["labels"]) for batch in DataLoader(chosen, batch_size=50)]


def plans(
    model: nn.Module, graph: AxisGraph, saliency: str, images: Images, seed: int, sources: Sequence[str]
) -> Iterator[tuple[str, Plan]]:
    """Yield the plan of each source, and of the controls that have no images of their own."""
    budget, rule = hf_prune.Budget(macs=KEEP_MACS), criterion(saliency)

    def one_cut(source: str) -> Plan:
        data = batches_of(source, images, SALIENCIES[saliency], seed)
        return hf_prune.plan(model, graph=graph, budget=budget, criterion=rule, allocator="global_rank", data=data)

    reference = one_cut(REFERENCE)
    widths = {name: len(units) for name, units in reference.kept.items()}
    for source in sources:
        if source == REFERENCE:
            plan = reference
        elif source == "uniform":
            plan = hf_prune.plan(model, graph=graph, budget=budget, criterion=Random(seed=seed), allocator="uniform")
        elif source == "shuffled units":
            drawn_scores = Random(seed=seed).score(model, graph, [graph.axes[name] for name in widths])
            plan = Plan.of(graph, best(drawn_scores, widths))
        elif source == "worst units":
            data = batches_of(REFERENCE, images, SALIENCIES[saliency], seed)
            scores = rule.score(model, graph, [graph.axes[name] for name in widths], data)
            plan = Plan.of(graph, best({name: -of for name, of in scores.items()}, widths))
        else:
            plan = one_cut(source)
        yield source, plan


def compare(plan: Plan, reference: Plan, sizes: Mapping[str, int]) -> tuple[float, dict[str, float]]:
    """Return the Jaccard overlap of the units that two plans keep, and the share that the first keeps of each axis."""
    kept, shared, either = {}, 0, 0
    for name, size in sizes.items():
        units, others = (set(p.kept.get(name, range(size))) for p in (plan, reference))
        shared, either, kept[name] = shared + len(units & others), either + len(units | others), len(units) / size
    return shared / either, kept


def trained(model: nn.Module, train: tuple[Tensor, Tensor], *, num_epochs: int, seed: int) -> nn.Module:
    """Train a network that was cut from its random weights on: SGD, one cycle, crops and flips, bfloat16."""
    model, generator = model.train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=num_epochs * (len(train[1]) // 128))
    for _ in range(num_epochs):
        for images, labels in augmented(train, generator):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = logits_of(model(images))
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def ablate(args: argparse.Namespace, images: Images) -> None:
    """Train what is not in the file of results yet."""
    done = {(run["saliency"], run["source"], run["seed"]) for run in results()}
    train, test = load_tensors(args.data, "train", args.num_train), load_tensors(args.data, "test", args.num_test)
    for seed in args.seeds:
        for saliency in args.saliencies:
            missing = [source for source in args.sources if (saliency, source, seed) not in done]
            if not missing:
                continue
            graph, reference = hf_prune.analyze(drawn(seed), EXAMPLE), None
            sizes = {name: axis.size for name, axis in graph.axes.items()}
            for source, plan in plans(drawn(seed), graph, saliency, images, seed, [REFERENCE, *missing]):
                reference = reference or plan
                overlap, keep_ratios = compare(plan, reference, sizes)
                if (saliency, source, seed) in done:
                    continue
                done.add((saliency, source, seed))
                model = drawn(seed)
                record = hf_prune.apply_plan(model, plan, graph)
                accuracy = top1(trained(model, train, num_epochs=args.epochs, seed=seed), *test)
                run = {"saliency": saliency, "source": source, "seed": seed, "top1": accuracy, "overlap": overlap,
                       "macs": record.macs[1] / record.macs[0], "params": record.params[1] / record.params[0],
                       "keep_ratios": keep_ratios, "num_train": args.num_train, "epochs": args.epochs,
                       "num_test": args.num_test}  # fmt: skip
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
                print(f"{saliency} {source} seed {seed}: {accuracy:.1%}, overlap {overlap:.2f}", flush=True)


def results() -> list[dict[str, Any]]:
    """Return what was measured so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--saliencies", nargs="+", default=[*SALIENCIES], choices=[*SALIENCIES])
    parser.add_argument("--sources", nargs="+", default=[*TITLES], choices=[*TITLES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--num_train", type=int, default=6_400)
    parser.add_argument("--num_test", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    teacher = CifarResNet(20)
    teacher.load_state_dict(load_file(args.weights))
    splits = load_images(str(args.data))
    concepts = discover_concepts(teacher.eval(), splits, CONCEPTS, preprocessing=LIKE, settings=SMALL_IMAGES)
    if not (CONCEPTS / "sheet.png").is_file():
        plot_concept_sheet(concepts, CONCEPTS / "sheet.png")
    ablate(args, Images(concepts, splits))
    rows = {name: rows_of(results(), name) for name in SALIENCIES}
    print(table(rows))
    for name, of_saliency in rows.items():
        print("\n".join(findings(name, of_saliency)))


if __name__ == "__main__":
    main()
