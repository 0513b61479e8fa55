"""Settings of `msense merge-teacher`."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from msense.config.base import CommandConfig, HelpGroups


class MergeConfig(CommandConfig):
    """Settings of `msense merge-teacher`; each field is a flag and a key of the YAML file.

    Example:
        >>> MergeConfig(adapter=("mntp", "supervised"), llm2vec="llama3", output="teachers/llm2vec").adapter
        ('mntp', 'supervised')
    """

    help_groups: ClassVar[HelpGroups] = {
        "Common options": ("teacher", "adapter", "llm2vec", "output"),
        "How the teacher reads a text": ("attention", "before", "after", "pooling", "include_prompt", "max_length"),
        "Run": ("revision", "log_level"),
    }

    teacher: str | None = Field(
        None, description="base model: Hugging Face name or folder; default: the one that the first adapter names"
    )
    adapter: tuple[str, ...] = Field(
        min_length=1, description="LoRA adapters: Hugging Face names or folders, added in this order"
    )
    llm2vec: Literal["llama3", "mistral"] | None = Field(
        None,
        description="read as LLM2Vec does: bidirectional attention, its text around every text, mean of the tokens of a text "
        "and of what follows, without prompt; llm2vec_config.json of an adapter sets pooling and length; flags override",
    )
    attention: Literal["auto", "causal", "bidirectional"] = Field(
        "auto", description="what each token sees: those before it, or all; auto: as the base's config.json says"
    )
    before: str | None = Field(None, description="text before every text, such as the start of a chat turn")
    after: str | None = Field(None, description="text after every text, such as the end of a chat turn")
    pooling: Literal["mean", "cls", "lasttoken"] | None = Field(
        None,
        description="how sentence vectors are pooled; default: as sentence-transformers' files of an adapter or the base "
        "say, else mean",
    )
    include_prompt: bool | None = Field(
        None, description="whether a prompt's tokens are pooled; default: as sentence-transformers' files say, else yes"
    )
    max_length: int | None = Field(
        None, ge=4, description="longest text in tokens; default: as sentence-transformers' files or the tokenizer say"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the base model on the hub")
    output: str = Field("teachers/merged", description="new folder of the merged teacher, on a local disk")

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapters_as_tuple(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("output")
    @classmethod
    def _check_local_output(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("must be a folder on a local disk; copy it elsewhere afterwards")
        return value
