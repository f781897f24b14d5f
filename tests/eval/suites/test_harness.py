"""MMLU and WMDP: the harness's own command line, a computation by hand, several ranks, sharded weights, bad input.

The MMLU questions are real ones (`tests/data`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import bios, loading, run
from eval.results.metrics import choose
from eval.suites import bios as bios_suite
from eval.suites import harness
from pipeline.errors import InputError
from tests.distributed import free_port, run_distributed

REPOSITORY = Path(__file__).resolve().parents[3]
SUBJECTS = ("astronomy", "marketing", "miscellaneous")
NUM_QUESTIONS = {
    "astronomy": 7,
    "marketing": 5,
    "miscellaneous": 8,
}  # unequal, so that a plain mean of subjects is wrong
QUIZ = [  # the form of WMDP, not its questions
    {
        "question": f"Which of these is {colour}? ",
        "choices": ["a plum", "a pear", "an apple", "a lime"],
        "answer": answer,
    }
    for colour, answer in (("red", 2), ("green", 1), ("blue", 0), ("sour", 3), ("round", 2), ("oval", 0), ("small", 1))
]
FRUIT = {"red": "apple", "green": "pear", "blue": "plum"}
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}  # every tensor is sharded


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/` (three MMLU subjects, a quiz, three probes); `run/`: a model before and after learning."""
    folder = tmp_path_factory.mktemp("harness")
    texts = []
    for subject in SUBJECTS:
        for split in ("dev", "test"):
            rows = read_rows(data / "mmlu" / split / f"{subject}.jsonl")
            write_rows(folder / "data" / "mmlu" / split / f"{subject}.jsonl", rows)
        texts += [" ".join([row["question"], *row["choices"]]) for row in rows]
    write_rows(folder / "data" / "wmdp" / "wmdp_bio.jsonl", QUIZ)
    probes = [{"split": "retain", "kind": "QA", "prompt": f"{c} fruit:", "answer": f} for c, f in FRUIT.items()]
    write_rows(folder / "data" / "bios" / "probes.jsonl", probes)
    answers = [f"{probe['prompt']} {probe['answer']}\n" for probe in probes]
    tokenizer = bios.build_tokenizer([*texts, *answers])
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.2,  # a timid model gives every question the same answer
    )
    model: Any = LlamaForCausalLM(shape)
    for name, steps in (("exports/step-000001", 0), ("final", 90)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(steps):
            ids = torch.tensor([tokenizer(answers[step % 3]).input_ids])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / "run" / name)
        tokenizer.save_pretrained(folder / "run" / name)
    write_rows(folder / "run" / "metrics.jsonl", [{"step": 1}, {"step": 2}])
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


def by_hand(
    model: Any, tokenizer: Any, subject: str, dev: list[dict[str, Any]], test: list[dict[str, Any]]
) -> list[int]:
    """The choice of each question: the prompt in full, one forward pass for each of the four answers."""

    def put(row: dict[str, Any], answer: str = "") -> str:
        choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
        return f"{row['question'].strip()}\n{choices}Answer:{answer}"

    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    examples = "".join(put(row, f" {'ABCD'[row['answer']]}") + "\n\n" for row in dev)
    chosen = []
    for row in test:
        prompt = head + examples + put(row)
        start = len(tokenizer(prompt).input_ids)
        scores = []
        for letter in "ABCD":
            ids = torch.tensor([tokenizer(f"{prompt} {letter}").input_ids])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
        chosen.append(scores.index(max(scores)))
    return chosen


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
    folder: Path, one_rank: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    harness.write_tasks(tmp_path / "tasks", folder / "data", "mmlu", shots=5)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "mmlu", "--num_fewshot", "5"]
    command += [
        "--model_args",
        f"pretrained={folder / 'run' / 'exports' / 'step-000001'}",
        "--batch_size",
        "8",
        "--device",
        "cpu",
    ]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    suite = one_rank["trajectory"][0]["suites"]["mmlu"]
    for key, name in (("all", "mmlu"), *((subject, f"mmlu_{subject}") for subject in SUBJECTS)):
        assert suite["metrics"]["acc"][key] == theirs[name]["acc,none"]
        assert suite["standard_errors"]["acc"][key] == theirs[name]["acc_stderr,none"]
    assert len({suite["metrics"]["acc"][subject] for subject in SUBJECTS}) == 3  # a mix-up of subjects would show


def test_two_ranks_are_one(folder: Path, one_rank: dict[str, Any], tmp_path: Path) -> None:
    """The quiz and the probes are one batch each, which the second rank can only repeat."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [sys.executable, *launcher, "-m", "eval.run", *arguments(folder, tmp_path / "two.json")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("wrote") == 1
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
    lm = harness.SharedLM(model, tokenizer, batch_size=3, title="")
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
    lm = harness.SharedLM(model, tokenizer, batch_size=64, title="")
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
    harness.SharedLM(model, tokenizer, batch_size=3, title="")
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


ROW = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}


@pytest.mark.parametrize(
    ("suite", "files", "culprit", "remedy"),
    [
        ("wmdp_bio", {}, "wmdp/wmdp_bio.jsonl", "leave --data out"),
        ("wmdp_bio", {"wmdp/wmdp_bio.jsonl": []}, "wmdp_bio.jsonl holds no question", "remove it"),
        ("wmdp_bio", {"wmdp/wmdp_bio.jsonl": [ROW, {"question": "Which?"}]}, "wmdp_bio.jsonl, line 2", "choices"),
        ("wmdp_bio", {"wmdp/wmdp_bio.jsonl": [ROW, {**ROW, "answer": 4}]}, "wmdp_bio.jsonl, line 2", "0 to 3"),
        ("wmdp_bio", {"wmdp/wmdp_bio.jsonl": [{**ROW, "answer": "B"}]}, "wmdp_bio.jsonl, line 1", "0 to 3"),
        ("wmdp_bio", {"wmdp/wmdp_bio.jsonl": [{**ROW, "choices": ["a", "b"]}]}, "line 1", "four texts"),
        ("mmlu", {}, "mmlu/test/SUBJECT.jsonl", "leave --data out"),
        ("mmlu", {"mmlu/test/anatomi.jsonl": [ROW]}, "anatomi.jsonl", "rename"),
        ("mmlu", {"mmlu/test/anatomy.jsonl": [ROW]}, "mmlu/dev/anatomy.jsonl", "--data needs it"),
        ("mmlu", {"mmlu/test/anatomy.jsonl": [ROW], "mmlu/dev/anatomy.jsonl": [ROW]}, "mmlu_anatomy", "fewer"),
    ],
)
def test_unusable_questions(
    tmp_path: Path, suite: str, files: dict[str, list[dict[str, Any]]], culprit: str, remedy: str
) -> None:
    for name, rows in files.items():
        write_rows(tmp_path / name, rows)
    with pytest.raises(InputError) as caught:
        harness.load_probes(tmp_path, suite, **({"shots": 5} if suite == "mmlu" else {}))
    assert culprit in str(caught.value) and remedy in str(caught.value) and "\n" not in str(caught.value)


def test_without_shots_no_examples_are_needed(tmp_path: Path) -> None:
    write_rows(tmp_path / "mmlu" / "test" / "anatomy.jsonl", [ROW])
    assert harness.load_probes(tmp_path, "mmlu", shots=0).shots == 0


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


def test_a_silent_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"suite wmdp_bio.*give --data"):
        harness.load_probes(None, "wmdp_bio")


@pytest.mark.parametrize(
    ("more", "culprit"),
    [
        (["--suite", "mmlu", "--shots", "-1"], "--shots -1"),
        (["--suite", "bios", "--shots", "3"], "--shots belongs to suite mmlu alone"),
        (["--suite", "mmlu", "--ds-config", "zero2.json"], "stage must be 3"),
        (["--suite", "mmlu", "--ds-config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_unusable_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], culprit: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    monkeypatch.setattr(sys, "argv", ["run.py", "--model", "model", "--output", "out.json", *more])
    with pytest.raises(InputError, match=culprit):
        run.main()
    assert os.listdir() == ["zero2.json"]
