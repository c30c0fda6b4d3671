import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import NUM_CLASSES, build_dense, pixel_batch
from torch.utils.data import DataLoader, Dataset

from hf_prune.data.loader import EpochShuffle
from hf_prune.errors import CheckpointError, RecipeError
from hf_prune.recover import objectives
from hf_prune.recover.checkpoints import Checkpoints
from hf_prune.recover.loop import PhaseSettings, train_phase
from hf_prune.recover.objectives import Classify, PruneTokens
from hf_prune.tokens.attach import add_token_pruning
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.constraint import keep_constraint


class Images(Dataset):
    """Random images with labels; pixels depend on epoch and index, as the real ones do."""

    epoch = 0

    def __len__(self):
        return 24

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return {"pixel_values": pixel_batch(1, seed=100 * self.epoch + index)[0], "labels": index % NUM_CLASSES}


class Stop(Exception):  # noqa: N818 (not an error: the plug is pulled)
    pass


def train(folder, *, stop_at=None, resume=False, every=2, accumulate=1, phase="spvit", run=None, epochs=2.0):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    teacher = build_dense("vit").requires_grad_(False)
    student = build_dense("vit")
    student.vit.layers[0].dropout.p = 0.2  # something that draws from torch's global stream
    torch.manual_seed(5)
    add_token_pruning(student, TokenPruningConfig(before_blocks=(2, 4), keep_ratios=(0.7, 0.4), num_heads=4))
    objective = PruneTokens(teacher, keep_constraint((0.7, 0.4)), accelerator, seed=0)
    images = Images()
    loader = DataLoader(images, batch_size=4, sampler=EpochShuffle(images, seed=0))
    if stop_at is not None:
        after_step, steps = objective.after_step, []

        def counted():
            steps.append(1)
            if len(steps) > stop_at:
                raise Stop
            return after_step()

        objective.after_step = counted
    settings = PhaseSettings(
        epochs=epochs,
        learning_rate=1e-3,
        weight_decay=0.05,
        shapes={"": lambda progress: 1 - progress / 2},
        seed=3,
        logging_steps=1,
    )
    checkpoints = Checkpoints(folder, accelerator, run or {"seed": 3}, resume=resume, every=every)
    checkpoints.check()
    model = train_phase(
        phase,
        student,
        objective,
        loader,
        settings,
        accelerator=accelerator,
        checkpoints=checkpoints,
        log_path=folder / "log.jsonl",
    )
    return model.state_dict(), objective.constraint.multipliers


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(("stop_at", "accumulate"), [(3, 1), (7, 1), (2, 2)])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, stop_at, accumulate):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, multipliers = train(tmp_path / "whole", accumulate=accumulate)
    with pytest.raises(Stop):
        train(tmp_path / "cut", stop_at=stop_at, accumulate=accumulate)
    torch.rand(7)  # the global stream of the new process is somewhere else
    resumed, resumed_multipliers = train(tmp_path / "cut", resume=True, accumulate=accumulate)
    assert_same_weights(whole, resumed)
    assert multipliers == resumed_multipliers != [0.0, 0.0]
    fresh, _ = train(tmp_path / "cut", every=None, accumulate=accumulate, epochs=1.0)
    assert any(not torch.equal(whole[name], fresh[name]) for name in whole)


def test_a_finished_phase_is_loaded_instead_of_trained(tmp_path):
    first, _ = train(tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().count("\n")
    second, _ = train(tmp_path, resume=True)
    assert_same_weights(first, second)
    assert (tmp_path / "log.jsonl").read_text().count("\n") == lines


def test_the_log_holds_losses_and_keep_ratios(tmp_path):
    train(tmp_path, every=None)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(0 < line["keep_2"] <= line["keep_1"] <= 1 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_save_that_is_cut_off_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        train(tmp_path, stop_at=3)
    (good,) = tmp_path.glob("spvit-step_*")

    def full_disk(self, folder, **_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", full_disk)
        with pytest.raises(CheckpointError, match=r"No space left .* earlier checkpoints are untouched"):
            train(tmp_path, resume=True)
    complete = [path for path in tmp_path.glob("spvit-step_*") if path.suffix != ".partial"]
    assert complete == [good]
    train(tmp_path, resume=True)


def test_checkpoints_of_another_run_are_refused_by_what_differs(tmp_path):
    with pytest.raises(Stop):
        train(tmp_path, stop_at=3)
    with pytest.raises(CheckpointError, match=r"another run: seed was 3 and is 4"):
        train(tmp_path, resume=True, run={"seed": 4})


def test_resuming_without_a_checkpoint_or_from_a_broken_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is none"):
        train(tmp_path, resume=True)
    (tmp_path / "spvit-step_0000001").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint of hf_prune"):
        train(tmp_path, resume=True)


def test_only_the_latest_checkpoints_are_kept(tmp_path):
    train(tmp_path, every=1)
    assert sorted(path.name for path in tmp_path.glob("spvit-step_*")) == ["spvit-step_0000011", "spvit-step_0000012"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "distillation_loss", lambda logits, *_, **__: logits.sum() * float("nan"))
    with pytest.raises(RecipeError, match="learning_rate"):
        train(tmp_path)


def test_plain_training_learns():
    AcceleratorState._reset_state(reset_partial_state=True)
    model = build_dense("vit").train()
    batch = {"pixel_values": pixel_batch(8), "labels": torch.arange(8) % NUM_CLASSES}
    optimizer, objective = torch.optim.AdamW(model.parameters(), lr=1e-3), Classify()
    losses = []
    for number in range(15):
        loss = objective.loss(model, batch, batch_number=number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
