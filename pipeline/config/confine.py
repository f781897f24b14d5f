"""`synthesis.confine`: which share of the weights an update may move."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.sources import Section


class Confine(Section):
    share: float = Field(gt=0, lt=1, description="of the weights that train: how many may move in a step")
    by: Literal["forget", "forget_mean_square", "forget_over_retain"] = Field(
        "forget_mean_square",
        description="what is largest in those: the size of the forget gradient, the moving average of its square, or "
        "its size over that of the retain gradient",
    )
    new_share: float = Field(0.1, gt=0, le=1, description="share of the present step in that moving average")
