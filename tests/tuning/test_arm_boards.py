from __future__ import annotations

import io
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tests.analysis.synthetic_run import HORIZON, RUNG, Plan, write_run
from tunebench.study.load import load_run
from tunebench.study.plan import plan_arms
from tunebench.study.record import JOURNAL, TENSORBOARD
from tunebench.tuning import arm_boards
from tunebench.tuning.arm_boards import ARMS, ArmBoards, write_arm_boards

SEEDS = (0.030, 0.031, 0.032)
WORKLOADS = ("ethanol-nequip", "ethanol-allegro")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two arms on two workloads."""
    plan = Plan(arms={"adamw": SEEDS, "soap": tuple(0.9 * seed for seed in SEEDS)}, workloads=WORKLOADS)
    return write_run(tmp_path_factory.mktemp("boards") / "run", plan)


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return accumulator.Reload()


def curve(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def boards(run: Path, output: io.StringIO | None = None) -> ArmBoards:
    return ArmBoards(run, plan_arms(load_run(run)), Console(file=output or io.StringIO(), width=200))


def test_every_arm_has_its_curves_and_every_workload_its_charts_and_picture(run: Path) -> None:
    boards(run).show()
    arms = {f"{workload}.{optimizer}" for workload in WORKLOADS for optimizer in ("adamw", "soap")}
    assert {folder.name for folder in (run / TENSORBOARD / ARMS).iterdir() if folder.is_dir()} == arms
    shown = events(run / TENSORBOARD / ARMS)
    layout = layout_pb2.Layout.FromString(shown.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(WORKLOADS)
    assert {len(category.chart) for category in layout.category} == {5}
    for workload in WORKLOADS:
        (picture,) = shown.Images(f"ranking/{workload}")
        assert picture.step == 2 * 6 + 2 * 3  # trials that have ended
        image = Image.open(io.BytesIO(picture.encoded_image_string))
        assert min(image.size) > 100
        assert len(image.getcolors(image.width * image.height)) > 10


def test_the_charts_select_tags_that_the_arms_have(run: Path) -> None:
    boards(run).show()
    layout = arm_boards._layout(["ethanol-nequip"])
    selected = {pattern[0].strip("^$").replace("\\", "") for _, pattern in layout["ethanol-nequip"].values()}
    assert selected == set(events(run / TENSORBOARD / ARMS / "ethanol-nequip.adamw").Tags()["scalars"])


def test_curves_stand_on_their_own_axes(run: Path) -> None:
    boards(run).show()
    arm = events(run / TENSORBOARD / ARMS / "ethanol-nequip.adamw")
    trials = [HORIZON] * 3 + [RUNG] * 2 + [RUNG // 2]
    assert curve(arm, "ethanol-nequip/survivors_by_step") == [(0, 6.0), (HORIZON, 3.0)]
    assert curve(arm, "ethanol-nequip/device_seconds_by_trials_ended")[-1] == (6, pytest.approx(0.02 * sum(trials)))
    spent = [step for step, _ in curve(arm, "ethanol-nequip/best_objective_by_steps_spent")]
    assert spent == sorted(set(spent))
    assert spent[-1] == sum(trials)
    best = [value for _, value in curve(arm, "ethanol-nequip/best_objective_by_trials_ended")]
    assert best == sorted(best, reverse=True)


def test_a_resumed_run_shows_what_an_uninterrupted_one_does(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    whole = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    for entries in (len(whole) // 3, len(whole) // 2, len(whole)):  # each by a driver of its own
        (run / JOURNAL).write_bytes(b"".join(whole[:entries]))
        boards(run).show()
    boards(tmp_path / "other").show()
    for folder in ("ethanol-nequip.adamw", "ethanol-allegro.soap"):
        resumed, other = (events(path / TENSORBOARD / ARMS / folder) for path in (run, tmp_path / "other"))
        tags = other.Tags()["scalars"]
        assert len(tags) == 5
        assert {tag: curve(resumed, tag) for tag in tags} == {tag: curve(other, tag) for tag in tags}


def test_an_open_tensorboard_follows(run: Path) -> None:
    whole = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    (run / JOURNAL).write_bytes(b"".join(whole[: len(whole) // 8]))
    shown = boards(run)
    shown.show()
    open_board = events(run / TENSORBOARD / ARMS / "ethanol-nequip.adamw")
    before = curve(open_board, "ethanol-nequip/survivors_by_step")
    (run / JOURNAL).write_bytes(b"".join(whole))
    shown.show()
    open_board.Reload()
    assert before[-1][0] == curve(open_board, "ethanol-nequip/survivors_by_step")[-1][0] == HORIZON
    assert before != curve(open_board, "ethanol-nequip/survivors_by_step") == [(0, 6.0), (HORIZON, 3.0)]


def test_files_that_were_read_are_deleted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms, now = plan_arms(load_run(run)), time.time()
    for minute in range(4):
        monkeypatch.setattr("tunebench.engine.board.time.time", lambda minute=minute: now + 61 * minute)
        write_arm_boards(run, arms)
    assert len(list((run / TENSORBOARD / ARMS).glob("events.*"))) <= 4
    monkeypatch.setattr("tunebench.engine.board.time.time", lambda: now + 3600)
    write_arm_boards(run, arms)
    assert len(list((run / TENSORBOARD / ARMS).glob("events.*"))) == 1


def test_nothing_is_written_between_two_looks_or_where_nothing_is_new(run: Path) -> None:
    shown = boards(run)
    shown.show_when_due()
    files = sorted((run / TENSORBOARD / ARMS).rglob("events.*"))
    assert files
    shown.show_when_due()
    shown.show()
    assert sorted((run / TENSORBOARD / ARMS).rglob("events.*")) == files


def test_a_board_that_cannot_be_written_costs_one_line_and_comes_back(run: Path) -> None:
    (run / TENSORBOARD).write_text("in the way")
    output = io.StringIO()
    shown = boards(run, output)
    shown.show()
    shown.show()
    (line,) = output.getvalue().splitlines()
    assert line.startswith("warning: the arms' TensorBoard is not up to date: ")
    (run / TENSORBOARD).unlink()
    shown.show()
    assert (run / TENSORBOARD / ARMS).is_dir()
    assert not list(run.glob(".building-*"))


def test_a_journal_that_cannot_be_read_costs_one_line(run: Path) -> None:
    (run / JOURNAL).write_bytes(b'{"op_code": 4}\nno json\n')
    output = io.StringIO()
    boards(run, output).show()
    assert len(output.getvalue().splitlines()) == 1
