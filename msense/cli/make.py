"""`msense make`."""

from typing import Any

from msense.cli.console import console, show_table
from msense.cli.flags import Job
from msense.config.make import MakeConfig

EXAMPLES = """\
  msense make texts/ --teacher BAAI/bge-small-en-v1.5 --student static --output runs/mine
  msense make texts/*.jsonl --student layers:2 --output runs/layers2 --local
  msense make texts/ --student table --config general-dictionary general-student --output runs/table"""
NEXT = """
Next:
  python -c 'from msense import SenseEncoder; print(SenseEncoder.from_pretrained("{student}").encode(["a text"]))'
  msense show {dictionary} WORD
  msense evaluate --teacher {teacher} --model teacher student:{student} --task NAME=DATA"""


def run(config: MakeConfig) -> dict[str, Any]:
    """Make a student."""
    from msense.pipelines.make import make_student

    return make_student(config)


def show(made: dict[str, Any]) -> None:
    """Print the figures that matter, and what to run next."""
    held_out, speed = made["held_out"], made["texts_per_second"]
    rows = []
    if "pooled_cosine" in held_out:
        rows.append(("cosine to the teacher", f"{held_out['pooled_cosine']:.3f}  (sentence vectors, held-out text)"))
    if "accuracy" in held_out:
        frequent = f"always the most frequent sense: {held_out['frequent']:.1%}"
        rows.append(("senses as the teacher's", f"{held_out['accuracy']:.1%}  ({frequent})"))
    times = speed["student"] / speed["teacher"]
    rows.append(
        ("texts per second", f"{speed['student']:,.0f}  ({times:,.1f} times the teacher's {speed['teacher']:,.0f})")
    )
    show_table("Student", [*rows, ("student", made["student"]), ("dictionary", made["dictionary"])])
    console().print(NEXT.format(**made), markup=False, highlight=False, soft_wrap=True)


app = Job(MakeConfig, run, show, positional="corpus").app("make", EXAMPLES)
