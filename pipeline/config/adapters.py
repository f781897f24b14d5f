"""`model.lora`: adapters, and which layers get them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.config.sources import Section


def regex(pattern: str) -> str:
    """`pattern`; raises ValueError if it is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
    return pattern


class Lora(Section):
    r: int = Field(16, ge=1, description="rank of an adapter; any key of model.lora turns adapters on")
    alpha: float = Field(32.0, gt=0, description="an adapter's product is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on what goes into the adapters while training")
    targets: list[Annotated[str, AfterValidator(regex)]] | None = Field(
        None,
        min_length=1,
        description="linear layers that get an adapter: each entry a name (q_proj, self_attn.q_proj) or a regular "
        "expression of the whole name (.*layers\\.[0-7]\\..*_proj); null: all of them but the output layer",
    )
    merge: bool = Field(False, description="export the merged weights, an ordinary model; false: an adapter (peft)")
