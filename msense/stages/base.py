"""What all stages share: reuse finished outputs, do the rest, record it in the journal, and summarise.

A stage names its output files and the work that writes each. `run_stage` verifies the outputs of earlier drivers, so that
the same command resumes after any interruption. The driver holds the stats of the files, never their contents.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, Generic, TypeVar

from msense.run.folder import RunFolder
from msense.run.journal import Journal, timed
from msense.run.resume import finished
from msense.runtime import Executor
from msense.runtime.executor import Row

ResultT = TypeVar("ResultT")


@dataclass
class StageContext:
    """What the stages of one job share."""

    run: RunFolder
    executor: Executor
    journal: Journal
    summary: dict[str, dict[str, Any]] = field(default_factory=dict)  # stats and seconds of every stage so far


class Stage(ABC, Generic[ResultT]):
    """One step of a pipeline; `outputs` are the URIs of its files, all in one folder.

    Example:
        >>> class Lengths(Stage[int]):
        ...     name = "lengths"
        ...     def process(self, executor, missing): yield from executor.map(self.name, measure, missing)
        ...     def reduce(self, executor, stats): return sum(row["length"] for row in stats)
        >>> total = run_stage(Lengths(run, [run.passages_file(0)]), context)
    """

    name: ClassVar[str]  # in log lines, the journal and the summary

    def __init__(self, run: RunFolder, outputs: list[str]) -> None:
        self.run, self.outputs = run, outputs

    def finished(self, context: StageContext) -> list[Row | None]:
        """Return the stats of each output that an earlier driver finished, and None for the others."""
        return finished(self.name, self.run, self.outputs, context.executor, context.journal)

    @abstractmethod
    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Write the outputs with these numbers, at least one; yield the stats of each with its `number`, in any order."""

    @abstractmethod
    def reduce(self, executor: Executor, stats: list[Row]) -> ResultT:
        """Return the result of the stage from the stats of all outputs, in their order."""


def run_stage(stage: Stage[ResultT], context: StageContext) -> ResultT:
    """Run what is left of a stage and return its result; a dataclass result is added to the job's summary.

    Raises:
        InputError, MsenseError: raised by the stage; finished outputs are kept.
    """
    with timed(context.summary, stage.name) as shown:
        done = stage.finished(context)
        missing = [number for number, stats in enumerate(done) if stats is None]
        for row in stage.process(context.executor, missing) if missing else ():
            done[row["number"]] = row
        context.journal.add(stage.name, made=len(missing))
        result = stage.reduce(context.executor, [stats or {} for stats in done])
        if is_dataclass(result):
            shown.update(asdict(result))  # type: ignore[arg-type]
    return result
