"""Milliseconds, kernels and memory of one optimizer step on NequIP and Allegro, ours beside the reference libraries.

Three kinds of step: `plain` never refreshes a preconditioner, `refresh` does at every step, `mean` at every tenth, as
trained. All contenders of a model are timed in one run, in turns, on the same gradients, and each is divided by
fused AdamW's mean step. Ours runs as it is and, on CUDA, as a captured graph (`capture=True`).

- nequip's MuonWithAuxAdam with nequip's and allegro's own grouping;
- pytorch_optimizer's SOAP on the stored tensors, and on one parameter per block of our view (u, v, w blocks with three
  axes), so that it treats the same weights.

    python benchmarks/optimizer_cost.py [--device cuda] [--models nequip-large ...] [--out DIR]
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from allegro.model import MuonParamGroups as AllegroGroups
from nequip.model import MuonParamGroups as NequIPGroups
from nequip.train import MuonWithAuxAdam
from pytorch_optimizer import SOAP as LibrarySOAP
from torch.utils._python_dispatch import TorchDispatchMode

from tunebench import optim
from tunebench.optim.matrix_view import FctpView, matrix_view, trainable_parameters
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Family, Model
from tunebench.workloads.models import build_model, model_config
from tunebench.workloads.statistics import TrainingStatistics

mpl.use("Agg")
from matplotlib import pyplot as plt

TYPES = ("H", "C", "N", "O")
NEVER = 10**9
PERIODS = {"plain": NEVER, "refresh": 1, "mean": 10}

MODELS: dict[str, tuple[Family, dict[str, Any]]] = {
    "nequip-small": (Family.NEQUIP, {"num_layers": 3, "l_max": 1, "num_features": 32, "parity": False}),
    "nequip-large": (Family.NEQUIP, {"num_layers": 4, "l_max": 2, "num_features": [64, 32, 32], "parity": False}),
    "allegro": (Family.ALLEGRO, {"num_layers": 2, "l_max": 2, "num_scalar_features": 64, "num_tensor_features": 32}),
}
"""Sizes: NequIP with l_max 1, 32 features, 3 layers; with 64/32/32 features and 4 layers; Allegro with 64/32."""


@dataclass(frozen=True)
class Contender:
    """An optimizer: its name, whether it has a refresh, and how it is built for a model and a period of refreshes."""

    name: str
    refreshes: bool
    build: Callable[[torch.nn.Module, int], torch.optim.Optimizer]


@dataclass(frozen=True)
class Cost:
    """What one contender costs on one model.

    Attributes:
        plain_ms, refresh_ms, mean_ms: medians, milliseconds per step; those without a refresh have one kind of step.
        over_adamw: mean step over that of fused AdamW.
        kernels_plain, kernels_refresh: kernels launched per step (on the CPU: operations that are no views).
        state_mib: memory of the optimizer's state.
        share: of the weights, treated by the matrix rule.
    """

    model: str
    contender: str
    plain_ms: float
    refresh_ms: float
    mean_ms: float
    over_adamw: float
    kernels_plain: int
    kernels_refresh: int
    state_mib: float
    share: float


def make_model(name: str, device: torch.device) -> torch.nn.Module:
    """A model in float32 for four chemical species, with random gradients."""
    family, arguments = MODELS[name]
    nothing_known = TrainingStatistics(
        per_type_energy_shifts=(0.0,) * len(TYPES),
        degenerate=False,
        force_rms=1.0,
        avg_num_neighbors=11.0,
        labelled_frames=1,
        note="",
    )
    spec = Model(family=family, preset="small", r_max_angstrom=5.0, arguments=arguments)
    model = build_model(model_config(spec, TYPES, nothing_known, seed=1)).to(device)
    set_gradients(trainable_parameters(model).values())
    return model


def set_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Random gradients of RMS 1e-3, the same at every call."""
    generator = torch.Generator().manual_seed(named_seed(0, "optimizer_cost gradients"))
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 1e-3
        parameter.grad = noise.to(parameter.device, parameter.dtype)


def nequip_muon(model: torch.nn.Module, _: int) -> torch.optim.Optimizer:
    """NequIP's Muon, grouped by the model's own library."""
    own = any(type(module).__name__.startswith("Allegro") for module in model.modules())
    groups = (AllegroGroups if own else NequIPGroups)(model, muon={"lr": 1e-3}, adam={"lr": 1e-3})
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam([group for group in groups if group["params"]])
    return optimizer


def library_soap(model: torch.nn.Module, period: int) -> torch.optim.Optimizer:
    """pytorch_optimizer's SOAP on the tensors as stored."""
    return LibrarySOAP(list(trainable_parameters(model).values()), lr=1e-3, precondition_frequency=period)


def library_soap_on_views(model: torch.nn.Module, period: int) -> torch.optim.Optimizer:
    """pytorch_optimizer's SOAP on one parameter per block of the per-type view."""
    tensors = trainable_parameters(model)
    blocks = [
        torch.nn.Parameter(
            tensors[b.parameter].detach().flatten()[b.index().to(tensors[b.parameter].device)].reshape(s)
        )
        for b in matrix_view(model, fctp_view=FctpView.PER_TYPE)
        for s in [b.matrices if b.matrices[0] > 1 else b.matrices[1:] if b.is_matrix else (b.numel,)]
    ]
    set_gradients(blocks)
    return LibrarySOAP(blocks, lr=1e-3, precondition_frequency=period)


def ours(kind: str, view: FctpView, *, capture: bool) -> Callable[[torch.nn.Module, int], torch.optim.Optimizer]:
    """One of tunebench's matrix optimizers."""

    def build(model: torch.nn.Module, period: int) -> torch.optim.Optimizer:
        groups = optim.matrix_groups(model, fctp_view=view)
        settings = {"lr": 1e-3, "capture": capture}
        if kind != "Muon":
            settings |= {"precondition_frequency": period}
        optimizer: torch.optim.Optimizer = getattr(optim, kind)(groups, **settings)
        return optimizer

    return build


def our_adamw(model: torch.nn.Module, _: int, *, capture: bool) -> torch.optim.Optimizer:
    """Tunebench's AdamW."""
    return optim.AdamW(trainable_parameters(model).values(), lr=1e-3, capture=capture)


def fused_adamw(model: torch.nn.Module, _: int) -> torch.optim.Optimizer:
    """Torch's AdamW, one kernel for all tensors."""
    return torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-3, fused=True)


def contenders(device: torch.device) -> list[Contender]:
    """All of a device; graphs only on CUDA."""
    found = [
        Contender(FUSED, False, fused_adamw),
        Contender("nequip MuonWithAuxAdam", False, nequip_muon),
        Contender("pytorch_optimizer SOAP, stored tensors", True, library_soap),
        Contender(LIBRARY_ON_VIEWS, True, library_soap_on_views),
    ]
    for capture in (False, True) if device.type == "cuda" else (False,):
        how = ", graph" if capture else ""
        found.append(Contender(f"AdamW{how}", False, functools.partial(our_adamw, capture=capture)))
        found += [
            Contender(f"Muon {view}{how}", False, ours("Muon", view, capture=capture))
            for view in (FctpView.MERGED, FctpView.PER_TYPE)
        ]
        found += [
            Contender(f"{kind} per_type{how}", True, ours(kind, FctpView.PER_TYPE, capture=capture))
            for kind in ("SOAP", "SOAPMuon")
        ]
    return found


# Graphs are captured at the second step of their kind, and a refresh comes every tenth.
_WARM_UP = {"plain": 4, "refresh": 4, "mean": 24}
FUSED = "torch AdamW fused"
LIBRARY_ON_VIEWS = "pytorch_optimizer SOAP, our views"


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that write memory of their own."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def kernels(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Kernels that one step launches."""
    if device.type == "cpu":
        with _Operations() as operations:  # type: ignore[no-untyped-call]
            optimizer.step()
        return int(operations.count)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events() or ())


def milliseconds(optimizer: torch.optim.Optimizer, steps: int, device: torch.device) -> float:
    """Wall time per step over so many steps."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    _wait(device)
    return (time.perf_counter() - began) / steps * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def state_mib(optimizer: torch.optim.Optimizer) -> float:
    """Memory of the state's tensors, MiB."""
    return sum(tensor.nbytes for tensor in _tensors(optimizer.state_dict()["state"])) / 2**20


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def matrix_share(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Share of the weights that the optimizer treats as matrices."""
    total = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    if isinstance(optimizer, MuonWithAuxAdam):
        found = [p for group in optimizer.param_groups if group["use_muon"] for p in group["params"]]
    elif isinstance(optimizer, LibrarySOAP):
        found = [p for group in optimizer.param_groups for p in group["params"] if p.ndim > 1]
    elif isinstance(optimizer, optim.Muon | optim.SOAP):
        return float(sum(block.numel for block in optimizer.packing_of(0).blocks if block.is_matrix) / total)
    else:
        found = []
    return float(sum(parameter.numel() for parameter in found) / total)


def measure(name: str, device: torch.device, rounds: int, steps: int) -> list[Cost]:
    """All contenders on one model; rounds alternate between them, so that a slow moment hits all."""
    built: dict[tuple[str, str], torch.optim.Optimizer] = {}
    shares: dict[str, float] = {}
    for contender in contenders(device):
        for kind, period in PERIODS.items() if contender.refreshes else (("mean", NEVER),):
            model = make_model(name, device)
            optimizer = built[contender.name, kind] = contender.build(model, period)
            shares[contender.name] = matrix_share(model, optimizer)
            for _ in range(_WARM_UP[kind]):
                optimizer.step()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in built}
    for _ in range(rounds):
        for key, optimizer in built.items():
            times[key].append(milliseconds(optimizer, steps, device))
    found = {key: statistics.median(values) for key, values in times.items()}
    counts = {key: kernels(optimizer, device) for key, optimizer in built.items()}
    fused = found[FUSED, "mean"]
    costs = []
    for contender in contenders(device):
        at = {kind: (contender.name, kind if contender.refreshes else "mean") for kind in PERIODS}
        costs.append(
            Cost(
                model=name,
                contender=contender.name,
                plain_ms=found[at["plain"]],
                refresh_ms=found[at["refresh"]],
                mean_ms=found[at["mean"]],
                over_adamw=found[at["mean"]] / fused,
                kernels_plain=counts[at["plain"]],
                kernels_refresh=counts[at["refresh"]],
                state_mib=state_mib(built[at["mean"]]),
                share=shares[contender.name],
            )
        )
    return costs


def ratios(costs: Sequence[Cost]) -> list[str]:
    """The comparisons that the benchmark exists for, a line each."""
    lines = []
    for model in dict.fromkeys(cost.model for cost in costs):
        mean = {cost.contender: cost.mean_ms for cost in costs if cost.model == model}
        share = {cost.contender: cost.share for cost in costs if cost.model == model}
        how = ", graph" if "SOAP per_type, graph" in mean else ""
        for mine, other in (
            (f"SOAP per_type{how}", LIBRARY_ON_VIEWS),
            (f"Muon merged{how}", "nequip MuonWithAuxAdam"),
        ):
            lines.append(
                f"{model}: {other} / {mine} = {mean[other]:.3f} / {mean[mine]:.3f} ms = {mean[other] / mean[mine]:.1f}"
                f" (matrices: {share[other]:.1%} and {share[mine]:.1%} of the weights)"
            )
    return lines


def table(costs: Sequence[Cost]) -> str:
    """Markdown."""
    head = "| model | optimizer | plain ms | refresh ms | mean ms | / fused AdamW | kernels | at refresh | state MiB |"
    lines = [head + " matrices |", "|---|---|" + "---:|" * 8]
    for c in costs:
        times = f"{c.plain_ms:.3f} | {c.refresh_ms:.3f} | {c.mean_ms:.3f} | {c.over_adamw:.1f}"
        rest = f"{c.kernels_plain} | {c.kernels_refresh} | {c.state_mib:.1f} | {c.share:.1%}"
        lines.append(f"| {c.model} | {c.contender} | {times} | {rest} |")
    return "\n".join(lines)


def draw(costs: Sequence[Cost], title: str, path: Path) -> None:
    """Mean milliseconds per step on a logarithmic axis, a panel per model."""
    models = list(dict.fromkeys(cost.model for cost in costs))
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 5.0), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        shown = [cost for cost in costs if cost.model == model][::-1]
        colours = ["#0072b2" if cost.contender.endswith("graph") else "#999999" for cost in shown]
        axis.barh([cost.contender for cost in shown], [cost.mean_ms for cost in shown], color=colours)
        for row, cost in enumerate(shown):
            axis.text(cost.mean_ms, row, f" {cost.mean_ms:.2g}", va="center", fontsize=8)
        axis.set(xscale="log", title=model, xlabel="ms per step (refresh at every tenth)")
        axis.margins(x=0.25)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print the table and the ratios, and with --out write them beside a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5, help="timings per contender, the median counts")
    parser.add_argument("--steps", type=int, default=20, help="steps per timing; a multiple of ten")
    parser.add_argument("--out", type=Path, help="folder for optimizer-cost.{md,csv,png}")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    title = f"{where}, torch {torch.__version__}, float32, median of {arguments.rounds} x {arguments.steps} steps"
    costs = [c for name in arguments.models for c in measure(name, device, arguments.rounds, arguments.steps)]
    text = "\n\n".join((title, table(costs), "\n".join(ratios(costs))))
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "optimizer-cost.md").write_text(text + "\n")
        with (arguments.out / "optimizer-cost.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(costs[0])))
            writer.writeheader()
            writer.writerows(asdict(cost) for cost in costs)
        draw(costs, title, arguments.out / "optimizer-cost.png")


if __name__ == "__main__":
    main()
