"""The questions of TOFU, and what two other models answered to them.

Under --data, JSON lines `tofu/forgetNN_perturbed.json` (one of them), `retain_perturbed.json`,
`real_authors_perturbed.json`, `world_facts_perturbed.json`, and `holdoutNN.json`: authors that no model has seen. Two
files that `eval.run --suite tofu` wrote for one model each: `tofu/retain_model.json` for a model that was trained on
the retain set only, and `tofu/target_model.json` for the model before unlearning. Without --data, the dataset
`locuslab/TOFU` on the hub, with --forget-set.
"""

from __future__ import annotations

from pathlib import Path

from eval.files import check_texts, read_hub, read_json, read_jsonl
from eval.suites import NoData
from eval.suites.membership import MEMBERSHIP
from pipeline.errors import InputError
from pipeline.files import Json

# Keys set, file, question, answer; but for held-out authors paraphrase and perturbed. From the two files: `reference`
# is log R of the retain-only model for a question of the forget set, and its AUC of every score for held-out authors;
# `target_utility` of the other sets is the model utility of the model before unlearning.
Probe = Json


HUB = "locuslab/TOFU"


SETS = ("forget", "retain", "real_authors", "world_facts")


CHOICES = ("real_authors", "world_facts")  # their wrong answers are other options, their right one has no paraphrase


HELD_OUT = "holdout"  # for membership inference alone


def load_probes(folder: Path | None, suite: str = "tofu", forget_set: str = "forget10") -> list[Probe]:
    """The questions of the sets that exist, in the order of `SETS`, from FOLDER/tofu or the hub's `forget_set`.

    Raises:
        InputError: no set, two forget sets, a malformed row, answers of another model than they say, or no hub.
    """
    probes: list[Probe] = []
    for name in (*SETS, HELD_OUT):
        found = find_rows(folder, name, forget_set)
        if found is None:
            continue
        stem, where, rows = found
        texts = ("question", "answer", *(() if name in (*CHOICES, HELD_OUT) else ("paraphrased_answer",)))
        for number, row in enumerate(check_texts(rows, texts, where), start=1):
            probe = {"set": name, "file": stem, "question": row["question"], "answer": row["answer"]}
            probes.append(probe if name == HELD_OUT else {**probe, **options_of(row, f"{where}, row {number}")})
    if not any(probe["set"] != HELD_OUT for probe in probes):
        raise NoData(f"{folder} has no tofu/forgetNN_perturbed.json or its like; copy them there")
    if folder is not None:
        add_references(folder / "tofu", probes)
    return probes


def find_rows(folder: Path | None, name: str, forget_set: str) -> tuple[str, str, list[Json]] | None:
    """(name of the file, place for messages, rows) of a set; None if there is no such file.

    Raises:
        InputError: two files of a kind that allows one, a malformed file, or no hub.
    """
    numbered = {"forget": "forget", HELD_OUT: "holdout"}.get(name)
    ending = "" if name == HELD_OUT else "_perturbed"
    if folder is None:
        stem = (name if numbered is None else forget_set.replace("forget", numbered)) + ending
        return stem, f"{HUB} ({stem})", read_hub(HUB, stem)
    pattern = name if numbered is None else f"{numbered}[0-9][0-9]"
    found = sorted((folder / "tofu").glob(f"{pattern}{ending}.json"))
    if len(found) > 1:
        raise InputError(f"{folder / 'tofu'} has {found[0].name} and {found[1].name}; leave one {name} set")
    return (found[0].stem, str(found[0]), read_jsonl(found[0])) if found else None


def options_of(row: Json, where: str) -> Json:
    """The paraphrase and the wrong answers of a row; raises InputError for a row without wrong answers."""
    wrong = row.get("perturbed_answer")
    if not isinstance(wrong, list) or not wrong or not all(isinstance(text, str) and text for text in wrong):
        raise InputError(f"{where}: needs a list of texts under perturbed_answer; get it again")
    return {"paraphrase": row.get("paraphrased_answer", row["answer"]), "perturbed": wrong}


def add_references(folder: Path, probes: list[Probe]) -> None:
    """Put what the two other models answered into the probes, where their files exist.

    Raises:
        InputError: a file of another form, or of other questions.
    """
    sets = {name: [probe for probe in probes if probe["set"] == name] for name in (*SETS, HELD_OUT)}
    if (path := folder / "retain_model.json").is_file() and sets["forget"]:
        retain = answer_of(path)
        for probe, ratio in zip(sets["forget"], log_ratios(path, retain, sets["forget"]), strict=True):
            probe["reference"] = ratio
        areas = retain["metrics"].get("membership", {}).get("AUC", {})
        if all(areas.get(score) is not None for score in MEMBERSHIP):
            for probe in sets[HELD_OUT]:
                probe["reference"] = areas
    if (path := folder / "target_model.json").is_file():
        utility = answer_of(path)["metrics"]["model_utility"]
        if utility is None:
            raise InputError(f"{path} has no model utility; evaluate the target model on the same files")
        for name in SETS[1:]:
            for probe in sets[name]:
                probe["target_utility"] = utility


def answer_of(path: Path) -> Json:
    """What suite tofu wrote for one model; raises InputError for a file of another form."""
    answer = read_json(path)
    try:
        found = answer["suites"]["tofu"]
        _ = found["forget_set"], found["log_truth_ratios"], found["metrics"]["model_utility"]
    except (KeyError, TypeError):
        raise InputError(f"{path} was not written by eval.run --suite tofu for one model; write it so") from None
    return found


def log_ratios(path: Path, answer: Json, forget: list[Probe]) -> list[float]:
    """log R of the retain-only model for each question of the forget set; raises InputError for other questions."""
    file, values = answer["forget_set"], answer["log_truth_ratios"]
    if file != forget[0]["file"] or len(values) != len(forget) or None in values:
        raise InputError(
            f"{path} needs {len(forget)} truth ratios, all numbers, on {forget[0]['file']}, and has {len(values)} on "
            f"{file}; evaluate the retain-only model on the same files"
        )
    return values
