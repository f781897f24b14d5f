"""Keys of a configuration that say where rows come from, and which of their columns are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator


class Section(BaseModel):
    """A group of keys: no unknown key, no silent conversion (`steps: "10"` is an error), immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


FilePath = Annotated[str, AfterValidator(os.path.expanduser)]  # a shell does not expand `~` inside YAML


LOCAL_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def format_of(path: str | Path) -> str | None:
    """The entry of LOCAL_FORMATS that a file's name ends with, in any case; `.gz` may follow, but not after Parquet."""
    endings = [ending.lower() for ending in Path(path).suffixes]
    compressed = endings[-1:] == [".gz"]
    found = "".join(endings[:-1][-1:] if compressed else endings[-1:])
    return found if found in LOCAL_FORMATS and not (compressed and found == ".parquet") else None


class Source(Section):
    """Plain text (`field`), or questions with answers of which only the answer is predicted (`prompt`, `response`)."""

    path: FilePath = Field(
        description="hub name; or a .jsonl, .json, .csv, .tsv, .txt (each also .gz) or .parquet file, or a folder of "
        "save_to_disk"
    )
    field: str | None = Field("text", description="the column that holds the text (unused for .txt)")
    prompt: str | None = Field(None, description="instead of field: the column with the question, not predicted")
    response: str | None = Field(None, description="beside prompt: the column with the answer, which is predicted")
    name: str | None = Field(None, description="the hub data set's configuration")
    split: str = Field(
        "train", description="the data set's split, or rows of it: train[40:80]; of a file, only the rows count"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_field_beside_a_prompt(cls, given: object) -> object:
        """Unset the default of `field` beside a prompt, so that a resolved configuration can be read again."""
        if isinstance(given, dict) and any(given.get(key) is not None for key in ("prompt", "response")):
            return {"field": None, **given}
        return given

    @model_validator(mode="after")
    def _one_kind_of_text(self) -> Self:
        self.check_columns()
        return self

    def check_columns(self) -> None:
        """Raises ValueError if the keys that name columns contradict each other."""
        if (self.prompt is None) != (self.response is None):
            there, lacking = ("prompt", "response") if self.response is None else ("response", "prompt")
            raise ValueError(f"{there} needs {lacking} beside it: the columns of the question and of its answer")
        if self.prompt is not None and self.field is not None:
            raise ValueError("set either field (plain text) or prompt and response (questions and answers)")
        if self.prompt is None and self.field is None:
            raise ValueError("set field (plain text), or prompt and response (questions and answers)")
        if len({*self.columns.values()}) < len(self.columns):
            raise ValueError(f"{', '.join(self.columns)} must name different columns")
        in_columns = next((key for key in self.columns if key != "field"), None)
        if format_of(self.path) == ".txt" and in_columns is not None:
            raise ValueError(
                f"a .txt file has no columns, so {in_columns} cannot name one; use .jsonl, .json or .parquet"
            )

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by the key that names them."""
        keys = ("field", "prompt", "response", "preferred", "choices", "answer")
        return {key: name for key in keys if (name := getattr(self, key, None)) is not None}


class Corpus(Source):
    """What is forgotten, or retained."""

    preferred: str | None = Field(None, description="the column with the preferred text, for preference objectives")
    refusals: FilePath | None = Field(
        None,
        description=".txt file with one refusal per line, for objectives that teach refusals; null: a built-in list",
    )
    heldout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="of data.retain: the share of its documents that training does not see; they go to heldout.jsonl "
        "in the run folder, and suite corpus scores them",
    )

    def check_columns(self) -> None:
        super().check_columns()
        if self.refusals is not None and self.prompt is None:
            raise ValueError("refusals answer questions; name their columns with prompt and response")
        if self.refusals is not None and format_of(self.refusals) != ".txt":
            raise ValueError(f"refusals must be a .txt file with one refusal a line, not {self.refusals}")


class Probe(Source):
    """A set of rows on which the model is measured while it trains: texts, answers, or a choice among answers."""

    choices: str | None = Field(
        None,
        description="beside prompt and answer, instead of response: the column with the answers to choose from",
    )
    answer: str | None = Field(
        None, description="beside choices: the column with the right one, its number counted from 0, or its text"
    )
    limit: int = Field(64, ge=1, description="the first rows of the source are used, this many")

    def check_columns(self) -> None:
        if self.choices is None and self.answer is None:
            return super().check_columns()
        if self.choices is None or self.answer is None or self.prompt is None:
            raise ValueError("a choice among answers needs prompt, choices and answer: set the three columns")
        if self.response is not None or self.field is not None:
            raise ValueError("choices stand in place of response and field; remove these")
        if len({*self.columns.values()}) < len(self.columns):
            raise ValueError(f"{', '.join(self.columns)} must name different columns")
        if format_of(self.path) in (".txt", ".csv", ".tsv"):
            raise ValueError(f"{self.path} has no lists of choices; use .jsonl, .json or .parquet")

    @property
    def measures(self) -> tuple[str, ...]:
        """What a probe of this set measures."""
        return TEXT_MEASURES if self.choices is None else CHOICE_MEASURES


TextMeasure = Literal["extraction_strength", "exact_memorization", "probability", "loss"]
TEXT_MEASURES: tuple[str, ...] = get_args(TextMeasure)
CHOICE_MEASURES = ("accuracy",)
SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
