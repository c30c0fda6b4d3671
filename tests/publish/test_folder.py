"""Whatever stops a process that writes a folder: the folder is the old one or the new one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_prune.publish import folder as module
from hf_prune.publish.folder import replaced

OLD = {"config.json": "old", "model.safetensors": "old", "notes.txt": "mine", "checkpoints/step_1": "mine"}
NEW = {"config.json": "new", "model.safetensors": "new", "report.json": "new"}
AFTER = {**OLD, **NEW}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=["at once", "one by one"])
def target(request, tmp_path, monkeypatch):
    if request.param == "one by one":
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
    write(tmp_path / "out", OLD)
    return tmp_path / "out"


def test_new_files_replace_old_ones_and_others_stay(target):
    with replaced(target) as fresh:
        write(fresh, NEW)
    assert read(target) == AFTER
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_folder_that_is_not_there_yet(tmp_path):
    with replaced(tmp_path / "a" / "out") as fresh:
        write(fresh, NEW)
    assert read(tmp_path / "a" / "out") == NEW


def test_an_error_leaves_everything_as_it_was(target):
    def fill_the_disk():
        with replaced(target) as fresh:
            write(fresh, {"model.safetensors": "half"})
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        fill_the_disk()
    assert read(target) == OLD
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_shards_of_the_old_weights_do_not_stay(target):
    write(target, {"model-00001-of-00002.safetensors": "old", "model.safetensors.index.json": "old"})
    with replaced(target) as fresh:
        write(fresh, NEW)
    assert read(target) == AFTER


CODE = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from hf_prune.publish import folder
from test_folder import NEW, write

calls = 0
def trace(frame, event, argument):
    global calls
    if frame.f_code.co_filename == folder.__file__:
        calls += event == "line"
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

with folder.replaced(Path(sys.argv[1])) as fresh:
    write(fresh, NEW)
    sys.settrace(trace)
    sys._getframe().f_trace = trace
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders change places at once on Linux only")
def test_killed_at_every_line_the_model_is_the_old_or_the_new(tmp_path):
    code = CODE.format(tests=str(Path(__file__).parent))
    states = set()
    for line in range(1, 400, 3):
        target = tmp_path / str(line) / "out"
        write(target, OLD)
        done = subprocess.run([sys.executable, "-c", code, target, str(line)], capture_output=True, text=True)
        found = read(target)
        state = (found["config.json"], found["model.safetensors"])
        assert state in {("old", "old"), ("new", "new")}, (line, state)
        states.add(state)
        if "done" in done.stdout:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        with replaced(target) as fresh:  # the next one finds nothing lost
            write(fresh, NEW)
        assert read(target) == AFTER
        assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert states == {("old", "old"), ("new", "new")}
    assert "done" in done.stdout
