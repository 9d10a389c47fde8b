"""The study file: one frozen pydantic model per YAML section.

A study is read, checked and hashed before anything runs. Units stand in the key names.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from tunebench.study.initial import Initial
from tunebench.study.section import INTEGER_LIMIT, RULE_PATTERN, Fraction
from tunebench.study.section import Name as Name
from tunebench.study.section import NonNegativeFloat as NonNegativeFloat
from tunebench.study.section import NonNegativeInt as NonNegativeInt
from tunebench.study.section import PositiveFloat as PositiveFloat
from tunebench.study.section import PositiveInt as PositiveInt
from tunebench.study.section import Section as Section

WATER_BOX = "water-box"


class SplitFrames(Section):
    """How many frames each split holds; ``ood`` counts every out-of-distribution split alike."""

    train: PositiveInt = Field(description="training frames")
    val: PositiveInt = Field(description="validation frames, for stopping and selection")
    test: PositiveInt = Field(description="test frames, read once by the confirm stage")
    ood: NonNegativeInt = Field(default=0, description="frames of each out-of-distribution split")


class XtbData(Section):
    """Molecular-dynamics snapshots labelled by GFN2-xTB through tblite; every split has its own trajectory."""

    source: Literal["xtb"] = Field(description="labels made on this machine by GFN2-xTB")
    system: str = Field(description="a molecule (ethanol, benzene ..., or a name of ASE's G2 set) or `water-box`")
    molecules: PositiveInt = Field(default=8, description="water molecules in the periodic box; `water-box` only")
    density_g_cm3: PositiveFloat = Field(default=0.997, description="density of the box; `water-box` only")
    temperature_kelvin: PositiveFloat = Field(default=300.0, description="temperature of train, val and test")
    ood_temperature_kelvin: PositiveFloat | None = Field(default=None, description="temperature of the `hot` split")
    timestep_fs: PositiveFloat = Field(default=0.5, description="integration step of the Langevin dynamics")
    equilibration_fs: NonNegativeFloat = Field(default=250.0, description="discarded start of each trajectory")
    interval_fs: PositiveFloat = Field(default=20.0, description="time between two snapshots")
    frames: SplitFrames = Field(description="frames per split")
    seed: NonNegativeInt = Field(
        default=0, description="seed of the trajectories; not the study's, so studies share data"
    )


class XtbMixtureData(Section):
    """Snapshots of several molecules, labelled by GFN2-xTB; every molecule and every split has its own trajectory."""

    source: Literal["xtb-mixture"] = Field(description="labels made on this machine by GFN2-xTB")
    systems: Annotated[tuple[str, ...], Field(min_length=2, strict=False)] = Field(
        description="molecules, each once (ethanol, benzene ..., or names of ASE's G2 set)"
    )
    temperature_kelvin: PositiveFloat = Field(default=300.0, description="temperature of all splits")
    timestep_fs: PositiveFloat = Field(default=0.5, description="integration step of the Langevin dynamics")
    equilibration_fs: NonNegativeFloat = Field(default=250.0, description="discarded start of each trajectory")
    interval_fs: PositiveFloat = Field(default=20.0, description="time between two snapshots")
    frames: SplitFrames = Field(description="frames per split, shared evenly among the molecules; no `ood`")
    seed: NonNegativeInt = Field(default=0, description="seed of the trajectories; not the study's")


class ExtxyzKeys(Section):
    """Names under which the files keep their labels."""

    energy: str = Field(default="energy", description="total energy, eV")
    forces: str = Field(default="forces", description="forces, eV/Å")
    stress: str = Field(default="stress", description="stress, eV/Å³, positive under tension; ignored where absent")
    config_type: str | None = Field(
        default=None, description="what a frame is, a text of its info; errors at the end are told apart by it"
    )


class ExtxyzData(Section):
    """Any ASE-readable files, plain or compressed (.xz, .gz).

    `${VARIABLE}` in a path is taken from the environment; a relative path starts at the study file's folder. A path may
    end in ASE's slice, `FILE@START:STOP:STEP`, or in one index, `FILE@-1`: then it stands for these frames of the file.
    Slices of one file may not overlap.
    """

    source: Literal["extxyz"] = Field(description="files that ASE reads")
    train: str = Field(description="file with the training frames")
    val: str | None = Field(default=None, description="validation file; left out, validation is drawn from `train`")
    test: str | None = Field(default=None, description="test file; left out, the test split is drawn from `train`")
    ood: dict[Name, str] = Field(default_factory=dict, description="out-of-distribution files by name")
    frames: SplitFrames = Field(description="frames drawn for each split")
    keys: ExtxyzKeys = Field(default_factory=ExtxyzKeys, description="names of the labels in the files")
    allow_duplicates: bool = Field(default=False, description="accept frames that occur in two splits")
    seed: NonNegativeInt = Field(default=0, description="seed that draws the frames of each split")


class NequipData(Section):
    """Any NequIP DataModule by `_target_`, for example `nequip.data.datamodule.rMD17DataModule`."""

    source: Literal["nequip"] = Field(description="a NequIP DataModule")
    datamodule: dict[str, Any] = Field(description="NequIP's own `data` section; transforms are added by tunebench")
    ood: Annotated[tuple[Name, ...], Field(strict=False)] = Field(
        default=(), description="names of its second and later test sets"
    )
    allow_duplicates: bool = Field(default=False, description="accept frames that occur in two splits")


class Family(StrEnum):
    """Model families."""

    NEQUIP = "nequip"
    ALLEGRO = "allegro"


Data = Annotated[XtbData | XtbMixtureData | ExtxyzData | NequipData, Field(discriminator="source")]


class Model(Section):
    """A NequIP or Allegro model: a preset, overridden by any of the builder's own keyword arguments."""

    family: Annotated[Family, Field(strict=False, description="nequip or allegro")]
    preset: str = Field(
        default="tiny",
        description="tunebench's tiny, small, paper; for nequip also its own S, M, L, XL; with `init` that of its file",
    )
    r_max_angstrom: PositiveFloat = Field(default=5.0, description="cutoff")
    dtype: Literal["float32", "float64"] = Field(default="float32", description="model_dtype")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of NequIP's builder")


class Loss(Section):
    """Weights of the mean squared errors; normalised to sum 1 as NequIP does."""

    energy_per_atom: NonNegativeFloat = Field(default=1.0, description="weight of (eV/atom)²")
    forces: NonNegativeFloat = Field(default=1.0, description="weight of (eV/Å)²")
    stress: NonNegativeFloat = Field(default=0.0, description="weight of (eV/Å³)²; needs stress labels")


class Labels(Section):
    """Partial force supervision: every frame keeps its energy."""

    force_fraction: Fraction = Field(
        default=1.0, description="fraction of training and validation frames that keep their forces"
    )


class ScheduleKind(StrEnum):
    """Learning-rate schedules; all end at the horizon."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"


class Schedule(Section):
    """Learning rate as a factor on the trial's own learning rate, defined on the horizon."""

    kind: Annotated[ScheduleKind, Field(strict=False)] = Field(
        default=ScheduleKind.COSINE, description="shape of the decay"
    )
    warmup_fraction: Fraction = Field(default=0.05, description="linear warm-up, as a fraction of the horizon")
    decay_fraction: Fraction = Field(default=0.2, description="last part that decays; warmup_stable_decay only")
    final_factor: Fraction = Field(default=0.0, description="factor at the horizon; not with constant")


class Workload(Section):
    """What is trained: data, model, initial weights, loss, batch size, horizon and labels."""

    name: Name = Field(description="name of the workload in arms and plots")
    data: Data = Field(description="where the frames and their labels come from")
    model: Model = Field(description="what is trained")
    init: Initial | None = Field(
        default=None, description="a trained model to start from; left out, weights are drawn by the trial's seed"
    )
    loss: Loss = Field(default_factory=Loss, description="weights of the training loss")
    labels: Labels = Field(default_factory=Labels, description="partial force supervision")
    batch_size: PositiveInt = Field(default=5, description="frames per step; an incomplete last batch is dropped")
    max_steps: PositiveInt = Field(description="horizon: steps of a full run")
    evaluate_every_steps: PositiveInt | None = Field(
        default=None, description="steps between evaluations; left out, a twentieth of the horizon. Rungs are added"
    )
    evaluation_batch_size: PositiveInt = Field(default=32, description="frames per batch in evaluation")
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.999, description="decay of the averaged weights"
    )
    clip_global_norm: PositiveFloat | None = Field(default=None, description="gradient clipping, alike for every arm")


class Arm(Section):
    """An optimizer that takes part; a bare name stands for `{name: NAME}`."""

    name: Name = Field(description="a file of search_spaces/, or with `optimizer` any name")
    optimizer: Name | None = Field(
        default=None, description="a file of search_spaces/, for a second arm of an optimizer under another name"
    )
    untuned: bool = Field(
        default=False, description="one configuration with every default in place of a search: what tuning is worth"
    )
    budget: PositiveInt = Field(
        default=1, description="times `tune.trials_per_arm`; 2 for an audit whether a baseline was tuned well"
    )
    search_space: str | None = Field(
        default=None, description="path of another search-space file, relative to the study"
    )
    schedule: Schedule | None = Field(default=None, description="schedule of this optimizer in place of the study's")
    fixed: dict[str, Any] = Field(
        default_factory=dict, description="hyperparameters that are not searched, with their value"
    )

    @property
    def rule(self) -> str:
        """The optimizer whose search space and update rule it takes."""
        return self.optimizer or self.name


def _named_arm(value: object) -> object:
    if not isinstance(value, str | dict | Arm):
        raise ValueError("a name, or a mapping with a name")
    return {"name": value} if isinstance(value, str) else value


NamedArm = Annotated[Arm, BeforeValidator(_named_arm, json_schema_input_type=Arm | Name)]


class Objective(Section):
    """What selects: a weighted sum of validation errors (lower is better), in eV/atom, eV/Å and eV/Å³."""

    metric: Literal["mae", "rmse"] = Field(default="mae", description="error that is summed")
    energy_per_atom: NonNegativeFloat = Field(default=10.0, description="weight of the energy error per atom")
    forces: NonNegativeFloat = Field(default=1.0, description="weight of the force error")
    stress: NonNegativeFloat = Field(default=0.0, description="weight of the stress error")
    readout: Literal["raw", "averaged", "best"] = Field(
        default="best", description="weights that count: raw, averaged (EMA or schedule-free), or the better of both"
    )


class AshaForm(StrEnum):
    """What a trial does at a rung: wait until it is among the best, or be judged when it arrives."""

    PROMOTION = "promotion"
    STOPPING = "stopping"


class AshaOrder(StrEnum):
    """When a rung is decided: when all have come who can, or for each trial as soon as it may go on."""

    DETERMINISTIC = "deterministic"
    ASYNCHRONOUS = "asynchronous"


class Fidelity(StrEnum):
    """What a trial has done at a rung: the beginning of its schedule, or a complete schedule of the rung's length."""

    AUTO = "auto"
    TRUNCATE = "truncate"
    RESCALE = "rescale"

    def under(self, schedule: Schedule) -> Fidelity:
        """The fidelity of an arm: AUTO is TRUNCATE where the learning rate stays constant, else RESCALE."""
        if self is not Fidelity.AUTO:
            return self
        return Fidelity.TRUNCATE if schedule.kind is ScheduleKind.CONSTANT else Fidelity.RESCALE


def _sentinels(value: object) -> object:
    number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < INTEGER_LIMIT
    if value != "auto" and not number:
        raise ValueError("auto, or an integer of at least 0")
    return value


Sentinels = Annotated[
    Literal["auto"] | int, PlainValidator(_sentinels, json_schema_input_type=Literal["auto"] | NonNegativeInt)
]


class Asha(Section):
    """Successive halving inside each arm."""

    grace_steps: PositiveInt | None = Field(
        default=None, description="first rung; left out, a quarter of each workload's horizon"
    )
    reduction_factor: Annotated[int, Field(ge=2)] = Field(default=3, description="one in this many goes on at a rung")
    form: Annotated[AshaForm, Field(strict=False)] = Field(
        default=AshaForm.PROMOTION,
        description="promotion: a trial waits at its rung until it is among the best; stopping: it is judged when it "
        "arrives, by those who came before",
    )
    order: Annotated[AshaOrder, Field(strict=False)] = Field(
        default=AshaOrder.DETERMINISTIC,
        description="deterministic: a rung is decided when all who can come have come; asynchronous: at once, where "
        "one arm alone would leave devices idle",
    )
    fidelity: Annotated[Fidelity, Field(strict=False)] = Field(
        default=Fidelity.AUTO,
        description="rescale: each rung ends a complete schedule of its own length, and who goes on starts anew with a "
        "longer one; truncate: rungs cut one schedule; auto is truncate for arms whose schedule is constant, else "
        "rescale",
    )
    sentinels: Sentinels = Field(
        default="auto",
        description="configurations of each arm that are never stopped; auto is 15 % of them, at least 8, at most all",
    )


class Sampler(StrEnum):
    """How configurations are drawn; only SOBOL studies rank."""

    SOBOL = "sobol"
    TPE = "tpe"


class Tune(Section):
    """Tune stage: the search."""

    trials_per_arm: PositiveInt = Field(default=16, description="configurations of every arm")
    sampler: Annotated[Sampler, Field(strict=False)] = Field(
        default=Sampler.SOBOL, description="sobol, or tpe: exploratory and never ranked"
    )
    asha: Asha | None = Field(default_factory=Asha, description="early stopping; null runs every trial to the horizon")
    device_seconds_per_arm: PositiveFloat | None = Field(
        default=None,
        description="cap on what an arm's search costs, in steps times calibrated seconds of a step; an arm whose "
        "configurations may cost more has fewer of them",
    )


class Refinement(Section):
    """Second-order refinement: full-batch L-BFGS with a strong Wolfe line search, from the weights that count."""

    steps: PositiveInt = Field(default=100, description="L-BFGS iterations at most")
    history: PositiveInt = Field(default=20, description="earlier iterations that shape a direction")
    evaluate_every: PositiveInt = Field(default=5, description="iterations between two looks at the validation split")
    tolerance_gradient: NonNegativeFloat = Field(
        default=1e-8, description="converged at this largest gradient element of the loss over its first value"
    )
    tolerance_change: NonNegativeFloat = Field(
        default=1e-10, description="converged where an iteration lowers the loss over its first value by less"
    )
    dtype: Literal["float32", "float64"] = Field(default="float64", description="weights and arithmetic meanwhile")
    chunk_frames: PositiveInt = Field(default=32, description="frames that go through the model together")


class Confirm(Section):
    """Confirm stage: the best configurations, fresh seeds, full horizon, test split."""

    top_k: PositiveInt = Field(default=3, description="configurations of each arm that are run again")
    seeds: PositiveInt = Field(default=5, description="fresh seeds for each of them")
    refine: Refinement | None = Field(
        default=None,
        description="refine every confirm trial at its horizon and report it beside the plain one; never ranks",
    )


class Regime(StrEnum):
    """What a group of properties is about; the report has a section for each."""

    MOLECULE = "molecule"
    CRYSTAL = "crystal"
    LIQUID = "liquid"


PROPERTY_TIME_LIMIT_S = 7200.0
"""Of one property of one model: a solid-liquid interface of some hundred atoms takes the most, on one core an hour."""


class ModelProperties(Section):
    """Physical properties of every model of the confirm stage, computed after training; `docs/properties.md`."""

    regime: Annotated[Regime, Field(strict=False)] = Field(description="section of the report; liquid: interfaces too")
    workloads: Annotated[tuple[Name, ...], Field(strict=False)] = Field(
        default=(), description="whose models are measured; left out, those of all workloads"
    )
    properties: dict[Name, dict[str, Any]] = Field(
        min_length=1, description="entries by a name of yours, each a property with its settings and tolerances"
    )
    reference: dict[str, Any] = Field(
        default_factory=dict, description="what errors are measured against: calculator, forces, values, files"
    )
    cpus_per_model: PositiveFloat = Field(default=1.0, description="CPU cores that a model's properties are given")
    gpus_per_model: NonNegativeFloat = Field(
        default=0.0, le=1.0, description="share of a GPU; 0 computes on the CPU, whatever trained the model"
    )
    time_limit_s: PositiveFloat | None = Field(
        default=PROPERTY_TIME_LIMIT_S,
        description="seconds that one property of one model, or of the reference, may take; one that takes longer has "
        "failed. null sets no limit",
    )


def _slots(value: object) -> object:
    number = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < INTEGER_LIMIT
    if value != "auto" and not number:
        raise ValueError("auto, or an integer of at least 1")
    return value


Slots = Annotated[Literal["auto"] | int, PlainValidator(_slots, json_schema_input_type=Literal["auto"] | PositiveInt)]


class Engine(StrEnum):
    """What trains trials: many in one device step, or NequIP's own trainer with one trial per process."""

    AUTO = "auto"
    COHORT = "cohort"
    LIGHTNING = "lightning"


class Resources(Section):
    """What a trial gets, in Ray's units.

    Trials of the `cohort` engine share what a cohort takes: a whole GPU, or where `gpus_per_trial` is 0 as many cores
    as `cpus_per_trial` says.
    """

    cpus_per_trial: PositiveFloat = Field(default=1.0, description="CPU cores")
    gpus_per_trial: NonNegativeFloat = Field(default=0.0, description="GPUs, at most 1; 0.25 puts four trials on one")
    concurrent_trials: PositiveInt | None = Field(
        default=None, description="upper bound; left out, what the cluster fits"
    )
    slots: Slots = Field(
        default="auto", description="trials that a cohort trains at once; auto measures how many pay on its device"
    )
    max_failures: NonNegativeInt = Field(
        default=2, description="times a crashed trial is started again from its checkpoint"
    )
    time_limit_s: PositiveFloat | None = Field(default=None, description="a trial that trains longer ends as TIMED_OUT")
    stalled_after_s: PositiveFloat | None = Field(
        default=900.0,
        ge=10.0,
        description="a process that trains and makes no step for so long, or for 100 of its median steps where that is "
        "longer, is ended and counts as a crash of its trials; one that stalls at its last attempt ends as TIMED_OUT. "
        "Before the first step four times as long; null waits for ever",
    )

    @property
    def threads(self) -> int:
        """Threads of a trial's process: its whole CPU cores, at least one."""
        return max(int(self.cpus_per_trial), 1)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where a trial trains."""
        return "cuda" if self.gpus_per_trial > 0 else "cpu"


RuleName = Annotated[str, Field(pattern=RULE_PATTERN)]
Waiver = Annotated[str, Field(min_length=1)]


class Study(Section):
    """A study: arms = workloads x optimizers, searched, then confirmed."""

    name: Name = Field(description="name of the study, also of its run directory")
    description: str = Field(default="", description="printed on the report")
    seed: NonNegativeInt = Field(default=0, description="root of every named seed")
    workloads: Annotated[tuple[Workload, ...], Field(min_length=1, strict=False)] = Field(
        description="what is trained, one entry per workload"
    )
    optimizers: Annotated[tuple[NamedArm, ...], Field(min_length=1, strict=False)] = Field(
        description="who takes part: names, or mappings with the keys below"
    )
    schedule: Schedule = Field(default_factory=Schedule, description="learning-rate schedule of every arm")
    objective: Objective = Field(default_factory=Objective, description="what selects")
    tune: Tune = Field(default_factory=Tune, description="search")
    confirm: Confirm = Field(default_factory=Confirm, description="reruns that rank")
    properties: Annotated[tuple[ModelProperties, ...], Field(strict=False)] = Field(
        default=(), description="physical properties of the confirm stage's models; they never select"
    )
    resources: Resources = Field(default_factory=Resources, description="what a trial gets")
    engine: Annotated[Engine, Field(strict=False)] = Field(
        default=Engine.AUTO,
        description="cohort (many trials in one device step) or lightning (one process per trial); auto is cohort "
        "where a workload's model can be traced",
    )
    keep_checkpoints: Literal["confirm", "all", "none"] = Field(
        default="confirm", description="checkpoints kept after a trial has ended"
    )
    waive: dict[RuleName, Waiver] = Field(
        default_factory=dict,
        description="rules of a fair comparison that the study breaks, F1 to F19, each with a reason",
    )

    def trials_of(self, arm: str) -> int:
        """Configurations that the tune stage gives to an optimizer's arms, by the arm's name."""
        found = next(entry for entry in self.optimizers if entry.name == arm)
        return 1 if found.untuned else found.budget * self.tune.trials_per_arm


class InWords(str):
    """What was found, said in words; a message shows it without quotes, unlike a value of the file."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class StudyError(Exception):
    """Bad input: one line that names the file, the key, the value found and what is allowed.

    Attributes:
        key: dotted path inside the file, for example ``workloads[0].model.family``; empty for the file itself.
        more: how many further problems the file has.
    """

    def __init__(self, file: Path | str, key: str, found: object, allowed: str, more: int = 0) -> None:
        self.file, self.key, self.found, self.allowed, self.more = str(file), key, found, allowed, more
        place = f"{file}: {key}" if key else str(file)
        others = f" (and {more} more problem{'s' if more > 1 else ''} in this file)" if more else ""
        line = f"{place}: found {_shortened(found)}, allowed: {allowed}{others}"
        super().__init__(_printable(" ".join(line.splitlines())))

    def __reduce__(self) -> tuple[type[StudyError], tuple[str, str, object, str, int]]:
        return type(self), (self.file, self.key, self.found, self.allowed, self.more)


def _printable(line: str) -> str:
    """A line that a terminal shows and does not obey: a key may hold whatever YAML can write."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in line)


def _shortened(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."
