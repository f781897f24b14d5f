"""Whether a model knows what is to be forgotten, from its scores before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping

from eval.results.metrics import MEASURES, ForgetRetainMetric, readable
from eval.results.numbers import printed
from pipeline.monitoring.verdicts import looks_unseen

NEAR = 0.05  # a score so little above that of a model that knows nothing shows no knowledge
BY_PROBABILITY = "corpus.forget.probability"  # has no level of its own; its logarithm is what training warns by


def nothing_to_forget(
    measure: ForgetRetainMetric, scores: Mapping[str, float] | None, who: str = "the target model"
) -> str | None:
    """A sentence if a model with these scores does not know the forget corpus; None if it does, or nobody measured it.

    It does not if its forget score is at the level already, or near that of a model that knows nothing; and, of a
    user's own corpus, if the text is as improbable as text that a model never saw (`looks_unseen`).
    """
    if scores is None or measure.forget not in scores:
        return None
    start = scores[measure.forget]
    found = f"Nothing to forget: {who} has {readable(measure.forget)} {printed(start)}"
    if measure.forget == BY_PROBABILITY:
        retain = scores.get(measure.retain)
        if not looks_unseen(nats(start), nats(retain) if retain is not None else None):
            return None
        beside = "" if retain is None else f" ({readable(measure.retain)} {printed(retain)})"
        return f"{found}{beside}, as of text that a model never saw. Begin with a model that knows the forget corpus."
    if measure.level_is_relative:
        return None
    if measure.chance is not None and start <= measure.chance + NEAR:
        return (
            f"{found}; one that knows nothing has about {measure.chance:g}. Begin with a model that knows the "
            "forget corpus."
        )
    if start <= measure.level:
        return (
            f"{found}, no more than the level, {measure.level:g}. Begin with a model that knows the forget corpus, or "
            "compare at a lower level (eval.report --level)."
        )
    return None


def nats(probability: float) -> float:
    return -math.log(probability) if probability > 0 else math.inf


def unknown_to(who: str, scores: Mapping[str, float]) -> list[str]:
    """The sentences of `nothing_to_forget` by the metrics of all suites that these scores are of."""
    found = (nothing_to_forget(measure, scores, who) for measure in MEASURES)
    return list(dict.fromkeys(sentence for sentence in found if sentence))
