"""MMLU and WMDP: the harness's own command line, a computation by hand, several ranks, sharded weights."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval.__main__ import cli_evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from eval import loading, run
from eval.results.metrics import choose
from eval.suites import bios as bios_suite
from eval.suites import harness
from pipeline.errors import InputError
from tests.distributed import run_distributed
from tests.eval.suites.questions import (
    FRUIT,
    NUM_QUESTIONS,
    QUIZ,
    ROW,
    SUBJECTS,
    by_hand,
    make_folder,
    read_rows,
    write_rows,
)

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}  # every tensor is sharded


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions, and a run that is asked them (`make_folder`)."""
    folder = tmp_path_factory.mktemp("harness")
    make_folder(folder, data)
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    return folder


def arguments(folder: Path, output: Path, *more: object) -> list[str]:
    given = ["--model", folder / "run", "--data", folder / "data", "--output", output, "--batch-size", 8, *more]
    return [*map(str, given), "--suite", "mmlu", "wmdp_bio", "bios"]


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, Any]:
    """The answer of one rank on the run: two models, three suites."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", *arguments(folder, folder / "one.json")])
        run.main()
    return json.loads((folder / "one.json").read_text())


def test_scores_are_those_of_a_computation_by_hand(folder: Path, one_rank: dict[str, Any]) -> None:
    blank = folder / "run" / "exports" / "step-000001"  # the other model prefers one letter throughout
    model: Any = AutoModelForCausalLM.from_pretrained(blank)
    tokenizer = AutoTokenizer.from_pretrained(blank)
    suites = one_rank["trajectory"][0]["suites"]
    dev, test = (read_rows(folder / "data" / "mmlu" / split / "astronomy.jsonl") for split in ("dev", "test"))
    for given, rows, chosen in (
        (suites["mmlu"]["metrics"]["acc"]["astronomy"], test, by_hand(model, tokenizer, "astronomy", dev, test)),
        (suites["wmdp_bio"]["metrics"]["acc"]["all"], QUIZ, by_hand(model, tokenizer, "biology", [], QUIZ)),
    ):
        assert given == sum(c == row["answer"] for c, row in zip(chosen, rows, strict=True)) / len(rows)
        assert len(set(chosen)) > 1  # else the test would show little


def test_texts_are_the_questions_with_the_choices_of_a_computation_by_hand(
    folder: Path, one_rank: dict[str, Any]
) -> None:
    blank = folder / "run" / "exports" / "step-000001"
    model: Any = AutoModelForCausalLM.from_pretrained(blank)
    tokenizer = AutoTokenizer.from_pretrained(blank)
    suites = one_rank["trajectory"][0]["suites"]

    def rows_of(rows: list[dict[str, Any]], chosen: list[int]) -> list[dict[str, str]]:
        shown = [[f"{'ABCD'[at]}. {text}" for at, text in enumerate(row["choices"])] for row in rows]
        return [
            {"prompt": row["question"].strip(), "expected": texts[row["answer"]], "answer": texts[choice]}
            for row, texts, choice in zip(rows, shown, chosen, strict=True)
        ]

    assert suites["wmdp_bio"]["texts"] == {"all": rows_of(QUIZ, by_hand(model, tokenizer, "biology", [], QUIZ))}
    mmlu = []
    for subject in SUBJECTS:
        dev, test = (read_rows(folder / "data" / "mmlu" / split / f"{subject}.jsonl") for split in ("dev", "test"))
        mmlu += rows_of(test, by_hand(model, tokenizer, subject, dev, test))
    assert suites["mmlu"]["texts"] == {"all": mmlu}, "20 of 20, of all subjects together"


@pytest.mark.parametrize(("suite", "subject"), [("wmdp_chem", "chemistry"), ("wmdp_cyber", "cybersecurity")])
def test_the_other_parts_of_wmdp(folder: Path, tmp_path: Path, suite: str, subject: str) -> None:
    write_rows(tmp_path / "wmdp" / f"{suite}.jsonl", QUIZ)
    model, tokenizer = loading.load(folder / "run" / "exports" / "step-000001")
    answer = harness.evaluate(model, tokenizer, harness.load_probes(tmp_path, suite))
    chosen = by_hand(model, tokenizer, subject, [], QUIZ)
    right = sum(c == row["answer"] for c, row in zip(chosen, QUIZ, strict=True))
    assert answer["metrics"]["acc"] == {"all": right / len(QUIZ)} and answer["counts"]["questions"] == {"all": 7}
    assert choose([suite, "mmlu"]).forget == f"{suite}.acc.all"


def test_the_answer_says_what_was_asked(folder: Path, one_rank: dict[str, Any]) -> None:
    assert one_rank["versions"]["lm_eval"] == "0.4.13" and one_rank["ranks"] == 1
    suites = one_rank["trajectory"][0]["suites"]
    assert suites["mmlu"]["counts"] == {"questions": {"all": 20, **NUM_QUESTIONS}, "cut": {"all": 0}}
    accuracy = suites["mmlu"]["metrics"]["acc"]
    assert accuracy["all"] == pytest.approx(sum(accuracy[s] * NUM_QUESTIONS[s] for s in SUBJECTS) / 20, abs=1e-12)
    assert suites["mmlu"]["shots"] == 5 and suites["wmdp_bio"]["shots"] == 0
    assert suites["mmlu"]["seeds"] == {"fewshot": 1234}
    assert suites["wmdp_bio"]["counts"] == {"questions": {"all": len(QUIZ)}, "cut": {"all": 0}}
    assert str(folder / "data") in suites["mmlu"]["protocol"] and "5-shot" in suites["mmlu"]["protocol"]


def test_mmlu_is_the_harness_command_line_subject_by_subject(
    folder: Path, one_rank: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    harness.write_tasks(tmp_path / "tasks", folder / "data", "mmlu", shots=5)
    command = ["lm_eval", "run", "--model", "hf", "--tasks", "mmlu", "--num_fewshot", "5"]
    command += [
        "--model_args",
        f"pretrained={folder / 'run' / 'exports' / 'step-000001'}",
        "--batch_size",
        "8",
        "--device",
        "cpu",
    ]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    cli_evaluate()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    suite = one_rank["trajectory"][0]["suites"]["mmlu"]
    for key, name in (("all", "mmlu"), *((subject, f"mmlu_{subject}") for subject in SUBJECTS)):
        assert suite["metrics"]["acc"][key] == theirs[name]["acc,none"]
        assert suite["standard_errors"]["acc"][key] == theirs[name]["acc_stderr,none"]
    assert len({suite["metrics"]["acc"][subject] for subject in SUBJECTS}) == 3  # a mix-up of subjects would show


def evaluate_listened(folder: Path, output: Path) -> None:
    """The command; what each rank says goes to a file beside `output`."""
    sys.argv = ["run.py", *arguments(folder, output)]
    with output.with_suffix(f".{os.environ['RANK']}").open("w") as file, redirect_stdout(file):
        run.main()


def test_two_ranks_are_one(folder: Path, one_rank: dict[str, Any], tmp_path: Path) -> None:
    """The quiz and the probes are one batch each, which the second rank can only repeat."""
    run_distributed(evaluate_listened, 2, folder, tmp_path / "two.json")
    outputs = [(tmp_path / f"two.{rank}").read_text() for rank in (0, 1)]
    assert [text.count("wrote") for text in outputs] == [1, 0]
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["ranks"] == 2
    assert two["trajectory"] == one_rank["trajectory"]
    assert [entry["suites"]["bios"]["metrics"]["retain"]["all"] for entry in two["trajectory"]] == [0.0, 1.0]


def on_all_ranks(number: int) -> list[int]:
    numbers = [0, 0]
    torch.distributed.all_gather_object(numbers, number)
    return numbers


def evaluate_sharded(folder: Path, output: Path, expected: list[float]) -> None:
    """The command, and what it does not tell: that the weights are sharded, and the likelihoods."""
    sys.argv = ["run.py", *arguments(folder, output, "--ds-config", folder / "zero3.json", "--local_rank=0")]
    run.main()
    model, tokenizer = loading.load(folder / "run" / "final", ZERO3)
    for parameter in model.parameters():
        assert parameter.numel() == 0 and parameter.ds_tensor.numel() < parameter.ds_numel  # pyright: ignore
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert quiz_likelihoods(model, tokenizer) == pytest.approx(expected, rel=1e-5)
    assert on_all_ranks(len(calls)) == [2, 2]  # three batches: the second rank repeats the last
    calls.clear()
    prompts = [f"{colour} fruit:" for colour in FRUIT] + ["pear"]  # the last goes on for longer
    assert bios_suite.answer(model, tokenizer, prompts, batch_size=1, title="")[:3] == list(FRUIT.values())
    first, second = on_all_ranks(len(calls))
    assert first == second  # ranks generate until the last of them is done


class Request:
    """What the harness asks of a model."""

    def __init__(self, context: str, continuation: str) -> None:
        self.args = (context, continuation)


def quiz_likelihoods(model: Any, tokenizer: Any) -> list[float]:
    """Of every answer to every question of the quiz, in batches of three."""
    requests = [Request(row["question"] + "Answer:", f" {letter}") for row in QUIZ for letter in "ABCD"]
    lm = harness.language_model(model, tokenizer, batch_size=3, title="")
    return [likelihood for likelihood, _ in lm.loglikelihood(requests)]


def test_sharded_weights_give_the_scores_of_whole_ones(folder: Path, one_rank: dict[str, Any], tmp_path: Path) -> None:
    expected = quiz_likelihoods(*loading.load(folder / "run" / "final"))
    run_distributed(evaluate_sharded, 2, folder, tmp_path / "two.json", expected, timeout=250)
    sharded = json.loads((tmp_path / "two.json").read_text())
    assert sharded["trajectory"] == one_rank["trajectory"]
    assert "deepspeed" in sharded["versions"] and "--local_rank" not in sharded["command"]


def test_a_batch_has_a_limit_of_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are 4 bytes times tokens times vocabulary, whatever `--batch-size` says."""
    model, tokenizer = loading.load(folder / "run" / "final")
    model.config.max_position_embeddings = 90  # of the longest prompts, the end alone
    requests = [
        Request(f"{'pear ' * (3 * n)}fruit:", f" {answer}")
        for n in range(40)
        for answer in ("lime", "plum", "an apple")
    ]
    shapes: list[tuple[int, int]] = []
    model.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.logits.shape[:2])))
    lm = harness.language_model(model, tokenizer, batch_size=64, title="")
    whole = lm.loglikelihood(requests)
    assert max(rows * width for rows, width in shapes) > 2000
    shapes.clear()
    monkeypatch.setattr("eval.suites.scoring.MOST_TOKENS", 100)
    limited = lm.loglikelihood(requests)
    assert all(rows * width <= 100 or rows == 1 for rows, width in shapes)
    assert max(rows for rows, _ in shapes) > 3 and max(width for _, width in shapes) == 90
    assert [one for one, _ in limited] == pytest.approx([one for one, _ in whole], rel=1e-4)
    assert [greedy for _, greedy in limited] == [greedy for _, greedy in whole]


def test_a_tokenizer_without_beginning_and_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without padding, for which the harness would add a token that the model does not have."""
    trained = AutoTokenizer.from_pretrained(folder / "run" / "final")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "run" / "exports" / "step-000001")
    for name in ("exports/step-000001", "final"):
        shutil.copytree(folder / "run" / name, tmp_path / "run" / name)
        for file in (tmp_path / "run" / name).glob("*token*"):
            file.unlink()
        tokenizer.save_pretrained(tmp_path / "run" / name)
    shutil.copy(folder / "run" / "metrics.jsonl", tmp_path / "run")
    given = ["--model", tmp_path / "run", "--data", folder / "data", "--output", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, given), "--suite", "mmlu", "bios"])
    run.main()
    first, last = json.loads((tmp_path / "out.json").read_text())["trajectory"]
    dev, test = (read_rows(folder / "data" / "mmlu" / split / "astronomy.jsonl") for split in ("dev", "test"))
    chosen = by_hand(model, tokenizer, "astronomy", dev, test)
    right = sum(c == row["answer"] for c, row in zip(chosen, test, strict=True)) / len(test)
    assert first["suites"]["mmlu"]["metrics"]["acc"]["astronomy"] == right
    assert last["suites"]["bios"]["metrics"]["retain"]["all"] == 1.0
    size = len(tokenizer)
    harness.language_model(model, tokenizer, batch_size=3, title="")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == (None, None, None, size)


def test_a_prompt_that_does_not_fit_is_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loading.load(folder / "run" / "final")
    model.config.max_position_embeddings = 200
    rows = [QUIZ[0], {**QUIZ[1], "question": "pear " * 300}]
    write_rows(tmp_path / "wmdp" / "wmdp_cyber.jsonl", rows)
    answer = harness.evaluate(model, tokenizer, harness.load_probes(tmp_path, "wmdp_cyber"))
    assert answer["counts"] == {"questions": {"all": 2}, "cut": {"all": 1}}
    assert "lost their beginning" in capsys.readouterr().err


def test_without_data_the_hub_is_asked_for_all_subjects(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is played by a function: 57 subjects, of which astronomy has three questions and the others one."""
    asked = []

    def load_dataset(path: str, name: str, **_: Any) -> DatasetDict:
        asked.append((path, name))
        rows = [{**ROW, "question": f"{name} {i}?"} for i in range(3 if name == "astronomy" else 1)]
        return DatasetDict({"test": Dataset.from_list(rows), "dev": Dataset.from_list([ROW, ROW])})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    probes = harness.load_probes(None, "mmlu", shots=2)
    assert len(set(asked)) == 57 and {path for path, _ in asked} == {"cais/mmlu"}
    answer = harness.evaluate(*loading.load(folder / "run" / "final"), probes)
    counts, accuracy = answer["counts"]["questions"], answer["metrics"]["acc"]
    assert counts.pop("all") == 59 and counts["astronomy"] == 3 and len(counts) == 57
    assert accuracy["all"] == pytest.approx(
        sum(accuracy[name] * count for name, count in counts.items()) / 59, abs=1e-12
    )
    with pytest.raises(InputError, match="--shots 3"):
        harness.load_probes(None, "mmlu", shots=3)
