"""A checkpoint is whole or not there, whatever happens while it is written; and the right one is found."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridrl.trainer import checkpoints


def write(text: str = "x"):
    def into(folder: str) -> None:
        (Path(folder) / "actor").mkdir()
        (Path(folder) / "actor" / "rank_00000.pt").write_text(text)

    return into


def save(run, step: int, text: str = "x", keep: int | None = None) -> Path:
    return checkpoints.save(str(run), step, write(text), {"step": step}, keep)


def latest(run) -> str:
    return (Path(run) / checkpoints.LATEST).read_text().strip()


def test_saved_is_found(tmp_path):
    assert checkpoints.find(str(tmp_path / "nothing here"), "auto", None) is None
    folder = save(tmp_path / "run", 3)
    assert folder == checkpoints.find(str(tmp_path / "run"), "auto", None) and folder.is_absolute()
    assert checkpoints.read_state(folder) == {"step": 3} and latest(tmp_path / "run") == "3"
    assert (folder / "actor" / "rank_00000.pt").read_text() == "x"
    assert sorted(os.listdir(tmp_path / "run")) == ["global_step_3", checkpoints.LATEST]


def test_newest_by_number_not_by_name(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert checkpoints.steps(str(tmp_path)) == [9, 10, 100]
    assert checkpoints.find(str(tmp_path), "auto", None).name == "global_step_100"


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("a rank died"), KeyboardInterrupt()])
def test_a_write_that_raises_leaves_the_older_ones(tmp_path, error):
    save(tmp_path, 1)

    def failing(folder: str) -> None:
        write()(folder)
        raise error

    with pytest.raises(type(error)):
        checkpoints.save(str(tmp_path), 2, failing, {"step": 2}, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["global_step_1", checkpoints.LATEST]
    assert latest(tmp_path) == "1" and checkpoints.find(str(tmp_path), "auto", None).name == "global_step_1"


def test_a_state_that_is_no_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        checkpoints.save(str(tmp_path), 1, write(), {"bad": object()}, None)
    assert os.listdir(tmp_path) == []


def test_leftovers_are_replaced_and_never_found(tmp_path):
    save(tmp_path, 1)
    stale = tmp_path / "global_step_2.tmp"
    stale.mkdir()
    (stale / "trainer.json").write_text("{}")
    (stale / "old").write_text("")
    (tmp_path / "global_step_7").mkdir()  # no trainer.json: not whole
    (tmp_path / "global_step_8").write_text("a file")
    assert checkpoints.steps(str(tmp_path)) == [1]
    assert not (save(tmp_path, 2) / "old").exists() and not stale.exists()
    assert checkpoints.steps(str(tmp_path)) == [1, 2]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 2, "first")
    assert (save(tmp_path, 2, "second") / "actor" / "rank_00000.pt").read_text() == "second"


@pytest.mark.parametrize("keep,left", [(1, [30]), (2, [20, 30]), (5, [4, 20, 30]), (None, [4, 20, 30])])
def test_keep(tmp_path, keep, left):
    for step in (4, 20, 30):
        save(tmp_path, step, keep=keep)
    assert checkpoints.steps(str(tmp_path)) == left


def test_older_ones_go_only_when_the_new_one_is_whole(tmp_path):
    seen = []
    save(tmp_path, 1)
    checkpoints.save(str(tmp_path), 2, lambda folder: seen.append(checkpoints.steps(str(tmp_path))), {}, keep=1)
    assert seen == [[1]] and checkpoints.steps(str(tmp_path)) == [2]


def test_a_run_that_went_back_resumes_on_its_own_branch(tmp_path):
    """Resumed from step 2 of a run that once reached 9: what it saves is kept and is what the next start finds."""
    for step in (2, 9):
        save(tmp_path, step)
    again = save(tmp_path, 4, keep=1)
    assert again.is_dir(), "the one just saved is not dropped for an older run's"
    assert checkpoints.find(str(tmp_path), "auto", None) == again


@pytest.mark.parametrize("text", ["77\n", "", "not a number"])
def test_a_pointer_to_nothing_falls_back_to_the_newest(tmp_path, text):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / checkpoints.LATEST).write_text(text)
    assert checkpoints.find(str(tmp_path), "auto", None).name == "global_step_2"
    (tmp_path / checkpoints.LATEST).unlink()
    assert checkpoints.find(str(tmp_path), "auto", None).name == "global_step_2"


def test_modes(tmp_path):
    first = save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoints.find(str(tmp_path), "disable", None) is None
    assert checkpoints.find(str(tmp_path), "resume_path", str(first)) == first
    assert checkpoints.find(str(tmp_path / "other"), "resume_path", str(first)) == first


@pytest.mark.parametrize("path", [None, "", "nowhere", "global_step_7"])
def test_bad_resume_path_names_the_key_and_the_whole_ones(tmp_path, path):
    save(tmp_path, 1)
    (tmp_path / "global_step_7").mkdir()
    given = path and str(tmp_path / path)
    with pytest.raises(ValueError, match=r"trainer.resume_from_path=.* is no whole checkpoint.*\[1\]"):
        checkpoints.find(str(tmp_path), "resume_path", given)


CHILD = """
import sys, pathlib
from hybridrl.trainer import checkpoints
run, step = sys.argv[1], 1
while True:
    def write(folder):
        for i in range(20):
            pathlib.Path(folder, f"rank_{i}").write_bytes(bytes([step % 256]) * 200_000)
    checkpoints.save(run, step, write, {"step": step, "filler": "x" * 100_000}, 2)
    step += 1
"""


def pointed(run) -> int:
    return int(latest(run)) if (run / checkpoints.LATEST).exists() else 0


def test_killed_at_any_moment(tmp_path):
    """kill -9 at odd times while it saves all the time: what is found is whole each time, and never goes back."""
    reached = 0
    for i in range(20):
        child = subprocess.Popen([sys.executable, "-c", CHILD.replace("1\n", f"{reached + 1}\n", 1), str(tmp_path)])
        try:
            deadline = time.monotonic() + 30
            while pointed(tmp_path) <= reached and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(0.0015 * i)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        folder = checkpoints.find(str(tmp_path), "auto", None)
        step = json.loads((folder / "trainer.json").read_text())["step"]
        assert step > reached and folder.name == f"global_step_{step}"
        files = sorted(folder.glob("rank_*"))
        assert len(files) == 20 and all(f.read_bytes() == bytes([step % 256]) * 200_000 for f in files)
        reached = step


@pytest.mark.parametrize("limit", [0, 50_000, 300_000])
def test_a_full_disk_leaves_the_older_ones(tmp_path, limit):
    """RLIMIT_FSIZE makes a write fail as a full disk does: in a rank's file or in trainer.json."""
    save(tmp_path, 1)
    code = CHILD.replace("1\n", "2\n", 1).replace("200_000", "100_000" if limit else "10")
    code = code.replace("100_000}", "400_000}")
    child = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n{code}"
    done = subprocess.run([sys.executable, "-c", child, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "OSError: [Errno 27] File too large" in done.stderr, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["global_step_1", checkpoints.LATEST] and latest(tmp_path) == "1"
    assert checkpoints.find(str(tmp_path), "auto", None).name == "global_step_1"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize("name", ["actor/rank_00000.pt", "trainer.json"])
def test_a_damaged_newest_one_is_passed_over(tmp_path, harm, name, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step)
    harm(tmp_path / "global_step_3" / name)
    assert checkpoints.steps(str(tmp_path)) == [1, 2]
    assert checkpoints.find(str(tmp_path), "auto", None).name == "global_step_2"
    gone = harm is Path.unlink and name == "trainer.json"
    assert gone or "global_step_3" in caplog.text
    with pytest.raises(ValueError, match=r"trainer.resume_from_path=.*Whole ones in .*\[1, 2\]"):
        checkpoints.find(str(tmp_path), "resume_path", str(tmp_path / "global_step_3"))
    again = save(tmp_path, 3, "better")  # what the run that went back writes
    assert checkpoints.find(str(tmp_path), "auto", None) == again


def test_all_damaged_is_an_error_not_a_new_start(tmp_path):
    _cut(save(tmp_path, 1) / "actor/rank_00000.pt")
    with pytest.raises(ValueError, match="every checkpoint .* is damaged: global_step_1 .*resume_mode=disable"):
        checkpoints.find(str(tmp_path), "auto", None)
    assert checkpoints.find(str(tmp_path), "disable", None) is None
