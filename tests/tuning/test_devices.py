from __future__ import annotations

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from tunebench.study.spec import Resources
from tunebench.tuning.devices import devices_of, kind_here, kind_of_node, most_frequent_first, share_of_kind
from tunebench.tuning.shares import Shares, trial_resources


@pytest.mark.parametrize(
    ("resources", "kind", "cpus", "expected"),
    [
        ({"CPU": 8.0, "GPU": 2.0}, "cuda", 1, [(1, 1, 4), (1, 1, 4)]),
        ({"CPU": 1.0, "GPU": 2.0}, "cuda", 1, [(0, 1, 1), (0, 1, 1)]),
        ({"CPU": 8.0}, "cuda", 1, []),
        ({"CPU": 8.0, "GPU": 2.0}, "cpu", 3, [(3, 0, 3), (3, 0, 3)]),
        ({"CPU": 2.0}, "cpu", 4, []),
        ({"memory": 1e9}, "cpu", 1, []),
    ],
)
def test_devices_are_gpus_or_cores(
    resources: dict[str, float], kind: str, cpus: int, expected: list[tuple[int, int, int]]
) -> None:
    found = devices_of("node", resources, kind, cpus)
    assert [(device.cpus, device.gpus, device.threads) for device in found] == expected
    assert len(set(found)) == len(found)


def test_all_devices_of_a_node_are_of_the_kind_that_ray_names() -> None:
    node = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H200": 1.0}
    assert [device.kind for device in devices_of("node", node, "cuda", 1)] == ["H200", "H200"]


@pytest.mark.parametrize(
    ("node", "device", "kind"),
    [
        ({"GPU": 1.0, "accelerator_type:H200": 1.0}, "cuda", "H200"),
        ({"GPU": 1.0}, "cuda", ""),
        ({"CPU": 4.0, "GPU": 1.0, "accelerator_type:H200": 1.0}, "cpu", ""),
        ({"CPU": 4.0, "accelerator_type:EPYC-9654": 1.0}, "cpu", "EPYC-9654"),
        ({"GPU": 1.0, "accelerator_type:b": 1.0, "accelerator_type:a": 1.0}, "cuda", "a+b"),
    ],
)
def test_what_ray_says_of_a_node_with_gpus_is_about_those(node: dict[str, float], device: str, kind: str) -> None:
    assert kind_of_node(node, device) == kind


def test_a_machine_names_its_gpus_as_ray_would_and_its_cores_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_accelerator_type", lambda: "H200")
    assert (kind_here("cuda"), kind_here("cpu")) == ("H200", None)
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_accelerator_type", lambda: None)
    assert kind_here("cuda") is None


def test_the_kind_of_which_there_are_most_comes_first_and_equals_by_name() -> None:
    assert most_frequent_first(["L4", "H200", "L4", "B200"]) == ["L4", "B200", "H200"]
    assert most_frequent_first([]) == []


def test_who_asks_for_a_kind_asks_for_a_little_of_what_only_its_nodes_have() -> None:
    assert share_of_kind("H200") == {"accelerator_type:H200": 0.001}
    assert share_of_kind("a+b") == {"accelerator_type:a": 0.001, "accelerator_type:b": 0.001}
    assert share_of_kind("") == {}


def test_a_trial_that_trains_alone_asks_for_its_kind_and_a_tenant_for_none() -> None:
    shares = Shares(trial_resources(Resources(gpus_per_trial=0.5)), {"bound": "H200", "free": ""})
    asked = {name: shares({"trial": name}).bundles[0] for name in ("bound", "free", "tenant")}
    assert asked["bound"] == {"CPU": 1.0, "GPU": 0.5, "accelerator_type:H200": 0.001}
    assert asked["free"] == {"CPU": 1.0, "GPU": 0.5}
    assert asked["tenant"].keys() == {"memory"}
