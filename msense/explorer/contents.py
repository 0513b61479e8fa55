"""What an explorer shows: a dictionary, what reads sentences, and a second dictionary to compare with."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING

from msense.dictionary import SenseDictionary
from msense.errors import InputError, MsenseError
from msense.explorer.comparison import Difference, check_comparable, differences
from msense.explorer.origin import Origin, present_teacher, read_origin
from msense.explorer.overview import Overview, TokenStatistics
from msense.explorer.search import TokenSearch
from msense.explorer.sentence import Reader, TeacherReader
from msense.explorer.training import Training, read_training
from msense.explorer.word import NeighbourView, neighbour_views, token_view
from msense.io import storage
from msense.student.encoder import SenseEncoder

if TYPE_CHECKING:
    from msense.explorer.evaluation import SpeedChart

_STUDENTS = ("", "student", "student/student")  # itself, in the run that made it, and in the output of `msense make`


@dataclass(frozen=True)
class Contents:
    """What is shown; its statistics and search are computed once, on first use."""

    dictionary: SenseDictionary
    reader: Reader | None = None
    other: SenseDictionary | None = None
    trainings: tuple[Training, ...] = ()
    evaluations: tuple[str, ...] = ()  # files
    origin: Origin | None = None
    _lock: Lock = field(default_factory=Lock, repr=False)  # held while something slow is computed, once
    _index_lock: Lock = field(default_factory=Lock, repr=False)
    _indexed: list[float] = field(default_factory=lambda: [0.0], repr=False)  # finished parts

    def __post_init__(self) -> None:
        """Raise InputError if the dictionaries cannot be compared."""
        if self.other is not None:
            check_comparable(self.dictionary, self.other)

    @cached_property
    def statistics(self) -> TokenStatistics:
        """Statistics of every token."""
        return TokenStatistics(self.dictionary)

    @cached_property
    def overview(self) -> Overview:
        """The dictionary in numbers."""
        return self.statistics.overview()

    @cached_property
    def search(self) -> TokenSearch | None:
        """Search over the tokens; None without a tokenizer."""
        return TokenSearch(self.dictionary) if self.dictionary.tokenizer_file else None

    @cached_property
    def _differences(self) -> list[Difference]:
        return [] if self.other is None else differences(self.dictionary, self.other)

    def differences(self) -> list[Difference]:
        """Return the tokens that the corpora of both dictionaries use most differently first; none without a second one."""
        with self._lock:
            return self._differences

    @cached_property
    def _speeds(self) -> "list[SpeedChart]":
        if not self.evaluations:
            return []
        from msense.explorer.evaluation import speed_charts  # imports what evaluates

        return [chart for file in self.evaluations for chart in speed_charts(file)]

    def speeds(self) -> "list[SpeedChart]":
        """Return the charts of the evaluations, as `speed_charts`."""
        with self._lock:
            return self._speeds

    @cached_property
    def _indexing(self) -> Thread:
        return Thread(target=self._index, daemon=True)

    def _index(self) -> None:
        with suppress(MsenseError):  # the page itself shows it
            self.dictionary.prepare_neighbours(self._indexed.append)

    def index(self, wait: float | None = None) -> float:
        """Make or load the index of neighbours, once; return the finished part after at most `wait` seconds (None: all)."""
        with self._index_lock:
            if self._indexing.ident is None:
                self._indexing.start()
        self._indexing.join(wait)
        return self._indexed[-1] if self._indexing.is_alive() else 1.0

    def neighbours(self, token: int, sense: int) -> list[NeighbourView]:
        """Return the nearest senses of other tokens, as `neighbour_views`."""
        self.index()
        return neighbour_views(self.dictionary, token, sense)

    def prepare(self) -> None:
        """Compute what every page needs: about a second for a million senses of 50,000 tokens."""
        _ = self.overview, self.search

    def prepare_rest(self) -> None:
        """Compute what single pages need, such as the index of neighbours: half a minute for a million senses, once."""
        with suppress(MsenseError):  # the page itself shows it
            token_view(self.dictionary, int(self.statistics.senses.argmax()))  # its first use imports much
            self.speeds()
        self.differences()
        self.index()


def open_contents(
    source: str,
    compare: str | None = None,
    trainings: Sequence[str] = (),
    evaluations: Sequence[str] = (),
    teacher: str | None = None,
) -> Contents:
    """Open what an explorer shows.

    Args:
        source: a dictionary, run or student: folder, URI, or a student's hub name.
        compare: a second dictionary of the same teacher.
        trainings: runs of trainings.
        evaluations: JSON files of `msense evaluate`.
        teacher: folder or hub name of the dictionary's teacher, to read sentences without a student; None: that of the run,
            if it is on this machine.

    Raises:
        InputError: nothing is there, it is damaged, the dictionaries are not of one teacher, or a file is no evaluation with
            speeds.
    """
    other = None if compare is None else SenseDictionary.load(compare)
    reader: Reader | None
    if teacher is None and _has_student(source):
        reader = SenseEncoder.from_pretrained(source, device="cpu")
        dictionary = reader.dictionary
    else:
        dictionary = SenseDictionary.load(source)
        own = dictionary.config.teacher
        teacher = teacher or present_teacher(source, own)
        reader = TeacherReader(dictionary, teacher, own.revision) if teacher else None
    trained = tuple(_trainings(source, trainings))
    if evaluations:
        from msense.explorer.evaluation import read_evaluation  # imports what evaluates

        for file in evaluations:
            read_evaluation(file)
    return Contents(dictionary, reader, other, trained, tuple(evaluations), read_origin(source))


def _has_student(source: str) -> bool:
    """Return whether a source is a student or a run with one, or is not here and thus a student's hub name."""
    if "://" not in source and not Path(source).exists():
        if source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise InputError(f"nothing at {source}: give the folder of a dictionary, of its run, or of a student")
        return True
    return any(storage.exists(storage.join(source, *filter(None, (inner, "modules.json")))) for inner in _STUDENTS)


def _trainings(source: str, named: Sequence[str]) -> Iterator[Training]:
    """Yield the training of a source, if it has one, and those of named runs."""
    for run in dict.fromkeys((source, *named)):
        training = read_training(run)
        if training is not None:
            yield training
        elif run != source:
            raise InputError(f"{run} has no metrics.jsonl: name runs whose training has finished an epoch")
