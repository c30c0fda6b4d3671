"""A checkpoint is whole or does not count, whenever the run was killed."""

import shutil

import pytest
from accelerate import Accelerator

from hf_prune.recover.checkpoints import Checkpoints, Progress


def checkpoints(folder, **settings):
    return Checkpoints(folder, Accelerator(cpu=True), {"seed": 0}, every=1, **settings)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_latest_are_kept_and_nothing_else(tmp_path):
    saving = checkpoints(tmp_path)
    for step in range(1, 5):
        saving.save(Progress("dense", step=step))
    saving.save(Progress("dense", step=4, finished=True))
    assert names(tmp_path) == ["dense-step_0000003", "dense-step_0000004"]
    assert checkpoints(tmp_path, resume=True).restore("dense").finished


def test_a_run_killed_while_it_deletes_an_old_checkpoint_can_be_resumed(tmp_path, monkeypatch):
    saving = checkpoints(tmp_path, keep=1)
    saving.save(Progress("dense", step=1))

    def killed(path):
        (path / "progress.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        saving.save(Progress("dense", step=2))
    monkeypatch.undo()
    resumed = checkpoints(tmp_path, keep=1, resume=True)
    resumed.check()
    assert resumed.restore("dense").step == 2
    resumed.save(Progress("dense", step=3))
    assert names(tmp_path) == ["dense-step_0000003"]
