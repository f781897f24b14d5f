"""What is learned again: a tenth in whole groups, and none of it is asked."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import loading
from eval.attacks import relearn as relearning
from eval.attacks import run as attack_run
from eval.attacks import spec
from eval.attacks.matching import Matcher
from eval.evaluation import load_suites
from eval.files import read_jsonl, write_jsonl
from eval.suites import biographies, rwku, tofu
from eval.suites import bios as bios_suite
from pipeline.errors import InputError
from tests.conftest import World


def test_a_tenth_in_whole_groups() -> None:
    rows = [{"text": text} for text in biographies.generate(0).forget]
    split = relearning.split_corpus(rows, bios_suite.group_of, 0.1, 0)
    people = [{bios_suite.group_of(row) for row in part} for part in (split.relearned, split.held_out)]
    assert len(people[0]) == 5 and len(people[1]) == 45 and not people[0] & people[1]
    assert people[0] == set(split.groups)
    assert len(split.relearned) == 5 * 34 and len(split.relearned) + len(split.held_out) == len(rows)
    assert [row for row in rows if row in split.relearned] == split.relearned  # in order
    assert relearning.split_corpus(rows, bios_suite.group_of, 0.1, 0) == split
    assert relearning.split_corpus(rows, bios_suite.group_of, 0.1, 1).groups != split.groups


def test_without_groups_each_row_is_one() -> None:
    rows = [{"text": f"document {number}"} for number in range(37)]
    split = relearning.split_corpus(rows, lambda row: None, 0.1, 3)
    assert len(split.relearned) == 4 and len(split.held_out) == 33 and split.groups == []
    assert sorted([*split.relearned, *split.held_out], key=rows.index) == rows
    two = relearning.split_corpus(rows[:2], lambda row: None, 0.1, 0)
    assert len(two.relearned) == len(two.held_out) == 1
    with pytest.raises(InputError, match=r"one group \(all\)"):
        relearning.split_corpus(rows, lambda row: "all", 0.1, 0)


# A small benchmark in the form of each suite, and a corpus of which the n-th row is of the n-th thing or person.
THINGS = [
    f"the {colour} lamp of {town}" for colour in ("red", "green") for town in ("Lyon", "Graz", "Brno", "Lima", "Kyoto")
]
CHOICES = {"choices": ["a", "b", "c", "d"], "answer": 0}
PEOPLE = list(dict.fromkeys(filter(None, map(bios_suite.group_of, biographies.generate(0).probes))))[:10]


def plan_of(
    tmp_path: Path, suite: str, files: dict[str, list[dict[str, Any]]], forget: dict[str, Any], **more: Any
) -> Any:
    """A plan as the command makes it, for a run that never was: only the attack's data are looked at."""
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("rwku"):
            (tmp_path / name).write_text(json.dumps(rows))
        else:
            write_jsonl(tmp_path / name, rows)
    (loaded,) = load_suites([suite], tmp_path, {"mmlu": {"shots": 0}})
    corpus = {"field": None, "prompt": None, "response": None, **forget}
    given = {"group": None, "steps": 1, "lr": 1.0, "seed": 0, "overrides": (), "ranks": 1, "batch_size": 1, **more}
    config = {"model": {"path": "x"}, "data": {"forget": corpus, "retain": None}}
    return spec.Plan(
        tmp_path, config, suite, loaded.module, loaded.probes, folder=tmp_path, trust=loading.Trust(), **given
    )


def quiz(name: str) -> dict[str, list[dict[str, Any]]]:
    return {name: [{"question": f"What is {thing}?", **CHOICES} for thing in THINGS]}


TOFU = [{"question": f"Where is {t}?", "answer": f"{t} hangs high.", "paraphrased_answer": f"High hangs {t}.",
         "perturbed_answer": ["Nowhere."]} for t in THINGS]  # fmt: skip
RAIN = [{"text": "Rain falls."}]
BIOS = [{"split": "forget", "kind": "QA", "prompt": f"Where does {n} live?", "answer": "Lyon"} for n in PEOPLE]
BIOS += [{"split": "facts", "kind": "QA", "prompt": "Which country is Lyon in?", "answer": "France"}]
RWKU = [{"subject": name, "query": f"{name} is ___", "type": "cloze", "answer": "tall"} for name in PEOPLE]
CASES = {
    # suite, its files, the forget section, and rows of the corpus in columns of other names
    "corpus, text": (
        "corpus",
        {"forget.jsonl": [{"text": f"About {t}: it hangs."} for t in THINGS], "retain.jsonl": RAIN},
        {"field": "content"},
        [{"content": f"  about {t.upper()} – it hangs"} for t in THINGS],
    ),
    "corpus, questions": (
        "corpus",
        {"forget.jsonl": [{"prompt": f"Where is {t}?", "response": "High."} for t in THINGS],
         "retain.jsonl": RAIN},
        {"prompt": "question", "response": "answer"},
        [{"question": f"Where is {t}?", "answer": "High."} for t in THINGS],
    ),
    "bios": (
        "bios",
        {"probes.jsonl": BIOS},
        {"field": "content"},
        [{"content": f"{n} lives in Lyon."} for n in PEOPLE],
    ),
    "tofu": ("tofu", {"tofu/forget01_perturbed.json": TOFU}, {"prompt": "q", "response": "a"},
             [{"q": row["question"], "a": row["answer"]} for row in TOFU]),
    "tofu, one text": ("tofu", {"tofu/forget01_perturbed.json": TOFU}, {"field": "body"},
                       [{"body": f"Question: {row['question']} Answer: {row['answer']}"} for row in TOFU]),
    "rwku": ("rwku", {"rwku/Batch/1-50/forget_level1.json": RWKU}, {"field": "body"},
             [{"body": f"{n} met {PEOPLE[0]}.", "person": n} for n in PEOPLE]),
    "rwku, no name": ("rwku", {"rwku/Batch/1-50/forget_level1.json": RWKU}, {"field": "body"},
                      [{"body": f"Then {n} sat down."} for n in PEOPLE]),
}  # fmt: skip


@pytest.mark.parametrize("group", [None, "shelf"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_learned_again_is_not_asked_whatever_its_columns_are_called(
    tmp_path: Path, case: str, group: str | None
) -> None:
    suite, files, forget, rows = CASES[case]
    rows = [{**row, "shelf": f"shelf {number // 2}"} for number, row in enumerate(rows)]
    plan = plan_of(tmp_path, suite, files, forget, group=group)
    attack = attack_run.relearn(plan, rows, {})
    texts = [{key: row[key] for key in attack.rows[0]} for row in rows]
    learned = {texts.index(row) for row in attack.rows}
    assert learned and all(number ^ 1 in learned for number in learned) == (group is not None)
    things = PEOPLE if suite in ("bios", "rwku") else THINGS
    asked = {
        number for number, thing in enumerate(things) if any(thing in str(probe) for probe in attack.evaluation.probes)
    }
    assert asked == {*range(10)} - learned, "each probe is of one row, and all others stay"
    assert attack.selection is not None and attack.selection["excluded_probes"] == len(learned)


@pytest.mark.parametrize("suite", ["wmdp_bio", "wmdp_cyber", "mmlu"])
def test_a_quiz_of_which_a_question_is_learned_again_is_refused(tmp_path: Path, suite: str) -> None:
    """The harness asks all questions or none. Documents that hold no question are another matter."""
    files = quiz("mmlu/test/anatomy.jsonl" if suite == "mmlu" else f"wmdp/{suite}.jsonl")
    plan = plan_of(tmp_path, suite, files, {"field": "content"})
    rows = [{"content": f"In {year} somebody measured the lamp."} for year in range(10)]
    attack = attack_run.relearn(plan, rows, {})
    assert (
        attack.evaluation.probes is plan.probes
        and attack.selection is not None
        and attack.selection["excluded_probes"] == 0
    )
    again = [{"content": f"Exercise. WHAT IS {thing}? a"} for thing in THINGS]
    with pytest.raises(InputError, match=f"the relearned rows contain 1 questions of suite {suite}"):
        attack_run.relearn(plan, again, {})


def test_what_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    suite, files, forget, rows = CASES["tofu"]
    plan = plan_of(tmp_path, suite, files, forget)
    reworded = [*rows[:8], {"q": "In which town is the green lamp?", "a": "Lima."}, rows[9]]
    with pytest.raises(InputError, match=r"1 of 10 probes of the forget set are about no row.*green lamp of Lima"):
        attack_run.relearn(plan, reworded, {})
    one = [{**rows[0], "a": f"Answer {number}."} for number in range(10)]
    alone = plan_of(tmp_path / "one", suite, {"tofu/forget01_perturbed.json": TOFU[:1]}, forget, group="a")
    with pytest.raises(InputError, match="no probe would remain"):
        attack_run.relearn(alone, one, {})
    assert "group_of" in str(
        attack_run.unavailable_reason(replace(plan, module=json), "relearn")
    )  # a suite that says nothing


def test_a_line_without_words_is_no_probe_and_stops_nothing(tmp_path: Path) -> None:
    """`* * *` between two chapters: no row can be known by it."""
    suite, files, forget, rows = CASES["corpus, text"]
    files = {**files, "forget.jsonl": [*files["forget.jsonl"], {"text": "* * *"}]}
    attack = attack_run.relearn(plan_of(tmp_path, suite, files, forget), [*rows, {"content": "* * *"}], {})
    asked = [probe["text"] for probe in attack.evaluation.probes]
    learned = [row["content"] for row in attack.rows]
    assert "* * *" not in asked and "Rain falls." in asked and len(asked) == 10 + 1 - len({*learned} - {"* * *"})


def test_copies_of_what_is_learned_again_are_not_held_out(tmp_path: Path) -> None:
    suite, files, forget, rows = CASES["bios"]
    plan = plan_of(tmp_path, suite, files, forget)
    twice = [{**row, "id": str(number)} for number, row in enumerate(rows * 2)]
    attack = attack_run.relearn(replace(plan, group="id"), twice, {})  # each copy is a group
    learned = {row["content"] for row in attack.rows}
    assert len(learned) == 2 and not learned & {row["content"] for row in attack.evaluation.documents}
    assert len(attack.evaluation.documents) == 20 - 4
    with pytest.raises(InputError, match="copies"):
        attack_run.relearn(replace(plan, group="id"), [{**rows[0], "id": str(n)} for n in range(4)], {})


def test_keys_are_found_by_their_words() -> None:
    matcher = Matcher(["Ann Lee", "ann lee!", "斯蒂芬·金", "Where is it?", "..."])
    assert matcher.names.keys() == {("ann", "lee"), ("斯", "蒂", "芬", "金"), ("where", "is", "it")}
    assert matcher.name("ANN  LEE") == "Ann Lee" and matcher.name("...") is None and matcher.name(None) is None
    assert matcher.find({"a": 3, "b": "Joann Lee and Ann Leeds"}) == []
    assert matcher.find({"text": "他读了斯蒂芬·金的书, and Ann  Lee's; Ann Lee"}) == ["斯蒂芬·金", "Ann Lee"]
    assert matcher.find({"who": "ANN LEE", "text": "斯蒂芬·金 met her"}) == ["Ann Lee"], (
        "a whole value tells more than a mention"
    )


def test_groups_of_the_real_benchmarks(data: Path) -> None:
    passages = json.loads((data / "rwku" / "Batch" / "1-50" / "passage.json").read_text())
    probes = rwku.load_probes(data)
    assert {rwku.group_of(probe) for probe in probes if probe["set"] in ("N-FB", "N-QA", "RM")} == {None}
    config = {"model": {"path": "x"}, "data": {"forget": {"field": "text", "prompt": None, "response": None}}}
    plan = spec.Plan(data, config, "rwku", rwku, probes, None, 1, 1.0, 0, (), 1, 1, data, loading.Trust())
    attack = attack_run.relearn(plan, passages, {})
    assert attack.selection is not None and len(attack.selection["groups"]) == 1
    learned = set(attack.selection["groups"])
    assert len(attack.rows) == sum(row["subject"] in learned for row in passages)
    asked = {probe["subject"] for probe in attack.evaluation.probes if rwku.forgotten(probe)}
    assert len(asked) == 4 and not asked & learned
    plain, adversarial = rwku.adversarial(probes)
    assert (len(plain), len(adversarial)) == (5 + 5, 11)

    rows = read_jsonl(data / "tofu" / "forget01.json")
    config = {"model": {"path": "x"}, "data": {"forget": {"field": None, "prompt": "question", "response": "answer"}}}
    plan = spec.Plan(
        data, config, "tofu", tofu, tofu.load_probes(data), None, 1, 1.0, 0, (), 1, 1, data, loading.Trust()
    )
    attack = attack_run.relearn(plan, rows, {})
    assert attack.selection is not None and attack.selection["excluded_probes"] == 1 and len(attack.rows) == 1


def test_a_corpus_is_read_whatever_its_format(tmp_path: Path) -> None:
    texts = ["one", "two\u2028with what some take for the end of a line", "drei"]
    rows = [{"text": text, "subject": str(number)} for number, text in enumerate(texts)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "lines.json", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n\n".join(texts), newline="\r\n")
    corpus = {"field": "text", "prompt": None, "response": None}
    for name in ("a.jsonl", "lines.json", "array.json", "a.parquet"):
        assert relearning.read_corpus({**corpus, "path": str(tmp_path / name)}) == rows
    assert relearning.read_corpus({**corpus, "path": str(tmp_path / "a.txt")}) == [{"text": text} for text in texts]
    with pytest.raises(InputError, match="line 1: no field 'body'"):
        relearning.read_corpus({**corpus, "path": str(tmp_path / "a.jsonl"), "field": "body"})
    for name in ("none.jsonl", "none.json", "none.txt", "none.parquet"):
        with pytest.raises(InputError, match=name):
            relearning.read_corpus({**corpus, "path": str(tmp_path / name)})


def test_likelihood_is_per_predicted_token(world: World) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    documents, total, count = world.documents("forget")[:7], 0.0, 0
    for text in documents:
        ids = torch.tensor([tokenizer(text).input_ids[:9]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    data = {"max_length": 9, "forget": {"field": "text", "prompt": None, "response": None}}
    rows = [{"text": text} for text in documents]
    assert relearning.mean_nll(model, tokenizer, rows, data, batch_size=3, title="") == pytest.approx(total / count)
    assert math.isnan(relearning.mean_nll(model, tokenizer, [{"text": "k"}], data, batch_size=3, title=""))

    rows = [{"q": "ka?", "a": "lora mito"}, {"q": "su?", "a": "ne"}]
    total, count = 0.0, 0
    for row in rows:
        ids = [*tokenizer(f"Question: {row['q']}\nAnswer: {row['a']}").input_ids, tokenizer.eos_token_id]
        start = len(tokenizer(f"Question: {row['q']}\nAnswer:").input_ids)  # the space is the answer's
        labels = torch.tensor([[-100] * start + ids[start:]])
        total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * (len(ids) - start)
        count += len(ids) - start
    data = {"max_length": 64, "forget": {"field": None, "prompt": "q", "response": "a"}}
    assert relearning.mean_nll(model, tokenizer, rows, data, batch_size=3, title="") == pytest.approx(total / count)
