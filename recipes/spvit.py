"""Latency-aware soft token pruning (SPViT) of a vision transformer.

Expect  without arguments: the handwritten digits inside scikit-learn and a small ViT trained on the spot, a few minutes
        on two CPU cores (benchmarks/spvit_digits.py measures it). On ImageNet: not measured yet.
Run     accelerate launch recipes/spvit.py
        accelerate launch recipes/spvit.py --model_name_or_path facebook/deit-small-patch16-224 \
            --dataset_name imagenet-1k --target_latency 0.6 --output_dir outputs/deit-small-spvit
Source  Kong et al., SPViT: Enabling Faster Vision Transformers via Latency-Aware Soft Token Pruning,
        ECCV 2022, arXiv 2112.13890.
"""

import copy
import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from hf_prune.data.images import ImageSplits, load_images
from hf_prune.data.loader import make_loader
from hf_prune.data.source import EMBEDDED
from hf_prune.data.transforms import Augmentation, eval_transform, train_transform
from hf_prune.errors import HfPruneError, RecipeError
from hf_prune.measure.accuracy import evaluate
from hf_prune.measure.evidence import PixelPool, TargetShare, latency_ratio, time_models
from hf_prune.measure.latency_table import LatencyTable, measure_latency_table, table_setting
from hf_prune.measure.report import print_report
from hf_prune.measure.token_cost import BlockProbe, TokenCost
from hf_prune.models import DenseModel, embedded_vit, load_dense
from hf_prune.publish.run_folder import Evidence, publish_run
from hf_prune.recover.checkpoints import Checkpoints
from hf_prune.recover.loop import PhaseSettings, train_phase
from hf_prune.recover.objectives import Classify, PruneTokens
from hf_prune.recover.rates import TwoRates, freeze_positions, warmup_cosine
from hf_prune.run import Run, start_run, use_all_threads
from hf_prune.tokens.attach import add_token_pruning, token_pruning_of
from hf_prune.tokens.calibrate import calibrate_thresholds
from hf_prune.tokens.config import Packages, TokenPruningConfig
from hf_prune.tokens.constraint import keep_constraint
from hf_prune.tokens.fit import fit_to_target
from hf_prune.tokens.schedule import even_stages, keep_ratios_for, target_ms
from hf_prune.tokens.site import find_site

AUGMENTATIONS = {"deit": Augmentation(), "gentle": Augmentation.gentle(), "none": Augmentation.none()}

# A small ViT trained from nothing on 1,257 digits wants other settings than a pretrained one on ImageNet.
EMBEDDED_SETTINGS = {
    "target_latency": 0.85,
    "before_blocks": [2, 4],
    "dense_epochs": 14.0,
    "dense_learning_rate": 2e-3,
    "num_train_epochs": 8.0,
    "learning_rate": 1.5e-3,
    "backbone_lr_share": 0.3,
    "per_device_train_batch_size": 32,
    "label_smoothing": 0.0,
    "augmentation": "gentle",
    "output_dir": "outputs/spvit-digits",
}


@dataclass(frozen=True)
class Settings:
    """Settings of the recipe; names follow transformers' `run_image_classification_no_trainer.py`."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id, local folder or timm name of a dense classifier. Default: a small ViT."},
    )
    dataset_name: str = field(default=EMBEDDED, metadata={"help": "Hub id, local folder, parquet file, or digits."})
    dataset_config_name: str | None = None
    image_column_name: str | None = None
    label_column_name: str | None = None
    streaming: bool = field(default=False, metadata={"help": "Stream the dataset; needs --max_train_steps."})
    train_val_split: float = 0.15
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    augmentation: str = field(
        default="deit", metadata={"help": "deit, gentle (no flips) or none.", "choices": [*AUGMENTATIONS]}
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that decode images."})

    target_latency: float = field(
        default=0.6, metadata={"help": "At most 1: fraction of the dense latency. Above: milliseconds per batch."}
    )
    latency_batch_size: int = field(default=32, metadata={"help": "Images in a batch, for table and target."})
    latency_table: str | None = field(default=None, metadata={"help": "Use this table instead of measuring one."})
    keep_ratios: list[float] | None = field(
        default=None, metadata={"help": "Patches alive after each selector, instead of a latency target."}
    )
    before_blocks: list[int] | None = field(default=None, metadata={"help": "Default: three even stages."})
    selector_heads: int | None = field(default=None, metadata={"help": "Default: the attention heads of the model."})
    share_head_mlp: bool = field(default=False, metadata={"help": "One scoring MLP for all heads, as released."})
    released_mlp1: bool = field(default=False, metadata={"help": "First MLP of the released code, not the paper's."})
    packages: str = field(
        default="single", metadata={"help": "single or per_stage.", "choices": ["single", "per_stage"]}
    )

    num_train_epochs: float = 30.0
    max_train_steps: int | None = None
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = field(default=None, metadata={"help": "Default: 5e-4 * global batch / 512."})
    backbone_lr_share: float = field(default=0.01, metadata={"help": "Cap of the backbone's rate, of --learning_rate."})
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    ratio_weight: float = field(default=2.0, metadata={"help": "Weight of the quadratic keep-ratio loss."})
    ratio_multiplier_rate: float = field(
        default=0.05, metadata={"help": "Step of its multipliers; 0 is the paper's loss."}
    )
    dense_epochs: float = field(default=0.0, metadata={"help": "Train the dense model first."})
    dense_learning_rate: float = 1e-4
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Fresh head; wants --dense_epochs."})
    mixed_precision: str | None = None
    seed: int = 0

    output_dir: str = "outputs/spvit"
    overwrite_output_dir: bool = False
    checkpointing_steps: str | None = field(default=None, metadata={"help": "Number of steps, or 'epoch'."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'latest': go on in --output_dir."})
    logging_steps: int = 10
    with_tracking: bool = False
    report_to: str = "all"
    expected_processes: int | None = field(default=None, metadata={"help": "Stop if fewer or more were started."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads of a process. Default: its cores."})
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None
    hub_private: bool = False


def main(settings: Settings) -> None:
    """Prune a dense model to a latency target and publish it."""
    run = open_run(settings)
    splits = open_images(settings)
    dense = open_model(settings, splits)
    loaders = Loaders(settings, splits, dense)
    checkpoints = open_checkpoints(settings, run)
    dense.model.to(run.accelerator.device)

    table = open_table(settings, run, dense.model, loaders)
    config = choose_keep_ratios(settings, dense.model, table.cost())
    started = time.perf_counter()
    train_dense(settings, run, dense, loaders, checkpoints)
    pruned = prune_tokens(settings, run, dense.model, config, loaders, checkpoints)
    train_seconds = time.perf_counter() - started

    target = fit_latency(settings, run, dense.model, pruned, table, loaders)
    evidence = Evidence(
        dense=dense,
        pruned=pruned,
        pool=loaders.pool("test", run),
        dense_accuracy=evaluate(dense.model, loaders.test, run.accelerator, title="dense"),
        pruned_accuracy=evaluate(pruned, loaders.test, run.accelerator, title="pruned"),
        target=target,
        batch_sizes=(1, settings.latency_batch_size),
        train_seconds=train_seconds,
    )
    if run.is_main:
        report = publish_run(run, evidence, splits, seed=settings.seed)
        print_report(report)
        push(settings, run)
    run.accelerator.end_training()


def open_run(settings: Settings) -> Run:
    """Check settings and machine, and start the processes' common work."""
    if settings.keep_ratios is not None and settings.latency_table is not None:
        raise RecipeError("give `--keep_ratios` or `--latency_table`, not both: one decides what the other would")
    if settings.resume_from_checkpoint not in (None, "latest"):
        raise RecipeError(
            f"`--resume_from_checkpoint` must be 'latest' (of `--output_dir`), got '{settings.resume_from_checkpoint}'"
        )
    if settings.push_to_hub and not settings.hub_model_id:
        raise RecipeError("`--push_to_hub` needs `--hub_model_id owner/name`")
    if settings.ignore_mismatched_sizes and not settings.dense_epochs:
        raise RecipeError("a fresh head must be trained before it can teach: add `--dense_epochs 5`, for example")
    run = start_run(
        settings.output_dir,
        seed=settings.seed,
        resume=settings.resume_from_checkpoint is not None,
        overwrite=settings.overwrite_output_dir,
        expected_processes=settings.expected_processes,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=settings.mixed_precision,
        tracker=settings.report_to if settings.with_tracking else None,
    )
    threads = use_all_threads(settings.num_threads)
    processes = run.accelerator.num_processes
    run.say(f"{processes} process(es) on {run.accelerator.device.type}, {threads} CPU thread(s) each")
    if settings.with_tracking:
        run.accelerator.init_trackers("hf_prune_spvit", config=plain(settings))
    return run


def open_images(settings: Settings) -> ImageSplits:
    """Open the dataset."""
    return load_images(
        settings.dataset_name,
        config_name=settings.dataset_config_name,
        image_column=settings.image_column_name,
        label_column=settings.label_column_name,
        streaming=settings.streaming,
        train_val_split=settings.train_val_split,
        max_train_samples=settings.max_train_samples,
        max_eval_samples=settings.max_eval_samples,
        seed=settings.seed,
    )


def open_model(settings: Settings, splits: ImageSplits) -> DenseModel:
    """Load the dense model, or make the small one."""
    if settings.model_name_or_path is None:
        return embedded_vit(splits.label_names)
    return load_dense(
        settings.model_name_or_path, splits.label_names, ignore_mismatched_sizes=settings.ignore_mismatched_sizes
    )


class Loaders:
    """The batches of a run: augmented for training, plain for everything else."""

    def __init__(self, settings: Settings, splits: ImageSplits, dense: DenseModel) -> None:
        self.settings, self.splits = settings, splits
        self.plain = eval_transform(dense.preprocessing)
        augmented = train_transform(dense.preprocessing, AUGMENTATIONS[settings.augmentation])
        self.train = make_loader(
            splits.train,
            splits=splits,
            transform=augmented,
            batch_size=settings.per_device_train_batch_size,
            train=True,
            seed=settings.seed,
            num_workers=settings.num_workers,
        )
        self.validation, self.test = self._plain(splits.validation), self._plain(splits.test)

    def _plain(self, split: Any) -> DataLoader:
        return make_loader(
            split,
            splits=self.splits,
            transform=self.plain,
            batch_size=self.settings.per_device_eval_batch_size,
            train=False,
            num_workers=self.settings.num_workers,
        )

    def pool(self, split: str, run: Run, num_images: int = 512) -> PixelPool:
        """Return the first images of a split as pixels on the device."""
        return PixelPool(self._plain(getattr(self.splits, split)), num_images, run.accelerator.device)


def open_checkpoints(settings: Settings, run: Run) -> Checkpoints:
    """Find out where to resume and what may be resumed."""
    every = {None: None, "epoch": 0}.get(settings.checkpointing_steps, settings.checkpointing_steps)
    if isinstance(every, str) and not (every.isdigit() and int(every) > 0):
        raise RecipeError(f"`--checkpointing_steps` must be a number of steps or 'epoch', got '{every}'")
    elsewhere = ("output_dir", "overwrite_output_dir", "checkpointing_steps", "resume_from_checkpoint", "latency_table")
    same = {key: value for key, value in plain(settings).items() if key not in elsewhere and "hub" not in key}
    checkpoints = Checkpoints(
        run.output_dir / "checkpoints",
        run.accelerator,
        {**same, "num_processes": run.accelerator.num_processes},
        resume=settings.resume_from_checkpoint is not None,
        every=None if every is None else int(every),
    )
    checkpoints.check()
    return checkpoints


def open_table(settings: Settings, run: Run, dense: nn.Module, loaders: Loaders) -> LatencyTable:
    """Read the given latency table, or the one a resumed run began with, or measure one."""
    path = run.output_dir / "latency_table.json"
    pixels = loaders.pool("train", run, settings.latency_batch_size).batch(0, settings.latency_batch_size)
    making = selector_making(settings, dense)
    if run.is_main and not (settings.resume_from_checkpoint and path.is_file()):
        if settings.latency_table is not None:
            table = LatencyTable.read(Path(settings.latency_table))
            table.require_same_setting(table_setting(BlockProbe(dense, pixels, making)))
        else:
            run.say(f"measuring a latency table at batch {settings.latency_batch_size} ...")
            table = measure_latency_table(dense, pixels, making)
        table.write(path)
    run.accelerator.wait_for_everyone()
    return LatencyTable.read(path)


def selector_making(settings: Settings, dense: nn.Module) -> TokenPruningConfig:
    """Return where the selectors go and what they are like, before their keep ratios are known."""
    site = find_site(dense)
    blocks = tuple(settings.before_blocks or even_stages(site.depth))
    return TokenPruningConfig(
        before_blocks=blocks,
        keep_ratios=tuple(settings.keep_ratios or [1.0] * len(blocks)),
        num_heads=settings.selector_heads or site.num_heads,
        share_head_mlp=settings.share_head_mlp,
        paper_mlp1=not settings.released_mlp1,
        packages=cast(Packages, settings.packages),
    )


def choose_keep_ratios(settings: Settings, dense: nn.Module, cost: TokenCost) -> TokenPruningConfig:
    """Turn the latency target into keep ratios by the table, unless they are given."""
    making = selector_making(settings, dense)
    if settings.keep_ratios is not None:
        return making
    ratios = keep_ratios_for(
        cost,
        target_ms(settings.target_latency, cost.dense),
        making.before_blocks,
        per_stage_packages=making.packages == "per_stage",
    )
    return dataclasses.replace(making, keep_ratios=ratios)


def train_dense(settings: Settings, run: Run, dense: DenseModel, loaders: Loaders, checkpoints: Checkpoints) -> None:
    """Train the dense model where it has no weights yet, or a fresh head."""
    if not settings.dense_epochs:
        return
    phase = PhaseSettings(
        epochs=settings.dense_epochs,
        learning_rate=settings.dense_learning_rate,
        weight_decay=settings.weight_decay,
        shapes={"": warmup_cosine()},
        seed=settings.seed,
        max_grad_norm=1.0,
        logging_steps=settings.logging_steps,
    )
    train_phase(
        "dense",
        dense.model,
        Classify(label_smoothing=settings.label_smoothing),
        loaders.train,
        phase,
        accelerator=run.accelerator,
        checkpoints=checkpoints,
        log_path=run.output_dir / "train_log.jsonl",
    )


def prune_tokens(
    settings: Settings,
    run: Run,
    dense: nn.Module,
    config: TokenPruningConfig,
    loaders: Loaders,
    checkpoints: Checkpoints,
) -> nn.Module:
    """Put selectors into a copy of the dense model and train both."""
    teacher = dense.eval().requires_grad_(False)
    student = copy.deepcopy(dense).requires_grad_(True)
    freeze_positions(student)
    add_token_pruning(student, config)
    global_batch = (
        settings.per_device_train_batch_size * settings.gradient_accumulation_steps * run.accelerator.num_processes
    )
    rates = TwoRates(backbone_share=settings.backbone_lr_share)
    phase = PhaseSettings(
        epochs=settings.num_train_epochs,
        max_steps=settings.max_train_steps,
        learning_rate=settings.learning_rate or 5e-4 * global_batch / 512,
        weight_decay=settings.weight_decay,
        shapes={"token_pruning": rates.selector, "": rates.backbone},
        seed=settings.seed + 1,
        logging_steps=settings.logging_steps,
    )
    objective = PruneTokens(
        teacher,
        keep_constraint(config.keep_ratios, weight=settings.ratio_weight, rate=settings.ratio_multiplier_rate),
        run.accelerator,
        settings.seed,
        label_smoothing=settings.label_smoothing,
    )
    pruned = train_phase(
        "spvit",
        student,
        objective,
        loaders.train,
        phase,
        accelerator=run.accelerator,
        checkpoints=checkpoints,
        log_path=run.output_dir / "train_log.jsonl",
    )
    return pruned.eval()


def calibration_batches(loaders: Loaders, run: Run) -> Any:
    """Return a function that gives the calibration images, training images as evaluation sees them, in batches."""
    pool = loaders.pool("train", run)

    def batches() -> Iterator[Tensor]:
        return iter(pool.pixels.split(loaders.settings.per_device_eval_batch_size))

    return batches


def fit_latency(
    settings: Settings, run: Run, dense: nn.Module, pruned: nn.Module, table: LatencyTable, loaders: Loaders
) -> TargetShare | None:
    """Set thresholds for the keep ratios, shifting them until the latency on validation images is the target."""
    batches = calibration_batches(loaders, run)
    if settings.keep_ratios is not None:
        calibrate_thresholds(pruned, batches, settings.keep_ratios)
        return None
    pool, cost = loaders.pool("validation", run), table.cost()
    wanted_ms = target_ms(settings.target_latency, cost.dense)
    models = {"dense": dense, "pruned": pruned}
    pruning = token_pruning_of(pruned)

    def measure() -> float:
        """Return the pruned latency on the scale of the table: measured ratio times the table's dense latency."""
        times = time_models(models, pool, table.batch_size)
        return cast(float, broadcast_object_list([latency_ratio(times) * cost.dense])[0])

    fit_to_target(
        pruning,
        cost,
        wanted_ms,
        calibrate=lambda ratios: calibrate_thresholds(pruned, batches, ratios),
        measure=measure,
    )
    kept = torch.tensor(pruning.settings.keep_ratios) * cost.num_patches
    per_stage = pruning.settings.packages == "per_stage"
    predicted_ms = float(cost.of_kept(kept, pruning.settings.before_blocks, per_stage_packages=per_stage))
    return TargetShare(wanted_ms / cost.dense, predicted_ms / cost.dense)


def push(settings: Settings, run: Run) -> None:
    """Upload the output folder where that was asked for."""
    if settings.push_to_hub:
        from hf_prune.publish.hub import push_folder

        url = push_folder(
            run.output_dir, cast(str, settings.hub_model_id), token=settings.hub_token, private=settings.hub_private
        )
        run.say(f"pushed: {url}")


def plain(settings: Settings) -> dict[str, Any]:
    """Return the settings as JSON-ready data."""
    return dataclasses.asdict(settings)


def parse(arguments: list[str]) -> Settings:
    """Read the command line; without a model or dataset of its own the embedded default takes its own settings."""
    parser = HfArgumentParser(cast(Any, Settings), description=__doc__)
    given, _ = parser.parse_known_args(arguments)
    if given.model_name_or_path is None:
        parser.set_defaults(**EMBEDDED_SETTINGS)
    return Settings(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except HfPruneError as err:
        sys.exit(f"{type(err).__name__}: {err}")
