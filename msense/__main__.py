"""The command line: `msense COMMAND`, or `python -m msense COMMAND`. A command is imported when it is used.

Exit codes: 0 success, 1 failure or no match, 2 wrong usage or bad input, 130 Ctrl-C.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from cyclopts import App, Parameter, validators

from msense.cli.console import run_job
from msense.cli.flags import call, config_names
from msense.constants import VERSION
from msense.errors import InputError

_RESUMES = "Run the same command again after an interruption to resume."
_JOBS = {  # module of msense.cli: help, whose first sentence is in the list of commands
    "make": f"""Make a student from a text in one command, and measure it.

Builds a dictionary in OUTPUT/dictionary, distills a student in OUTPUT/student, and prints how close the student is to \
the teacher, how often it gives a token the sense that the teacher gives it, and how fast it is. {_RESUMES}""",
    "build": f"""Build a sense dictionary: embed a text with a teacher, and cluster the embeddings of every token.

Without --corpus and --teacher, the demo is built: docstrings of installed Python packages, read by all-MiniLM-L6-v2.
{_RESUMES}""",
    "distill": f"""Distill a student: label a text with a teacher's senses and vectors, and train on the labels.

Without --corpus, the text is that of the dictionary. {_RESUMES}""",
    "finetune": f"""Fine-tune a teacher with a classifier, as the teacher of a dictionary and of students for one task.

{_RESUMES}""",
    "merge-teacher": """Merge LoRA adapters into a base model: a plain teacher folder, as of LLM2Vec.

How the teacher reads a text is written into the folder, so that every command and sentence-transformers read it alike.""",
    "evaluate": f"""Evaluate models on tasks: one table per task, with confidence intervals, and a table of costs.

{_RESUMES}""",
}
_EXAMPLES = """\
Examples:
  msense make texts/ --teacher BAAI/bge-small-en-v1.5 --student static --output runs/mine
  msense build --output runs/demo     the demo, in about four minutes on two cores
  msense show runs/demo key cell

Configurations for --config:
"""
_SHOW_EXAMPLES = """\
Examples:
  msense show runs/demo key cell
  msense show runs/demo key --senses 3 --exemplars 5
  msense show runs/student --text "The key fits the lock."\n"""
_STATUS_EXAMPLES = """\
Examples:
  msense status runs/demo
  msense status s3://BUCKET/runs/mine --json"""
_EXPLORE_EXAMPLES = """\
Examples:
  msense explore runs/demo
  msense explore runs/student
  msense explore runs/general --compare runs/medicine
  msense explore runs/student --trainings runs/larger --evaluations runs/evaluation.json
  msense explore runs/demo tree key --export senses.html"""
_Count = Annotated[int, Parameter(validator=validators.Number(gte=0), metavar="N")]
_Text = Annotated[str, Parameter(metavar="TEXT")]
_Texts = Annotated[list[str], Parameter(consume_multiple=True, negative=(), metavar="TEXT ...")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    resumes = bool(words) and words[0] in _JOBS
    return run_job(partial(call, make_app(), words), resumes=resumes) or (0 if words else 2)


def make_app() -> App:
    """Return the command line; the jobs are not imported yet."""
    configs = "\n".join(f"  {name:<20} {use}" for name, use in config_names().items())
    app = App(
        name="msense",
        help="Sense dictionaries from large teacher models, and small, fast students that name senses.",
        help_format="plaintext",
        help_epilogue=_EXAMPLES + configs,
        version=VERSION,
    )
    for number, (name, text) in enumerate(_JOBS.items()):
        app.command(f"msense.cli.{name.replace('-', '_')}:app", name=name, help=text, sort_key=number)
    app.command(show, help_epilogue=_SHOW_EXAMPLES, sort_key=len(_JOBS), version_flags=())
    app.command(status, help_epilogue=_STATUS_EXAMPLES, sort_key=len(_JOBS), version_flags=())
    app.command(explore, help_epilogue=_EXPLORE_EXAMPLES, sort_key=len(_JOBS), version_flags=())
    app.register_install_completion_command(help="Install completion for bash, zsh or fish, and exit.")
    return app


def show(
    dictionary: _Text,
    words: _Texts | None = None,
    *,
    text: _Text | None = None,
    exemplars: _Count = 3,
    senses: _Count = 6,
) -> int:
    """Show the senses of words, most frequent first, with the contexts nearest to each; or those in a text.

    Args:
        dictionary: folder or URI of a dictionary, or of the run that built it; with --text, of a student
        words: words to look up, in upper and lower case
        text: a text whose words are shown with the senses that the student sees in it
        exemplars: maximum contexts per sense
        senses: maximum senses per token
    """
    from msense.cli.show import show_text, show_words

    if (text is None) == (not words):
        raise InputError(
            "give either words to look up or --text: msense show DICTIONARY WORD, msense show STUDENT --text TEXT"
        )
    return show_words(dictionary, words or [], exemplars, senses) if text is None else show_text(dictionary, text)


def status(run: _Text, *, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Show the progress of a run, and what its latest drivers did.

    Args:
        run: folder or URI of a run
        json: print it as one JSON object
    """
    from msense.cli.status import show_status

    show_status(run, as_json=json)


def explore(  # noqa: PLR0913 - one parameter per option
    source: _Text,
    words: _Texts | None = None,
    *,
    compare: _Text | None = None,
    trainings: _Texts | None = None,
    evaluations: _Texts | None = None,
    teacher: _Text | None = None,
    export: _Text | None = None,
    host: _Text = "127.0.0.1",
    port: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=65_535), metavar="N")] = 8765,
) -> int:
    """Explore a dictionary or a student in a browser, on a local page.

    Args:
        source: folder or URI of a dictionary, of the run that built it, or of a student; or a student's hub name
        words: words of the exported file
        compare: a second dictionary of the same teacher
        trainings: runs whose training is shown beside that of the source
        evaluations: JSON files of msense evaluate
        teacher: folder or hub name of the dictionary's teacher, to read sentences without a student; default: the run's
        export: write the senses of the words to this self-contained HTML file, in place of a local page
        host: address to listen on; any but a loopback address asks for a token, which is printed
        port: to listen on; 0: a free one
    """
    from msense.cli import explore as command

    if (export is None) == bool(words):
        raise InputError("give words and a file together, or neither: msense explore SOURCE WORD --export FILE.html")
    if export is not None:
        return command.export(source, words or [], export)
    more = {"trainings": trainings or [], "evaluations": evaluations or [], "teacher": teacher}
    command.serve(source, (host, port), compare=compare, **more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
