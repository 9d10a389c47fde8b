from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms

from tunebench.study.installed import shipped_folder
from tunebench.study.paths import frames_of_file
from tunebench.study.spec import ExtxyzData, ExtxyzKeys, SplitFrames
from tunebench.study.strict_yaml import read_yaml
from tunebench.workloads.data import prepare
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.extxyz import extxyz_frames, identity
from tunebench.workloads.structure_files import CONFIG_TYPE, file_hash, read_labelled

COUNTS = {"train": 8, "val": 4, "test": 4, "ood": 0}


def drawn(base: Path, counts: dict[str, int] | None = None, **fields: object) -> dict[str, list[float]]:
    frames = SplitFrames(**{**COUNTS, **(counts or {})})
    data = ExtxyzData(**{"source": "extxyz", "train": "ethanol.xyz", "frames": frames, **fields})
    splits = extxyz_frames(data, base, lambda line: None)
    return {name: [frame.get_potential_energy() for frame in splits[name]] for name in splits}


@pytest.fixture
def base(ethanol_file: Path) -> Path:
    return ethanol_file.parent


def test_splits_of_one_file_are_disjoint(base: Path) -> None:
    energies = drawn(base)
    assert [len(energies[split]) for split in ("train", "val", "test")] == [8, 4, 4]
    assert len({energy for split in energies.values() for energy in split}) == 16


def test_the_draw_follows_the_seed(base: Path) -> None:
    assert drawn(base, seed=1) == drawn(base, seed=1)
    assert drawn(base, seed=1) != drawn(base, seed=2)


def test_more_training_frames_contain_the_fewer_and_leave_the_other_splits_alone(base: Path) -> None:
    few, many = drawn(base, {"train": 3}), drawn(base, {"train": 12})
    assert set(few["train"]) < set(many["train"])
    assert (few["val"], few["test"]) == (many["val"], many["test"])


def test_a_test_file_of_its_own_is_used(base: Path, rattled) -> None:
    own = rattled("CH3CH2OH", 5, seed=9)
    ase.io.write(base / "own.xyz", own, format="extxyz")
    energies = drawn(base, {"train": 16, "test": 5}, test="own.xyz")
    assert set(energies["test"]) <= {frame.get_potential_energy() for frame in own}


def test_ood_files_become_splits_by_name(base: Path, rattled) -> None:
    ase.io.write(base / "far.xyz", rattled("CH3OH", 6, seed=2), format="extxyz")
    energies = drawn(base, {"ood": 5}, ood={"far": "far.xyz"})
    assert list(energies) == ["train", "val", "test", "ood:far"]
    assert len(energies["ood:far"]) == 5


def test_ood_files_without_frames_asked_are_a_mistake(base: Path) -> None:
    with pytest.raises(WorkloadError, match=r"^data\.frames\.ood: found 0"):
        drawn(base, ood={"far": "ethanol.xyz"})


@pytest.mark.parametrize(("split", "counts"), [("train", {"train": 13}), ("val", {"val": 17}), ("test", {"test": 21})])
def test_more_frames_than_the_file_has_names_the_split(base: Path, split: str, counts: dict[str, int]) -> None:
    with pytest.raises(WorkloadError, match=rf"^data\.frames\.{split}: found \d+, .*ethanol\.xyz has 20"):
        drawn(base, counts)


def test_splits_take_slices_of_one_file(base: Path) -> None:
    all_of_them = [frame.get_potential_energy() for frame in ase.io.read(base / "ethanol.xyz", ":")]
    energies = drawn(
        base,
        {"train": 5, "val": 3, "test": 4, "ood": 1},
        train="ethanol.xyz@:8",
        test="ethanol.xyz@8:16:2",
        ood={"last": "ethanol.xyz@-1", "odd": "ethanol.xyz@9:16:2"},
    )
    assert {*energies["train"], *energies["val"]} == set(all_of_them[:8])
    assert set(energies["test"]) == set(all_of_them[8:16:2])
    assert energies["ood:last"] == all_of_them[-1:]
    assert set(energies["ood:odd"]) < set(all_of_them[9:16:2])


def test_a_slice_is_drawn_from_as_a_file_that_holds_it(base: Path) -> None:
    ase.io.write(base / "some.xyz", ase.io.read(base / "ethanol.xyz", "1:18"), format="extxyz")
    assert drawn(base, train="ethanol.xyz@1:18") == drawn(base, train="some.xyz")


def test_more_frames_than_a_slice_has_names_file_slice_and_what_it_has(base: Path) -> None:
    allowed = r"at most 2: ethanol\.xyz@::2 has 10, of which 8 already serve other splits"
    with pytest.raises(WorkloadError, match=rf"^data\.frames\.train: found 8, allowed: {allowed}$"):
        drawn(base, train="ethanol.xyz@::2")


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize(
    ("key", "files"),
    [
        ("test", {"train": "ethanol.xyz@:15", "test": "ethanol.xyz@14:"}),
        ("val", {"train": "ethanol.xyz", "val": "ethanol.xyz@14"}),
        ("test", {"train": "ethanol.xyz@:14", "test": "../{folder}/ethanol.xyz"}),
        ("test", {"train": "ethanol.xyz@::2", "test": "ethanol.xyz@-4:"}),
    ],
)
def test_slices_of_one_file_that_overlap_are_refused_whatever_is_allowed(
    base: Path, key: str, files: dict[str, str], allowed: bool
) -> None:
    named = {name: text.format(folder=base.name) for name, text in files.items()}
    with pytest.raises(
        WorkloadError, match=rf"^data\.{key}: found 'ethanol.* of data\.train, .*`allow_duplicates` too$"
    ):
        drawn(base, {"train": 1, "val": 1, "test": 1}, allow_duplicates=allowed, **named)


def test_slices_out_of_distribution_are_apart_too(base: Path) -> None:
    found = r"ethanol\.xyz@17: with 1 of the frames of data\.ood\.a, ethanol\.xyz@14:18, such as frame 17"
    with pytest.raises(WorkloadError, match=rf"^data\.ood\.b: found '{found}'"):
        drawn(
            base,
            {"train": 4, "ood": 1},
            train="ethanol.xyz@:14",
            ood={"a": "ethanol.xyz@14:18", "b": "ethanol.xyz@17:"},
        )


def test_equal_frames_in_slices_apart_are_a_leak_unless_they_are_allowed(base: Path) -> None:
    frames = ase.io.read(base / "ethanol.xyz", ":12")
    ase.io.write(base / "twice.xyz", [*frames, *frames], format="extxyz")
    data = ExtxyzData(
        source="extxyz",
        train="twice.xyz@:12",
        test="twice.xyz@12:",
        frames=SplitFrames(train=8, val=4, test=12),
    )
    with pytest.raises(WorkloadError, match=r"^data: found '8 of 8 train frames among the test frames"):
        prepare(data, base=base, cache=base / "cache")
    assert prepare(data.model_copy(update={"allow_duplicates": True}), base=base, cache=base / "cache")


def test_environment_variables_are_filled_in(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DATA", str(base))
    assert drawn(Path("/nowhere"), train="${MY_DATA}/ethanol.xyz") == drawn(base)
    monkeypatch.delenv("MY_DATA")
    with pytest.raises(WorkloadError, match=r"^data\.train: found .*, allowed: a set environment variable MY_DATA$"):
        drawn(base, train="${MY_DATA}/ethanol.xyz")


@pytest.mark.parametrize("key", ["train", "val", "test", "ood.far"])
def test_a_missing_file_is_named_with_its_key(base: Path, key: str) -> None:
    named = {"ood": {"far": "gone.xyz"}} if key == "ood.far" else {key: "gone.xyz"}
    frames = SplitFrames(**{**COUNTS, "ood": 1})
    data = ExtxyzData(**{"source": "extxyz", "train": "ethanol.xyz", "frames": frames, **named})
    for use in (lambda: identity(data, base), lambda: extxyz_frames(data, base, lambda line: None)):
        with pytest.raises(WorkloadError, match=rf"^data\.{key}: found 'gone\.xyz', allowed: an existing file; "):
            use()


@pytest.mark.parametrize("part", ["a:b", "1:2:3:4", "::0", "", "1.5"])
def test_a_malformed_slice_is_refused_with_its_key(base: Path, part: str) -> None:
    data = ExtxyzData(source="extxyz", train=f"ethanol.xyz@{part}", frames=SplitFrames(**COUNTS))
    for use in (lambda: identity(data, base), lambda: extxyz_frames(data, base, lambda line: None)):
        with pytest.raises(WorkloadError, match=r"^data\.train: found 'ethanol\.xyz@.*may follow the '@'$"):
            use()


def test_a_frame_keeps_what_the_named_key_says_it_is_and_may_say_nothing(base: Path, rattled) -> None:
    frames = rattled("CH3OH", 6, seed=3)
    for index, frame in enumerate(frames[:4]):
        frame.info["kind"] = f"at {300 * (index % 2 + 1)} K"
    ase.io.write(base / "kinds.xyz", frames, format="extxyz")
    counts = SplitFrames(train=8, val=4, test=4, ood=6)
    data = ExtxyzData(
        source="extxyz",
        train="ethanol.xyz",
        ood={"far": "kinds.xyz"},
        frames=counts,
        keys=ExtxyzKeys(config_type="kind"),
    )
    prepared = prepare(data, base=base, cache=base / "cache")
    assert sorted(prepared.splits["ood:far"].config_types) == ["", "", "at 300 K", "at 300 K", "at 600 K", "at 600 K"]
    assert prepared.splits["train"].config_types == ()


def test_a_key_of_configuration_types_that_no_frame_has_is_a_mistake(base: Path) -> None:
    with pytest.raises(WorkloadError, match=r"^data\.keys\.config_type: found 'kid', allowed: a key of the info"):
        drawn(base, keys=ExtxyzKeys(config_type="kid"))


def test_data_without_configuration_types_are_identified_as_before_there_were_any(base: Path) -> None:
    data = ExtxyzData(source="extxyz", train="ethanol.xyz", frames=SplitFrames(**COUNTS))
    assert "config_type" not in identity(data, base)["data"]["keys"]


def test_data_without_slices_are_identified_as_before_there_were_any(base: Path) -> None:
    """A study's prepared data are found by this; the text is what the version without slices made of it."""
    (base / "ethanol.xyz").write_text("known\n")
    data = ExtxyzData(source="extxyz", train="ethanol.xyz", ood={"far": "ethanol.xyz"}, frames=SplitFrames(**COUNTS))
    known = file_hash(base / "ethanol.xyz")
    assert identity(data, base)["data"] == {
        "source": "extxyz",
        "train": known,
        "val": None,
        "test": None,
        "ood": {"far": known},
        "frames": COUNTS,
        "keys": {"energy": "energy", "forces": "forces", "stress": "stress"},
        "allow_duplicates": False,
        "seed": 0,
    }


def test_a_slice_is_identified_by_the_files_content_and_itself_wherever_the_file_lies(base: Path) -> None:
    content = file_hash(base / "ethanol.xyz")
    parts = {"train": "ethanol.xyz@:12", "val": "ethanol.xyz@12:16", "test": "ethanol.xyz@16:", "ood": {}}
    data = ExtxyzData(**{"source": "extxyz", "frames": SplitFrames(**COUNTS), **parts})
    found = identity(data, base)["data"]
    assert [found[key] for key in ("train", "val", "test")] == [f"{content}@{part}" for part in (":12", "12:16", "16:")]
    (base / "elsewhere").mkdir()
    (base / "ethanol.xyz").rename(base / "elsewhere" / "ethanol.xyz")
    assert identity(data, base / "elsewhere")["data"] == found


@pytest.mark.data
def test_the_slices_of_solid_and_melt_hold_what_their_names_say(
    reference_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEBENCH_DATA", str(reference_data))
    (cold, melt) = (w["data"] for w in read_yaml(shipped_folder("studies") / "solid-and-melt.yaml")["workloads"])
    assert (cold["train"], cold["ood"]["melt"]) == (melt["ood"]["cold"], melt["train"])
    slices = {"cold": cold["train"], **cold["ood"]}
    frames = {
        name: list(read_labelled(frames_of_file(text, Path()), ExtxyzKeys(config_type="config_type"), name).values())
        for name, text in slices.items()
    }
    sizes = {name: (len(part), {len(frame) for frame in part}) for name, part in frames.items()}
    assert sizes == {
        "cold": (35, {54}),
        "hot": (37, {54}),
        "melt": (36, {54}),
        "vacancy": (21, {53}),
        "strained": (54, {54}),
    }
    kinds = {name: {frame.info[CONFIG_TYPE] for frame in part} for name, part in frames.items()}
    assert kinds.pop("vacancy") == {"Vacancy"}
    assert kinds.pop("strained") == {"Elastic"}
    assert set.union(*kinds.values()) == {"AIMD-NVT"}
    order = {name: [bcc_order(frame) for frame in frames[name]] for name in kinds}
    assert min(order["cold"]) > 0.98
    assert 0.8 < min(order["hot"]) < max(order["hot"]) < 0.92
    assert max(order["melt"]) < 0.3


def bcc_order(frame: Atoms) -> float:
    """Mean modulus of the structure factor at the six 110 reflections of a 3x3x3 cell; 1 for a perfect crystal."""
    reflections = np.array([(3, 3, 0), (3, -3, 0), (3, 0, 3), (3, 0, -3), (0, 3, 3), (0, 3, -3)])
    waves = np.exp(2j * np.pi * frame.get_scaled_positions() @ reflections.T)
    return float(np.abs(waves.mean(axis=0)).mean())
