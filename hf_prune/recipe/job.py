"""A recipe at work: the run, its images, the dense model, the checkpoints, and how all phases train."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_prune.data.images import ImageSplits, load_images
from hf_prune.data.loader import make_loader
from hf_prune.data.transforms import AUGMENTATIONS, eval_transform, train_transform
from hf_prune.measure.accuracy import Accuracy, evaluate
from hf_prune.measure.evidence import PixelPool
from hf_prune.models import DenseModel, embedded_vit, load_dense
from hf_prune.recipe.run import Run, start_run, use_all_threads
from hf_prune.recipe.settings import RecipeSettings
from hf_prune.recover.checkpoints import Checkpoints
from hf_prune.recover.loop import Objective, PhaseSettings, train_phase
from hf_prune.recover.objectives import Classify
from hf_prune.recover.rates import Shape, warmup_cosine

S = TypeVar("S", bound=RecipeSettings)


@dataclass(frozen=True)
class Job(Generic[S]):
    """Everything a recipe's steps work with.

    Attributes:
        settings: Of the recipe.
        run: Processes and output folder.
        splits: The images.
        dense: The model to prune and what belongs to it.
        checkpoints: Where phases are resumed from.
    """

    settings: S
    run: Run
    splits: ImageSplits
    dense: DenseModel
    checkpoints: Checkpoints

    def loader(self, split: str, *, train: bool = False) -> DataLoader:
        """Return the batches of a split, augmented for training, plain for everything else."""
        settings, preprocessing = self.settings, self.dense.preprocessing
        augmentation = AUGMENTATIONS[settings.augmentation]
        return make_loader(
            getattr(self.splits, split),
            splits=self.splits,
            transform=train_transform(preprocessing, augmentation) if train else eval_transform(preprocessing),
            batch_size=settings.per_device_train_batch_size if train else settings.per_device_eval_batch_size,
            train=train,
            seed=settings.seed,
            num_workers=settings.num_workers,
        )

    def pool(self, split: str, num_images: int = 512) -> PixelPool:
        """Return the first images of a split as pixels on the device."""
        return PixelPool(self.loader(split), num_images, self.run.accelerator.device)

    def calibration_batches(self) -> Callable[[], Iterator[Tensor]]:
        """Return a function that gives calibration images, training images as evaluation sees them, in batches."""
        pixels = self.pool("train").pixels
        return lambda: iter(pixels.split(self.settings.per_device_eval_batch_size))

    def evaluate(self, model: nn.Module, split: str, title: str = "evaluate") -> Accuracy:
        """Classify a split."""
        return evaluate(model, self.loader(split), self.run.accelerator, title=title)

    def train(
        self,
        phase: str,
        model: nn.Module,
        objective: Objective,
        shapes: dict[str, Shape],
        *,
        epochs: float,
        learning_rate: float,
        seed: int,
        max_steps: int | None = None,
        max_grad_norm: float | None = None,
    ) -> nn.Module:
        """Train a phase in place and return the model; see `recover.loop.train_phase`."""
        settings = PhaseSettings(
            epochs=epochs,
            max_steps=max_steps,
            learning_rate=learning_rate,
            weight_decay=self.settings.weight_decay,
            shapes=shapes,
            seed=seed,
            max_grad_norm=max_grad_norm,
            logging_steps=self.settings.logging_steps,
        )
        return train_phase(
            phase,
            model,
            objective,
            self.loader("train", train=True),
            settings,
            accelerator=self.run.accelerator,
            checkpoints=self.checkpoints,
            log_path=self.run.output_dir / "train_log.jsonl",
        )

    def train_dense(self) -> None:
        """Train the dense model where it has no weights yet, or a fresh head."""
        settings = self.settings
        if settings.dense_epochs:
            objective = Classify(label_smoothing=settings.label_smoothing)
            self.train(
                "dense",
                self.dense.model,
                objective,
                {"": warmup_cosine()},
                epochs=settings.dense_epochs,
                learning_rate=settings.dense_learning_rate,
                seed=settings.seed,
                max_grad_norm=1.0,
            )
        self.dense.model.eval().requires_grad_(False)

    @property
    def learning_rate(self) -> float:
        """The learning rate, scaled with the global batch where none is given."""
        settings = self.settings
        global_batch = (
            settings.per_device_train_batch_size
            * settings.gradient_accumulation_steps
            * self.run.accelerator.num_processes
        )
        return settings.learning_rate or 5e-4 * global_batch / 512

    def push(self) -> None:
        """Upload the output folder where that was asked for; the main process calls it."""
        settings = self.settings
        if settings.push_to_hub:
            from hf_prune.publish.hub import push_folder

            repo_id = cast(str, settings.hub_model_id)
            url = push_folder(self.run.output_dir, repo_id, token=settings.hub_token, private=settings.hub_private)
            self.run.say(f"pushed: {url}")


def open_job(
    settings: S,
    *,
    name: str,
    embedded: Callable[[Sequence[str]], DenseModel] = embedded_vit,
    check_model: Callable[[nn.Module], object] | None = None,
) -> Job[S]:
    """Open everything, cheapest checks first, so that what can be refused is refused before any work.

    Args:
        settings: Of the recipe.
        name: Of the recipe, for trackers.
        embedded: Makes the model where none is named, from the names of the labels.
        check_model: Raises an error for models that the recipe is not for.
    """
    settings.check()
    run = _open_run(settings, name)
    splits = load_images(
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
    dense = _open_model(settings, splits, embedded)
    if check_model is not None:
        check_model(dense.model)
    checkpoints = Checkpoints(
        run.output_dir / "checkpoints",
        run.accelerator,
        {**settings.of_the_run(), "num_processes": run.accelerator.num_processes},
        resume=settings.resume_from_checkpoint is not None,
        every=settings.checkpoint_every,
    )
    checkpoints.check()
    dense.model.to(run.accelerator.device)
    return Job(settings, run, splits, dense, checkpoints)


def _open_run(settings: RecipeSettings, name: str) -> Run:
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
        config: dict[str, Any] = {key: value for key, value in settings.to_json().items() if key != "hub_token"}
        run.accelerator.init_trackers(name, config=config)
    return run


def _open_model(
    settings: RecipeSettings, splits: ImageSplits, embedded: Callable[[Sequence[str]], DenseModel]
) -> DenseModel:
    if settings.model_name_or_path is None:
        return embedded(splits.label_names)
    return load_dense(
        settings.model_name_or_path, splits.label_names, ignore_mismatched_sizes=settings.ignore_mismatched_sizes
    )
