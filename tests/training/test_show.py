"""What a run shows and draws, and what it measures."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib.image
import pytest
import torch

from deltatune.errors import OutputError
from deltatune.training.curve import FEWEST, curve_of, draw_curve
from deltatune.training.files import discard, is_complete, mark_complete, write_text
from deltatune.training.measure import StepTimer, peak_memory
from deltatune.training.progress import ProgressBar, ProgressLines, progress

HISTORY: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 1.0},
    {"step": 2, "eval_score": 0.5, "eval_accuracy": 0.5},
    {"step": 3, "loss": 0.5},
    {"step": 4, "eval_score": 0.75},
]


def test_a_curve_is_computed_from_the_history() -> None:
    curve = curve_of(HISTORY)
    assert curve.loss == ((1, 2.0), (2, 1.0), (3, 0.5))
    assert curve.score == ((2, 0.5), (4, 0.75))
    assert curve.smooth == ()


def test_many_points_are_smoothed_without_a_lag() -> None:
    line = curve_of([{"step": step, "loss": 2 * step} for step in range(FEWEST)])
    assert [value for _, value in line.smooth] == pytest.approx([value for _, value in line.loss])
    rough = curve_of([{"step": step, "loss": step % 2} for step in range(3 * FEWEST)])
    values = [value for _, value in rough.smooth[5:-5]]
    assert min(values) > 0.4 and max(values) < 0.6
    assert len(rough.smooth) == len(rough.loss)


LONG: list[dict[str, Any]] = [{"step": step, "loss": 1 / step} for step in range(1, 101)] + [{"step": 50, "eval_score": 0.5}]


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:2], LONG, []], ids=["both", "loss", "long", "nothing"])
def test_a_curve_is_drawn(history: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_curve(curve_of(history), tmp_path / "curve.png", title="lora on tiny", metric="accuracy")
    picture = matplotlib.image.imread(tmp_path / "curve.png")
    assert picture.shape[1] == 840
    assert len({tuple(row) for row in picture[::20].reshape(-1, picture.shape[2]).tolist()}) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")

    def breaks(scratch: Path) -> None:
        scratch.write_text("half")
        raise OSError(28, "No space left on device")

    from deltatune.training.files import write_whole

    with pytest.raises(OutputError, match=r"a.json` cannot be written: .*No space left on device.*Free some space"):
        write_whole(tmp_path / "a.json", breaks)
    assert (tmp_path / "a.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / "nowhere" / "b.json", "")


def test_a_folder_is_complete_with_its_marker_and_all_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "a").write_text("12345")
    assert not is_complete(folder)
    mark_complete(folder)
    assert is_complete(folder)
    (folder / "a").write_text("123")
    assert not is_complete(folder)
    discard(folder)
    assert not folder.exists()


def state(step: int, total: int = 4) -> Any:
    return SimpleNamespace(global_step=step, max_steps=total, is_world_process_zero=True)


def play(watched: Any) -> None:
    nothing: Any = None
    watched.on_train_begin(nothing, state(0), nothing)
    for step in range(1, 5):
        watched.on_step_end(nothing, state(step), nothing)
        watched.on_log(nothing, state(step), nothing, logs={"loss": 1 / step})
    watched.on_log(nothing, state(4), nothing, logs={"eval_score": 0.75})
    watched.on_train_end(nothing, state(4), nothing)


def test_a_resumed_run_says_where_it_goes_on() -> None:
    file, nothing = io.StringIO(), cast(Any, None)
    watched = progress("lines", "lora", "accuracy", 16, file)
    assert watched is not None
    watched.on_train_begin(nothing, state(3), nothing)
    assert file.getvalue() == "lora goes on behind step 3 of 4.\n"


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    watched = progress("auto", "lora", "accuracy", 16, file)
    assert isinstance(watched, ProgressLines)
    monkeypatch.setattr(ProgressLines, "seconds", 0.0)
    play(watched)
    lines = file.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("lora 4/4: loss 0.250, accuracy 0.750, ")
    assert lines[-1].endswith("rows/s, 0:00 left")


def test_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    watched = progress("auto", "lora", "accuracy", 16, file)
    assert isinstance(watched, ProgressBar)
    play(watched)
    watched.close()
    assert "lora" in file.getvalue()
    assert "4/4" in file.getvalue()
    assert "accuracy 0.750" in file.getvalue()


def test_nothing_if_nothing_is_wanted() -> None:
    assert progress("none", "lora", "accuracy", 16) is None


def test_peak_memory_starts_anew() -> None:
    with peak_memory() as large:
        kept = torch.ones(64 * 2**20)
        del kept
    with peak_memory() as small:
        torch.ones(2**10)
    assert large.bytes - small.bytes > 128 * 2**20


def test_the_first_step_is_not_timed() -> None:
    timer = StepTimer()
    timer.seconds = [9.0, 1.0, 2.0, 3.0]
    assert timer.seconds_per_step == 2.0
