"""Tables that the jobs print when they end."""

from typing import TYPE_CHECKING, Any

from msense.cli.console import console, show_table, stage_rows
from msense.text import size

if TYPE_CHECKING:
    from msense.evaluation.report import Evaluation


def show_build(summary: dict[str, Any]) -> None:
    """Print the summary of a dictionary build, or the estimate of a dry run."""
    if "estimate" not in summary:
        show_table("Sense dictionary", [*stage_rows(summary["stages"]), ("dictionary", summary["dictionary"])])
        return
    estimate = summary["estimate"]
    sampled = estimate["sample"] < 1
    about = "about " if sampled else ""
    rows = [
        ("documents", f"{about}{estimate['documents']:,.0f} ({about}{estimate['bad_documents']:,.0f} bad)"),
        ("passages", f"{about}{estimate['passages']:,.0f}, {estimate['tokens']:,.0f} tokens"),
        ("passages to read", f"{about}{estimate['needed']:,.0f}, {estimate['needed_tokens']:,.0f} tokens"),
        ("teacher tokens saved", f"{estimate['saved']:.1%}"),
        ("occurrences stored", f"{about}{estimate['stored']:,.0f}"),
        ("tokens with senses", f"{estimate['kinds']:,}, of which {estimate['at_cap']:,} reach --max-occurrences"),
        ("points per token", f"median {estimate['points_median']:,.0f}, mean {estimate['points_mean']:,.1f}"),
        ("senses", f"at most {about}{estimate['senses']:,.0f}"),
        ("disk: passages", about + size(estimate["passages_bytes"])),
        ("disk: occurrences", about + size(estimate["occurrences_bytes"])),
        ("disk: dictionary", f"{about}{size(estimate['dictionary_bytes'])} and exemplars"),
        (
            "disk: embeddings",
            f"{about}{size(estimate['embeddings_bytes'])} for all tokens read; budget {_budget(estimate)}",
        ),
        (
            "embeddings for labels",
            f"{about}{estimate['kept_tokens']:,.0f} tokens kept, {about}{estimate['reread_tokens']:,.0f} read again",
        ),
        ("memory: teacher actor", f"weights and {size(estimate['unit_memory'])} per partition"),
        ("memory: clustering task", about + size(estimate["clustering_memory"])),
        *_resource_rows(estimate, estimate["needed_tokens"]),
    ]
    share = f", estimated from {estimate['sample']:.2%} of the documents" if sampled else ""
    show_table(f"Dry run: what the run would read, write and need{share}", rows)


def show_distillation(summary: dict[str, Any]) -> None:
    """Print the summary of a distillation, or the estimate of a dry run."""
    if "estimate" not in summary:
        show_table("Student", [*stage_rows(summary["stages"]), ("student", summary["student"])])
        return
    estimate = summary["estimate"]
    kinds = {"sentence": "sentences", "run": "runs of sentences", "title": "titles", "query": "queries"}
    rows = [
        ("passages to label", f"{estimate['passages']:,}, {estimate['tokens']:,} tokens"),
        *(
            (f"{kinds[name]} to label", f"about {kind['spans']:,}, {kind['tokens']:,} tokens")
            for name, kind in estimate["kinds"].items()
        ),
        ("to be read by the teacher", f"{'about ' * bool(estimate['kinds'])}{estimate['forwarded']:,} tokens"),
        ("disk: senses", size(estimate["labels_bytes"])),
        (f"disk: --soft-targets {estimate['soft_targets']}", f"{size(estimate['soft_targets_bytes'])} more"),
        ("disk: --pooled", f"{size(estimate['pooled_bytes'])} more"),
        ("disk: total with these settings", size(estimate["total_bytes"])),
        *_resource_rows(estimate, estimate["forwarded"]),
    ]
    show_table("Dry run: the size of the labels", rows)


def show_finetuning(summary: dict[str, Any]) -> None:
    """Print the metrics of the last epoch, and the files of a fine-tuning."""
    rows = [(name.replace("_", " "), f"{value:,.4g}") for name, value in summary["epochs"][-1].items()]
    rows += [("seconds", f"{summary['seconds']:,.0f}"), ("teacher", summary["teacher"]), ("corpus", summary["corpus"])]
    show_table("Fine-tuned teacher", rows)


def show_evaluation(evaluation: "Evaluation") -> None:
    """Print one table per task, and the table of costs."""
    from msense.evaluation.report import tables  # slow to import

    for table in tables(evaluation):
        show_table(table.title, table.rows, table.head, table.what)
        console().print()


def _budget(estimate: dict[str, Any]) -> str:
    """Return the most bytes of embeddings that are kept, as text."""
    return "unlimited" if estimate["budget_bytes"] is None else size(estimate["budget_bytes"])


def _teacher_rows(teacher: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the teacher's size, from its config."""
    weights = f"{teacher['parameters']:,} parameters, {size(teacher['weights_bytes'])} in {teacher['dtype']}"
    where = f" on each of {teacher['ranks']} ranks" if teacher["ranks"] > 1 else ""
    where += f", weights in host memory ({size(teacher['weights_bytes'])} per actor)" if teacher["offload"] else ""
    where += f", of {size(teacher['gpu_memory'])} of a GPU" if teacher["gpu_memory"] else ""
    return [("teacher weights", weights), ("memory: teacher", f"about {size(teacher['rank_bytes'])}{where}")]


def _resource_rows(estimate: dict[str, Any], tokens: float) -> list[tuple[str, str]]:
    """Return the rows of resources and of the teacher's time for so many tokens."""
    rate = estimate.get("tokens_per_second")
    if rate:
        minutes = tokens / rate / 60
        time = f"{minutes / 60:,.1f} hours" if minutes > 120 else f"{minutes:,.1f} minutes"
        teacher = f"{rate:,.0f} tokens/s in total: {time}"
    else:
        teacher = "--time-teacher estimates its time" if rate is None else "too little text to estimate its time"
    return [
        *_teacher_rows(estimate["teacher"]),
        ("cluster offers", estimate["offered"]),
        ("job requests", estimate["asked"]),
        ("workers", f"{estimate['workers']} ({estimate['device']}) for {estimate['units']} partitions"),
        ("teacher", teacher),
    ]
