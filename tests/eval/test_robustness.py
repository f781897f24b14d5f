"""The attacks: rounding and splitting against computations of their own, and all of them on a run with two ranks."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from eval import bios, loading, robustness
from eval.attacks import relearn as relearning
from eval.attacks import run as attack_run
from eval.attacks import spec
from eval.attacks.matching import Matcher
from eval.attacks.quantize import round_linear_layers, rounded
from eval.evaluation import load_suites
from eval.files import read_jsonl, write_jsonl
from eval.suites import biographies, rwku, tofu
from eval.suites import bios as bios_suite
from pipeline.config.load import resolve, to_yaml
from pipeline.errors import InputError
from tests.conftest import World

# ---------------------------------------------------------------------------------------------------------------------
# Rounding


def rounded_by_hand(weight: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Each group of a row by itself, in float64."""
    levels, result = 2 ** (bits - 1) - 1, np.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], columns):
            group = weight[row, start : start + columns].astype(np.float64)
            scale = np.abs(group).max() / levels
            result[row, start : start + columns] = np.rint(group / scale) * scale if scale else 0.0
    return result


@pytest.mark.parametrize(("bits", "columns", "width"), [(8, None, 300), (4, 128, 300), (4, 128, 256), (4, 128, 96)])
def test_rounding_by_hand(bits: int, columns: int | None, width: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, width) * torch.logspace(-6, 3, 5).unsqueeze(1)  # rows of very different size
    weight[2] = 0
    weight[3, : width // 2] = 0
    answer = rounded(weight, bits, columns)
    expected = rounded_by_hand(weight.numpy(), bits, columns or width)
    step = np.abs(weight.numpy()).max(axis=1, keepdims=True)
    assert np.all(np.abs(answer.numpy() - expected) <= 1e-6 * step)
    assert answer.dtype == weight.dtype and not torch.equal(answer, weight)
    halves = rounded(weight.bfloat16(), bits, columns)
    assert halves.dtype == torch.bfloat16 and halves.isfinite().all()


def test_only_linear_layers_are_rounded(world: World) -> None:
    for folder in ("model", "tied"):
        model = AutoModelForCausalLM.from_pretrained(world.folder / folder)
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        share = round_linear_layers(model, 4)
        changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if "proj" in name} and len(changed) == 14
        sizes = {name: tensor.numel() for name, tensor in before.items()}
        assert share == pytest.approx(sum(sizes[name] for name in changed) / sum(sizes.values()))


def test_a_scale_belongs_to_an_output_also_where_weights_are_transposed() -> None:
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    weight = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    before = weight.detach().clone()
    round_linear_layers(model, 8)
    assert torch.equal(weight.detach(), rounded(before.T.contiguous(), 8, None).T)
    assert not torch.equal(weight.detach(), rounded(before, 8, None))


# ---------------------------------------------------------------------------------------------------------------------
# What is learned again


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


# ---------------------------------------------------------------------------------------------------------------------
# Adversarial probes


def test_adversarial_questions_of_bios() -> None:
    benchmark = biographies.generate(0)
    plain, adversarial = bios_suite.adversarial(benchmark.probes)
    assert len(plain) == 80 * 6 and len(adversarial) == 5 * len(plain)
    assert all(probe in benchmark.probes and probe["kind"] == "QA" for probe in plain)
    assert bios_suite.adversarial(benchmark.probes) == (plain, adversarial)
    everything = set("".join(benchmark.all).split("\n"))
    for at, probe in enumerate(adversarial):
        own = plain[at // 5]
        assert (probe["split"], probe["answer"]) == (own["split"], own["answer"])
        assert probe["prompt"] != own["prompt"] and probe["answer"] not in probe["prompt"]
        person = bios_suite.group_of(own)
        assert person is not None
        if probe["kind"] == "case":
            assert person not in probe["prompt"] and person.lower() in probe["prompt"].lower()
        else:
            assert person in probe["prompt"]
        if probe["kind"] == "paraphrase":
            assert probe["prompt"].split("\n")[0] not in everything
        if probe["kind"] == "in_context":
            others = [
                line for line in probe["prompt"].split("\n") if line.startswith("Question") and person not in line
            ]
            retained = " ".join(one["prompt"] for one in plain if one["split"] == "retain")
            assert len(others) == 2 and all(line in retained for line in others)
        if probe["kind"] == "context":
            facts = probe["prompt"].split("\n")[0]
            assert facts.count(person) == 2 and all(
                f"{fact}." in " ".join(benchmark.all) for fact in facts[:-1].split(". ")
            )


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process."""
    monkeypatch.setattr(robustness, "end_on_terminate", lambda: None)  # the test runner keeps its own

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, arguments)])
        return robustness.exit_status(robustness.main)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, memorise: Callable[[list[str]], tuple[Any, Any]]) -> Path:
    """A run on ten forgotten and two retained persons; its start knows their cities, its `final/` knows nothing."""
    tmp_path = tmp_path_factory.mktemp("finished")
    benchmark = biographies.generate(0)
    people = list(dict.fromkeys(map(bios_suite.group_of, benchmark.probes)))
    chosen = {*people[:10], *people[50:52]}
    probes = [p for p in benchmark.probes if bios_suite.group_of(p) in chosen and " live" in p["prompt"]]
    write_jsonl(tmp_path / "probes.jsonl", probes)
    model, tokenizer = memorise([f"{probe['prompt']} {probe['answer']}\n" for probe in probes])
    model.save_pretrained(tmp_path / "original")
    bios.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "run" / "final")
    for folder in ("original", "run/final"):
        tokenizer.save_pretrained(tmp_path / folder)
    for split in ("forget", "retain"):
        corpus = ({"text": f"{p['prompt']} {p['answer']}\n"} for p in probes if p["split"] == split)
        write_jsonl(tmp_path / f"{split}.jsonl", corpus)
    recipe = {
        "output": str(tmp_path / "run"),
        "cache": str(tmp_path / "cache"),
        "model": {"path": str(tmp_path / "original"), "dtype": "float32"},
        "data": {
            "packing": "documents",
            **{split: {"path": str(tmp_path / f"{split}.jsonl")} for split in ("forget", "retain")},
        },
        "objective": {"forget": "ga"},
        "train": {"steps": 4, "batch_size": 4, "micro_batch_size": 2, "deepspeed": "ds_configs/cpu.json"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(resolve(tmp_path / "recipe.yaml")))
    return tmp_path


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run; what it names by path is shared."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copy(finished / "probes.jsonl", tmp_path)
    return tmp_path / "run"


def test_all_attacks_on_two_ranks(
    finished: Path,
    run_folder: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--run", run_folder, "--suite", "bios", "--data", run_folder.parent, "--steps", 3, "--lr", 0.003)
    assert command(*arguments) == 0
    output = run_folder / "robustness.json"
    answer = json.loads(output.read_text())
    entries = {entry["name"]: entry for entry in answer["attacks"]}
    assert tuple(entries) == spec.ATTACKS
    assert answer["dtype"] == "float32" and answer["suite"] == "bios" and answer["seed"] == 0
    said = capsys.readouterr().out
    assert all(name in said for name in spec.ATTACKS) and "held_out_nll" in said

    relearned = entries["relearn"]
    assert len(relearned["groups"]) == 1 and relearned["excluded_probes"] == 2  # one person of ten: FB and QA
    assert relearned["documents"] == 2 and relearned["held_out_documents"] == 18
    assert relearned["settings"]["steps"] == 3 and relearned["settings"]["lr"] == 0.003
    written = [row["text"] for row in read_jsonl(run_folder / "robustness" / "relearn.jsonl")]
    assert {bios_suite.group_of({"text": text}) for text in written} == set(relearned["groups"])
    assert relearned["after"]["held_out_nll"] < relearned["before"]["held_out_nll"] - 0.1
    assert relearned["original"]["held_out_nll"] < 1 < relearned["before"]["held_out_nll"]
    trained = resolve(run_folder / "robustness" / "relearn" / "config.yaml")
    assert trained.model.path == str(run_folder / "final") and trained.tasks == ["retain"] and trained.train.steps == 3
    assert len(read_jsonl(run_folder / "robustness" / "relearn" / "metrics.jsonl")) == 3
    assert (
        resolve(run_folder / "robustness" / "retain" / "config.yaml").data.retain
        == resolve(run_folder / "config.yaml").data.retain
    )

    for name in ("retain", "int8", "int4"):
        entry = entries[name]
        assert entry["original"]["forget.all"] > 0.9 > 0.2 > entry["before"]["forget.all"]
        assert entry["before"] == entries["int8"]["before"] and entry["after"]["forget_nll"] > 0
    changes = [abs(entries[n]["after"]["forget_nll"] - entries[n]["before"]["forget_nll"]) for n in ("int8", "int4")]
    assert 0 < changes[0] < changes[1]
    assert entries["retain"]["after"]["forget_nll"] < entries["retain"]["before"]["forget_nll"] - 0.1
    assert {"forget.QA", "forget.all", "retain.QA", "retain.all"} == set(entries["probes"]["before"])
    assert {"forget.case", "retain.in_context"} < set(entries["probes"]["after"])

    def never(*_: Any) -> int:
        raise AssertionError("nothing is missing")

    # What is there is not repeated; what is missing is done, and alone; other settings are refused.
    monkeypatch.setattr(attack_run, "call", never)
    del answer["attacks"][3]
    output.write_text(json.dumps(answer))
    assert command(*arguments) == 0
    again = {entry["name"]: entry for entry in json.loads(output.read_text())["attacks"]}
    same = {name: again[name] for name in entries if name != "int4"}
    assert same == {name: entry for name, entry in entries.items() if name != "int4"}
    assert again["int4"]["after"] == entries["int4"]["after"] and list(again)[-1] == "int4"
    before = output.read_bytes()
    for changed, said in (
        (("--steps", 4), "relearn with steps 3"),
        (("--seed", 1), "of other seed 0 instead of 1"),
    ):
        capsys.readouterr()
        assert command(*arguments, *changed) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error and "--output" in error
    shutil.copy(finished / "original" / "model.safetensors", run_folder / "final")
    assert command(*arguments) == 2 and "of other weights" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_a_failing_training_is_one_line(
    run_folder: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(line: list[str], log: Path) -> int:
        assert line[-2:] == ["--train.batch_size", "3"]
        Path(f"{log}.err").write_text("noise\nerror: train.batch_size 3 does not divide\n")
        return 2

    monkeypatch.setattr(attack_run, "call", fail)
    line = ("--run", run_folder, "--suite", "bios", "--data", run_folder.parent, "--", "--train.batch_size", 3)
    assert command(*line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "training relearn failed: train.batch_size 3 does not divide" in error
    assert not (run_folder / "robustness.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attacks", "relern"], "nearest is 'relearn'"),
        (["--suite", "bois"], "nearest is 'bios'"),
        (["--suite", "lm_eval"], "measures general ability"),
        (["--run", "nowhere"], "cannot read nowhere/config.yaml"),
        (["--data", "nowhere"], "python -m eval.bios"),
        (["--steps", 0], "--steps 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--seed", -1], "--seed -1"),
        (["--ranks", 0], "--ranks 0"),
        (["--batch-size", 0], "--batch-size 0"),
        (["--group", "person"], "row 1 of the forget corpus has only text"),
        (["--output", "answer.txt"], "ends in .json"),
        (["--", "--seed", 3], "override --seed"),
    ],
)
def test_unusable_input(
    run_folder: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    said: str,
) -> None:
    before = sorted(run_folder.rglob("*"))
    given = ("--run", run_folder, "--suite", "bios", "--data", run_folder.parent)
    assert command(*given, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert sorted(run_folder.rglob("*")) == before


def test_what_a_run_does_not_allow(
    run_folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["data"]["retain"] = None
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    given = ("--run", run_folder, "--suite", "bios", "--data", run_folder.parent, "--attacks")
    assert command(*given, "retain") == 2 and "has no retain corpus; leave it out" in capsys.readouterr().err
    (run_folder / "final" / "adapter_config.json").write_text("{}")
    assert command(*given, "int8") == 2 and "model.lora.merge" in capsys.readouterr().err
    shutil.rmtree(run_folder / "final")
    assert command(*given, "int8") == 2 and "has no final/" in capsys.readouterr().err
