"""What each objective needs; it is read before torch is loaded. What each computes: `losses/objectives.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pairing = Literal["preferred", "refusal"]  # the counterpart of each text: a column of its row, or a refusal
Term = Literal["unlikelihood", "margin", "jensen_shannon"]  # of a prediction, see `modeling/token_terms.py`


@dataclass(frozen=True)
class Needs:
    """What an objective reads, and how its terms are counted."""

    task: Literal["forget", "retain"]
    normalize_by: Literal["token", "sequence", "position"]  # the mean over the global batch is per predicted token, ...
    reference: Literal["log_probs", "logits", "hidden"] | None = None  # what it needs of the reference model
    term: Term | None = None  # what the output layer computes of each prediction; None: its cross-entropy
    hidden: bool = False  # reads hidden states after `objective.layer`; no block above that layer runs
    logit_penalty: bool = False  # beta is subtracted from the reference model's logit of each predicted token
    pairing: Pairing | None = None  # a second answer to each prompt
    replaces: bool = False  # the second answer is the only one that the model gets
    has_target: bool = False  # the tokens of `objective.target`, repeated, are the labels of what is predicted
    weighs_retain: bool = False  # the weight of the retain loss is a dual variable: see `losses/dual.py`
    rise: Literal["likelier", "farther", "unclear"] = (
        "farther"  # of its loss: the text became likelier, the goal farther
    )
    trains_near_layer: bool = False  # by default: `mlp.down_proj` of `objective.layer` and of the two layers before it

    @property
    def num_answers(self) -> int:
        """Sequences that the model gets for each one of a batch."""
        return 2 if self.pairing is not None and not self.replaces else 1


NEEDS: dict[str, Needs] = {
    "ga": Needs("forget", "token", rise="likelier"),
    "wga": Needs("forget", "token", rise="unclear"),  # -p^beta NLL rises to 0 as p falls to 0
    "satimp": Needs("forget", "token", rise="unclear"),  # likewise
    "ce_u": Needs("forget", "token", term="unlikelihood", rise="likelier"),
    "npo": Needs("forget", "sequence", reference="log_probs", rise="likelier"),
    "simnpo": Needs("forget", "sequence", rise="likelier"),
    "dpo": Needs("forget", "sequence", reference="log_probs", pairing="preferred"),
    "dpo_idk": Needs("forget", "sequence", reference="log_probs", pairing="refusal"),
    "altpo": Needs("forget", "sequence", reference="log_probs", pairing="preferred"),
    "flat": Needs("forget", "sequence", pairing="refusal"),
    "idk": Needs("forget", "token", pairing="refusal", replaces=True),
    "jensun": Needs("forget", "token", has_target=True),
    "pdu": Needs("forget", "token", term="margin", weighs_retain=True),
    "undial": Needs("forget", "token", reference="logits", logit_penalty=True),
    "rmu": Needs("forget", "position", hidden=True, trains_near_layer=True),
    "nll": Needs("retain", "token"),
    "kl": Needs("retain", "token", reference="logits"),
    "jsd": Needs("retain", "token", reference="logits", term="jensen_shannon"),
    "embed_diff": Needs("retain", "position", reference="hidden", hidden=True),
}


def choices(task: str) -> tuple[str, ...]:
    """What `objective.<task>` may be."""
    return (*(name for name, needs in NEEDS.items() if needs.task == task), "none")
