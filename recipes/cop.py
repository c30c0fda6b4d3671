"""Concept-based one-cut pruning (COP): find concepts of every class, prune a fresh network by them once, then train it.

Expect  without arguments: the handwritten digits inside scikit-learn; a small ResNet is trained as the teacher, another
        one of the same form is drawn anew, cut to half its MACs, and trained: two and a half minutes on one thread,
        99.7% for both (360 images). On ImageNet: not measured.
Run     accelerate launch recipes/cop.py
        accelerate launch recipes/cop.py --model_name_or_path timm/resnet50.a1_in1k --dataset_name imagenet-1k \
            --num_train_epochs 90 --output_dir outputs/resnet50-cop
Source  Yang et al., One-cut Network Pruning at Initialization with Explainable Image Concepts, IEICE PRMU 2022; scores:
        Wang et al., GraSP, ICLR 2020, and Lee et al., SNIP, ICLR 2019. Differs: whole units go and not single weights,
        ranked within kinds of axes; how concepts are stitched is our reconstruction; a pretrained network may be
        cut too (`--initialisation pretrained`). Whether concepts do better than other images is an open question:
        `--pruning_data` takes the images they must be compared with, and benchmarks/opai_ablation.py compares them.
"""

import copy
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import hf_prune
from hf_prune.data.concept_sets import FOR_GRASP, FOR_SNIP, OF_CONCEPTS, OF_IMAGES, PruningSet, pruning_source
from hf_prune.data.concepts.cache import ConceptCache
from hf_prune.data.concepts.discover import discover_concepts
from hf_prune.data.concepts.inputs import PLAIN
from hf_prune.data.concepts.settings import IMAGENET, SMALL_IMAGES
from hf_prune.data.concepts.stitch import StitchSettings
from hf_prune.data.transforms import AUGMENTATIONS, train_transform
from hf_prune.errors import HfPruneError, RecipeError
from hf_prune.measure.concept_sheet import plot_concept_sheet
from hf_prune.models import DenseModel, embedded_resnet, load_dense
from hf_prune.publish.describe import history_of
from hf_prune.recipe.cut import (
    Calibration,
    Cut,
    CutSettings,
    compensation,
    decide,
    finish,
    open_table,
    target_of,
    train,
)  # fmt: skip
from hf_prune.recipe.job import Job, open_job
from hf_prune.recipe.settings import parse
from hf_prune.recover.norms import settle_norms

SHEET = "concepts.png"
SALIENCIES = ("snip", "grasp", "synflow", "force")
# Below this many pixels a picture has no room for dozens of superpixels.
SMALL_PX = 128

# A small ResNet trained from nothing on 1,257 digits wants other settings than one on ImageNet.
EMBEDDED_SETTINGS = {
    "dense_epochs": 12.0,
    "dense_learning_rate": 3e-3,
    "num_train_epochs": 12.0,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 32,
    "augmentation": "gentle",
    "output_dir": "outputs/cop-digits",
}


@dataclass(frozen=True)
class Settings(CutSettings):
    """What COP adds to the settings of recipes that cut; `--steps` must stay 1."""

    initialisation: str = field(
        default="random",
        metadata={
            "help": "What is cut: a network drawn anew, or the dense one with its weights.",
            "choices": ["random", "pretrained"],
        },
    )
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Classifier in whose features concepts are found. Default: the dense model."}
    )
    teacher_layer: str | None = field(default=None, metadata={"help": "Whose features. Default: the last map."})
    concepts_dir: str | None = field(
        default=None, metadata={"help": "Concepts are kept here and gone on with. Default: in --output_dir."}
    )
    pruning_data: str = field(
        default="stitch",
        metadata={"help": "Images that units are scored on.", "choices": [*OF_CONCEPTS, *OF_IMAGES, *PLAIN]},
    )
    images_per_class: int | None = field(default=None, metadata={"help": "Of these. Default: 30 for grasp, or 10."})
    num_concepts: int = field(default=5, metadata={"help": "Concepts of each class that they come from."})
    stitch_coverage: float = field(default=0.5, metadata={"help": "Share of a stitched image that is covered."})
    criterion: str = field(default="grasp", metadata={"help": "How units are scored.", "choices": [*SALIENCIES]})
    compensation: str = field(
        default="none",
        metadata={
            "help": "Fit kept weights to the dense outputs; pretrained only.",
            "choices": ["none", "mean", "least_squares"],
        },
    )
    distill_weight: float = field(default=0.0, metadata={"help": "Of the dense model's logits in the loss."})
    output_dir: str = "outputs/cop"

    def check(self) -> None:
        """See `RecipeSettings.check`."""
        super().check()
        if self.steps != 1:
            raise RecipeError(f"`--steps` must be 1, for this is one cut, got {self.steps}; see recipes/channels.py")
        if self.streaming:
            raise RecipeError(
                "concepts are looked for class by class, which a stream cannot do: leave out `--streaming`"
            )
        if self.initialisation == "random" and self.compensation != "none":
            raise RecipeError("`--compensation` fits weights to a trained model: add `--initialisation pretrained`")


def main(settings: Settings) -> None:
    """Find concepts with a teacher, cut a network by them, train it, and publish it."""
    job = open_job(settings, name="hf_prune_cop", embedded=embedded_resnet)
    if history_of(job.dense.model):
        raise RecipeError(f"`--model_name_or_path` must name a dense model, but '{job.dense.name}' was pruned before")
    teacher = job.dense
    if settings.teacher_name_or_path is not None:
        teacher = load_dense(settings.teacher_name_or_path, job.splits.label_names)
    started = time.perf_counter()
    job.train_dense()
    concepts = find_concepts(job, teacher)
    cut = one_cut(job, concepts)
    notes = notes_on(job, teacher, concepts)
    if settings.initialisation == "random":
        # What comes out has the form of the dense model and nothing of its weights, name or licence.
        job = replace(job, dense=replace(job.dense, name=None, license=None))
    finish(job, "cop", cut, started=started, notes=notes, figures=(SHEET,))


def find_concepts(job: Job[Settings], teacher: DenseModel) -> ConceptCache:
    """Find the concepts of all classes, shared out among processes, and draw the best of them."""
    settings, accelerator = job.settings, job.run.accelerator
    folder = Path(settings.concepts_dir or job.run.output_dir / "concepts")
    small = min(teacher.preprocessing.size_px) < SMALL_PX
    concepts = discover_concepts(
        teacher.model.to(accelerator.device),
        job.splits,
        folder,
        preprocessing=teacher.preprocessing,
        layer=settings.teacher_layer,
        settings=replace(SMALL_IMAGES if small else IMAGENET, seed=settings.seed),
        labels=range(accelerator.process_index, job.splits.num_labels, accelerator.num_processes),
        batch_size=settings.per_device_eval_batch_size,
    )
    accelerator.wait_for_everyone()
    if job.run.is_main:
        plot_concept_sheet(concepts, job.run.output_dir / SHEET)
    return concepts


def one_cut(job: Job[Settings], concepts: ConceptCache) -> Cut:
    """Score all units once, cut, and train what is left."""
    settings, device = job.settings, job.run.accelerator.device
    torch.manual_seed(settings.seed)
    is_fresh = settings.initialisation == "random"
    student = job.dense.redraw().to(device) if is_fresh else copy.deepcopy(job.dense.model).requires_grad_(True)
    images = images_for(job, concepts)
    loader = DataLoader(images, batch_size=settings.per_device_eval_batch_size)
    batches = [(batch["pixel_values"].to(device), batch["labels"].to(device)) for batch in loader]
    data = Calibration(batches)
    graph = hf_prune.analyze(student, data.image)
    table = open_table(job, student, graph)
    plan = decide(job, student, graph, data, settings.budget, table, 1)
    how = {"images": f"{len(images)} of '{images.name}'", "weights": "random" if is_fresh else "pretrained"}
    plan = replace(plan, how=plan.how | how)
    with compensation(settings, student, graph, plan, data if is_fresh else Calibration.of(job)):
        record = hf_prune.apply_plan(student, plan, graph)
    job.run.say(f"one cut: {record.macs[1] / record.macs[0]:.1%} of the MACs left, "
                f"{record.params[1] / record.params[0]:.1%} of the parameters")  # fmt: skip
    untrained = None if is_fresh else job.evaluate(student, "test", "cut")
    student = train(job, student, "train", epochs=settings.num_train_epochs, seed=settings.seed,
                    max_steps=settings.max_train_steps)  # fmt: skip
    settle_norms(student, Calibration.of(job).batches)
    return Cut(student.eval(), untrained, target_of(settings, graph, plan, table))


def images_for(job: Job[Settings], concepts: ConceptCache) -> PruningSet:
    """Return the images that units are scored on."""
    settings, preprocessing = job.settings, job.dense.preprocessing
    augmentation = AUGMENTATIONS[settings.augmentation]
    defaults = FOR_GRASP if settings.criterion == "grasp" else FOR_SNIP
    return pruning_source(
        settings.pruning_data,
        preprocessing=preprocessing,
        concepts=concepts,
        splits=job.splits,
        settings=replace(
            defaults,
            images_per_class=settings.images_per_class or defaults.images_per_class,
            num_concepts=settings.num_concepts,
            stitch=StitchSettings(coverage=settings.stitch_coverage, flip_prob=augmentation.hflip_prob),
            seed=settings.seed,
        ),
        augment=train_transform(preprocessing, augmentation),
    )


def notes_on(job: Job[Settings], teacher: DenseModel, concepts: ConceptCache) -> list[str]:
    """Say what a reader must know about teacher, concepts and start."""
    settings, notes = job.settings, []
    name = Path(teacher.name).name if teacher.name else "the dense model that the same run trained"
    notes.append(
        f"concepts were found with a trained teacher, {name}, which has seen the labels of the training images"
    )
    without = concepts.without_concepts()
    if without:
        notes.append(f"{len(without)} of {job.splits.num_labels} classes gave no concepts")
    if settings.pruning_data == "stitch":
        notes.append("how concepts are stitched to images is a reconstruction: the papers' code does not run there")
    if settings.initialisation == "random":
        form = f"{job.dense.name} gave its form and no weights; " if job.dense.name else ""
        notes.append(f"{form}the dense model beside it began with other weights than the one that was cut")
    else:
        notes.append("saliencies of a trained model are close to zero and noisy; the papers prune before training")
    return notes


if __name__ == "__main__":
    try:
        main(parse(Settings, sys.argv[1:], description=__doc__, embedded=EMBEDDED_SETTINGS))
    except HfPruneError as err:
        sys.exit(f"{type(err).__name__}: {err}")
