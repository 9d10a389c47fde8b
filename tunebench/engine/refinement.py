"""Second-order refinement: full-batch L-BFGS from where a first-order run has come to.

The minimiser is `torch.optim.LBFGS` with its strong Wolfe line search, one iteration per call. What it lacks is added
here: trial points that are not finite, an end that says its reason, and validation, whose best weights are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from nequip.data import AtomicDataDict

from tunebench.engine.batches import on_device, task_frames
from tunebench.engine.checkpoints import REFINED, checkpoint_folder
from tunebench.engine.error_parts import PartRow, RunningParts, SplitParts
from tunebench.engine.errors import split_errors
from tunebench.engine.full_batch import full_batch, model_in
from tunebench.engine.graphs import synchronize
from tunebench.engine.task import Errors, TrialTask
from tunebench.optim.packing import Tensors
from tunebench.study.files import replacing
from tunebench.study.objective import objective_value, selected_readout
from tunebench.study.record import Readout, Split
from tunebench.study.spec import Refinement


class RefinementEnd(StrEnum):
    """Why a refinement ended.

    CONVERGED: the gradient, or what an iteration gains, is below its tolerance. STEPS: all iterations were made.
    LINE_SEARCH: no point along the direction lowers the loss. NOT_FINITE: likewise, and some were not finite.
    VALIDATION: the loss of the validation split became worse than the best one. OUT_OF_MEMORY, FAILED: an error, and
    nothing is refined.
    """

    CONVERGED = "converged"
    STEPS = "steps"
    LINE_SEARCH = "line_search"
    NOT_FINITE = "not_finite"
    VALIDATION = "validation"
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Minimised:
    """What L-BFGS has done to a loss.

    Attributes:
        weights: the best by validation, by name.
        end: why it ended. message: in words, with numbers.
        iterations: made. kept_iteration: after which the weights are kept; 0 for those it began with.
        loss_before, loss_after: of the first and of the kept weights.
        validation_before, validation_after: loss of the validation split, likewise.
        evaluations: of the loss and its gradient over all frames.
        curve: (iteration, loss) from 0 on, every iteration.
    """

    weights: Tensors
    end: RefinementEnd
    message: str
    iterations: int
    kept_iteration: int
    loss_before: float
    loss_after: float
    validation_before: float
    validation_after: float
    evaluations: int
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Refined:
    """A refined trial.

    Attributes:
        minimised: what was done, with the weights.
        before, after: errors by split, in the precision of the refinement, of the first and of the kept weights.
        parts: errors of the parts of the splits opened once, of the kept weights.
        frames: training frames.
        steps_equivalent: training steps that see as many frames as the refinement has.
        device_s: seconds of the loss, its gradients and the directions; evaluation is left out, as in training.
    """

    minimised: Minimised
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    parts: list[PartRow]
    frames: int
    steps_equivalent: float
    device_s: float

    def to_plain(self) -> dict[str, Any]:
        """What was done, without the weights: numbers, strings, lists and dictionaries only."""
        done = self.minimised
        return {
            "end": done.end.value,
            "message": done.message,
            "iterations": done.iterations,
            "kept_iteration": done.kept_iteration,
            "loss_before": done.loss_before,
            "loss_after": done.loss_after,
            "validation_loss_before": done.validation_before,
            "validation_loss_after": done.validation_after,
            "before": self.before,
            "after": self.after,
            "evaluations": done.evaluations,
            "refine_steps": self.steps_equivalent,
            "refine_device_s": self.device_s,
        }


class SmoothLoss(Protocol):
    """A deterministic loss of some parameters."""

    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """By name."""
        ...

    def loss_and_gradient(self) -> tuple[torch.Tensor, Tensors]:
        """The loss, zero-dimensional, and its gradient by name, at the parameters' values."""
        ...

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy values by name into the parameters."""
        ...


def add_refinement(
    task: TrialTask,
    step: int,
    errors: Errors,
    parts: list[PartRow],
    model: torch.nn.Module,
    weights_of: Callable[[Readout], Mapping[str, torch.Tensor]],
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """Refine a trial that is at the workload's horizon, where the study asks for it.

    Args:
        task: the trial.
        step: finished steps.
        errors: of this evaluation; those of the refined weights are added as the readout REFINED.
        parts: errors of the parts of its splits, likewise.
        model: of its training module, for structure and constants.
        weights_of: the trial's weights of a readout, by name.
        beat: called after every batch that went through the model.

    Returns:
        What was done, in plain values; None where nothing was asked for, or the trial's errors are not finite.
    """
    if task.refine is None or step != task.workload.max_steps:
        return None
    objectives = {readout: objective_value(found, task.objective) for readout, found in errors[Split.VAL].items()}
    readout = selected_readout(objectives, task.objective)
    if readout is None or not math.isfinite(objectives[readout]):
        return None
    began = _now(task)
    try:
        refined = refine(task, model, weights_of(Readout(readout)), task.refine, beat)
    except torch.AcceleratorError:  # the device is lost, to every trial on it
        raise
    except (RuntimeError, ArithmeticError, ValueError, MemoryError) as error:  # a finished trial does not end by it
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        end = RefinementEnd.OUT_OF_MEMORY if memory else RefinementEnd.FAILED
        message = (str(error) or type(error).__name__).splitlines()[0]
        return {"end": end.value, "message": message, "readout": readout, "refine_device_s": _now(task) - began}
    for split, by_readout in errors.items():
        by_readout[Readout.REFINED.value] = refined.after[split]
    parts += refined.parts
    plain = {"readout": readout, **refined.to_plain()}
    with replacing(checkpoint_folder(task.run, task.key.trial_id) / REFINED) as partial:
        weights = {name: weight.cpu() for name, weight in refined.minimised.weights.items()}
        torch.save({"weights": weights, "refinement": plain}, partial)
    return plain


def refine(
    task: TrialTask,
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    how: Refinement,
    beat: Callable[[], None] = lambda: None,
) -> Refined:
    """Refine a trial's weights on its whole training split, its force labels masked and weighted as in training.

    Args:
        task: the trial.
        model: of its training module, for structure and constants; left as it is.
        weights: those to begin with, by name: the ones that count, averaged or not.
        how: settings.
        beat: called after every batch that went through the model.
    """
    refined = model_in(task, getattr(torch, how.dtype), model)
    loss, validation = (
        full_batch(task, refined, split, chunk_frames=how.chunk_frames, beat=beat) for split in (Split.TRAIN, Split.VAL)
    )
    loss.set_weights(weights)
    splits = [str(split) for split in (Split.TRAIN, Split.VAL, *task.final_splits)]
    before = {split: _errors(task, refined, split, beat) for split in splits}
    validated_s = 0.0

    def validation_loss() -> float:
        nonlocal validated_s
        began = _now(task)
        found = validation.loss()
        validated_s += _now(task) - began
        return found

    began = _now(task)
    minimised = minimise(loss, how, validation_loss)
    device_s = _now(task) - began - validated_s
    parts: list[PartRow] = []
    return Refined(
        minimised=minimised,
        before=before,
        after={split: _errors(task, refined, split, beat, parts) for split in splits},
        parts=parts,
        frames=loss.frames,
        steps_equivalent=minimised.evaluations * loss.frames / task.workload.batch_size,
        device_s=device_s,
    )


def _errors(
    task: TrialTask,
    model: torch.nn.Module,
    split: str,
    beat: Callable[[], None],
    parts: list[PartRow] | None = None,
) -> dict[str, float]:
    """Errors on a split; those of the parts of one that is opened once are added to `parts`, where it is given."""
    (inner,) = model.values() if isinstance(model, torch.nn.ModuleDict) else (model,)
    frames, size = task_frames(task, split), task.workload.evaluation_batch_size
    chunks = (range(first, min(first + size, len(frames))) for first in range(0, len(frames), size))
    collated = (AtomicDataDict.batched_from_list([frames[index] for index in chunk]) for chunk in chunks)
    batches = (on_device(batch, task.device) for batch in collated)

    def beaten() -> Iterator[AtomicDataDict.Type]:
        for batch in batches:
            yield batch
            beat()

    if parts is None or split not in task.final_splits:
        return split_errors(inner, beaten(), stress=task.weighs_stress)
    running = RunningParts(SplitParts.of(task.data, split, stress=task.weighs_stress))
    errors = split_errors(inner, beaten(), stress=task.weighs_stress, watch=running.add)
    parts += running.table(Readout.REFINED.value)
    return errors


def _now(task: TrialTask) -> float:
    synchronize(torch.device(task.device))
    return time.perf_counter()


# --- minimising ------------------------------------------------------------------------------------------------------


def minimise(loss: SmoothLoss, how: Refinement, validation: Callable[[], float]) -> Minimised:
    """Lower a loss by L-BFGS until it ends for one of the reasons of `RefinementEnd`, and keep the best weights.

    The parameters hold the kept weights at the end. A loss that is not finite to begin with is NOT_FINITE at once.

    Args:
        loss: deterministic.
        how: settings.
        validation: loss of other data at the parameters' values; NaN counts as worse.
    """
    return _Descent(loss, how, validation).run()


class _Descent:
    """L-BFGS on a loss, its best weights so far, and its count of evaluations."""

    def __init__(self, loss: SmoothLoss, how: Refinement, validation: Callable[[], float]) -> None:
        self._closure = _Closure(loss)
        self._loss, self._how, self._validation = loss, how, validation
        self._optimizer = torch.optim.LBFGS(
            list(loss.parameters.values()),
            lr=1.0,
            max_iter=1,
            max_eval=_MOST_TRIALS + 1,
            history_size=how.history,
            tolerance_grad=0.0,  # both are judged here, where a reason is given
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        self._first = self._closure.value()
        self._curve = [(0, self._first)]
        self._first_validation = validation()
        self._best = 0, self._first, self._first_validation, _copied(loss)

    def run(self) -> Minimised:
        end, message = self._descend()
        kept, loss, validation, weights = self._best
        self._loss.set_weights(weights)
        return Minimised(
            weights=weights,
            end=end,
            message=message if kept else f"{message}; the weights it began with are kept",
            iterations=len(self._curve) - 1,
            kept_iteration=kept,
            loss_before=self._first,
            loss_after=loss,
            validation_before=self._first_validation,
            validation_after=validation,
            evaluations=self._closure.evaluations,
            curve=tuple(self._curve),
        )

    def _descend(self) -> tuple[RefinementEnd, str]:
        """Iterate; returns why it ended."""
        if not math.isfinite(self._first):
            return RefinementEnd.NOT_FINITE, f"the loss is {self._first} to begin with"
        self._closure.scale_by(self._first)
        for iteration in range(1, self._how.steps + 1):
            ended = self._iterate(iteration)
            if ended is None and iteration % self._how.evaluate_every == 0:
                ended = self._worse(iteration)
            if ended is not None:
                return self._validated(*ended)
        return self._validated(RefinementEnd.STEPS, f"{self._how.steps} iterations made")

    def _iterate(self, iteration: int) -> tuple[RefinementEnd, str] | None:
        """One iteration; returns why it is the last one."""
        before, steepest = self._curve[-1][1], self._closure.steepest()
        if steepest <= self._how.tolerance_gradient:
            return RefinementEnd.CONVERGED, f"largest gradient element {steepest:.1e} of the first loss"
        after = self._searched()
        if not after < before:  # once more along the gradient itself, without the memory of earlier iterations
            self._optimizer.state.clear()
            after = self._searched()
        if not after < before:
            if self._closure.broken:
                found = f"{self._closure.broken} of its points were not finite"
                return RefinementEnd.NOT_FINITE, f"line search failed at iteration {iteration}, {found}"
            return RefinementEnd.LINE_SEARCH, f"line search found nothing below {before:.6g} at iteration {iteration}"
        self._curve.append((iteration, after))
        if before - after <= self._how.tolerance_change * abs(self._first):
            return RefinementEnd.CONVERGED, f"an iteration lowers the loss by {before - after:.1e}"
        return None

    def _searched(self) -> float:
        """The loss after one line search; a search that found nothing below leaves the weights as they were."""
        start, before = _copied(self._loss), self._curve[-1][1]
        self._closure.broken = 0
        self._optimizer.step(self._closure)  # type: ignore[no-untyped-call]
        after = self._closure.value()
        if not after < before:
            self._loss.set_weights(start)
            self._closure.value()
        return after

    def _worse(self, iteration: int) -> tuple[RefinementEnd, str] | None:
        """Look at the validation split, and keep the weights where they are the best."""
        found, best = self._validation(), self._best[2]
        if found <= best or (math.isnan(best) and math.isfinite(found)):
            self._best = iteration, self._curve[-1][1], found, _copied(self._loss)
            return None
        return RefinementEnd.VALIDATION, f"validation loss {found:.6g} at iteration {iteration}, {best:.6g} before"

    def _validated(self, end: RefinementEnd, message: str) -> tuple[RefinementEnd, str]:
        """The end, after a last look at weights that were not validated yet."""
        iteration = self._curve[-1][0]
        if end is RefinementEnd.VALIDATION or iteration == self._best[0]:
            return end, message
        return self._worse(iteration) or (end, message)


_MOST_TRIALS = 25  # of one line search, torch's own limit


class _Closure:
    """A loss as torch's L-BFGS calls it: relative to its first value, finite everywhere, each point computed once.

    torch compares products of steps and gradients with 1e-10, so that an iteration would depend on the loss's unit.
    """

    def __init__(self, loss: SmoothLoss) -> None:
        self._loss, self._scale = loss, 1.0
        self._known: list[tuple[torch.Tensor, float, Tensors]] = []
        self.evaluations = self.broken = 0

    def scale_by(self, first: float) -> None:
        """Divide by the first loss from now on, where it is not zero."""
        self._scale = abs(first) or 1.0

    def __call__(self) -> float:
        """The relative loss at the parameters' values; fills their gradients."""
        _, value, gradient = self._evaluated()
        finite = math.isfinite(value) and all(bool(torch.isfinite(part).all()) for part in gradient.values())
        if not finite:
            # A step that ends here is too long, however long: the search cuts it where a finite, high value says so,
            # and returns NaN where an infinite one is interpolated.
            self.broken += 1
        for name, parameter in self._loss.parameters.items():
            parameter.grad = gradient[name] / self._scale if finite else torch.zeros_like(parameter)
        return value / self._scale if finite else _TOO_HIGH

    def value(self) -> float:
        """The loss itself at the parameters' values; forgets all but this point and the last one asked for so."""
        self._known = [self._evaluated(), *self._known[:1]]
        return self._known[0][1]

    def steepest(self) -> float:
        """Largest element of the relative gradient where `value` was called last."""
        return max(float(part.abs().max()) for part in self._known[0][2].values()) / self._scale

    def _evaluated(self) -> tuple[torch.Tensor, float, Tensors]:
        """Where the parameters are, the loss and its gradient there."""
        place = torch.cat([parameter.detach().reshape(-1) for parameter in self._loss.parameters.values()])
        for known in self._known:
            if torch.equal(known[0], place):
                return known
        self.evaluations += 1
        loss, gradient = self._loss.loss_and_gradient()
        self._known.append((place, float(loss), gradient))
        return self._known[-1]


_TOO_HIGH = 1e6


def _copied(loss: SmoothLoss) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in loss.parameters.items()}
