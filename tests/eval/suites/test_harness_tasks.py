"""Any task of lm-evaluation-harness: its own model and evaluation, ranks, sharded weights, what is refused.

The rows are real ones (`tests/data/general`); the tasks are those of `docs/examples/tasks` and one of each other kind.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM

from eval import loading, run
from eval.results.conditions import of_evaluation, refuse_different
from eval.suites import harness_tasks, shared_lm
from pipeline.config.schema import REPOSITORY
from pipeline.errors import InputError
from tests.conftest import byte_level_bpe
from tests.distributed import run_distributed

CONTEXT = 64  # tokens: some questions lose their beginning, and the texts have several windows
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}  # every tensor is sharded
ROWS = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 2.0}}
WIKIDATA = {"data_files": {"test": "data/general/wikidata.jsonl"}}
WRITTEN = {  # with examples that are drawn for each question, so that the order of the draws matters
    **ROWS,
    **{"task": "written", "dataset_kwargs": WIKIDATA, "output_type": "generate_until"},
    **{"num_fewshot": 2, "fewshot_split": "test"},
    **{"doc_to_text": "{{context}}", "doc_to_target": "{{continuation}}"},
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(\w)"}, {"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
}
TEXTS = {
    **ROWS,
    **{"task": "texts", "dataset_kwargs": {"data_files": {"test": "data/general/arc_easy.jsonl"}}},
    **{"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{query}} {{choices|join(' ')}}"},
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
GROUP = {
    **{"group": "both", "task": ["arc_easy", "wikidata"], "metadata": {"version": 3}},
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}
BEFORE = {  # choices of what comes before one ending
    **ROWS,
    **{"task": "before", "dataset_kwargs": WIKIDATA, "output_type": "multiple_choice"},
    **{"doc_to_text": 1, "doc_to_target": "{{continuation}}"},
    "doc_to_choice": "{{['The end of it all is', context]}}",
    "metric_list": [{"metric": "acc"}],
}
NAMES = ["both", "written", "texts", "real_authors", "wikitext_lines"]


def write_tasks(folder: Path, data: Path) -> None:
    """`data/` and `tasks/` of every kind, for a command that runs in `folder`."""
    for name in ("general", "tofu"):
        shutil.copytree(data / name, folder / "data" / name)
    (folder / "data" / "wikitext2").mkdir()
    passages = json.loads((data / "rwku" / "Batch" / "1-50" / "passage.json").read_text())
    lines = ["", *(row["text"] for row in passages[:3])]  # the original begins with an empty one
    (folder / "data" / "wikitext2" / "wiki.test.raw").write_text("\n".join(lines))
    shutil.copytree(REPOSITORY / "docs" / "examples" / "tasks", folder / "tasks")
    for name, content in (("written", WRITTEN), ("texts", TEXTS), ("both", GROUP)):
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/general`, `tasks/`, `model/` (a Llama with a context of `CONTEXT` tokens) and `zero3.json`."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, data)
    texts = [file.read_text() for file in sorted((data / "general").glob("*.jsonl"))]
    tokenizer = byte_level_bpe(texts, vocabulary=400)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,  # a timid model gives every question the same answer
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = LlamaForCausalLM(shape)
    facts = [json.loads(line) for line in (data / "general" / "wikidata.jsonl").read_text().splitlines()]
    rows = [torch.tensor(tokenizer(f"{row['context']} {row['continuation']}\n").input_ids) for row in facts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(25):  # it knows some of them
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    return folder


def arguments(folder: Path, output: Path, *more: object) -> list[str]:
    given = ["--model", folder / "model", "--output", output, "--batch-size", 8, "--tasks-dir", folder / "tasks"]
    return ["run.py", *map(str, [*given, "--suite", "lm_eval", "--tasks", *NAMES, *more])]


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, Any]:
    """The suite's answer of one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", arguments(folder, folder / "one.json"))
        run.main()
    return json.loads((folder / "one.json").read_text())


def pairs_of(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[float, float]]:
    """Each score of ours with that of the harness."""
    return [
        (ours["both"]["acc"], theirs["both"]["acc,none"]),
        (ours["both"]["arc_easy"]["acc"], theirs["arc_easy"]["acc,none"]),
        (ours["both"]["arc_easy"]["acc_norm"], theirs["arc_easy"]["acc_norm,none"]),
        (ours["both"]["wikidata"]["acc"], theirs["wikidata"]["acc,none"]),
        (ours["both"]["wikidata"]["perplexity"], theirs["wikidata"]["perplexity,none"]),
        (ours["written"]["chrf,whole"], theirs["written"]["chrf,whole"]),
        (ours["written"]["chrf,first"], theirs["written"]["chrf,first"]),
        (ours["texts"]["word_perplexity"], theirs["texts"]["word_perplexity,none"]),
        (ours["texts"]["bits_per_byte"], theirs["texts"]["bits_per_byte,none"]),
        (ours["real_authors"]["acc"], theirs["real_authors"]["acc,none"]),
        (ours["wikitext_lines"]["word_perplexity"], theirs["wikitext_lines"]["word_perplexity,none"]),
    ]


def test_scores_are_those_of_the_harness(
    folder: Path, one_rank: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own model and its own evaluation, which its command line calls; every digit."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("lm_eval.evaluator_utils.stderr_for_metric", shared_lm.closed_form_stderr)  # else a minute
    simple_evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its type
    theirs = simple_evaluate(
        model=shared_lm.Base(pretrained=str(folder / "model"), device="cpu", batch_size=8),
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
    )
    answer = one_rank["suites"]["lm_eval"]
    results, ours = theirs["results"], answer["metrics"]
    assert list(ours) == NAMES and set(ours["both"]) == {"acc", "arc_easy", "wikidata"}
    pairs = pairs_of(ours, results)
    assert [one for one, _ in pairs] == [other for _, other in pairs]
    assert len({one for one, _ in pairs}) == len(pairs)  # a mix-up would show
    assert answer["standard_errors"]["both"]["arc_easy"]["acc"] == results["arc_easy"]["acc_stderr,none"]
    assert answer["task_versions"] == theirs["versions"] and answer["shots"] == theirs["n-shot"]
    assert answer["higher_is_better"]["texts"] == {"word_perplexity": False, "bits_per_byte": False}
    assert answer["higher_is_better"]["both"]["wikidata"] == theirs["higher_is_better"]["wikidata"]


def test_the_answer_says_what_was_evaluated(one_rank: dict[str, Any]) -> None:
    answer = one_rank["suites"]["lm_eval"]
    assert one_rank["versions"]["lm_eval"] == "0.4.13"
    rows = {"arc_easy": 20, "wikidata": 20, "written": 20, "texts": 20, "real_authors": 5, "wikitext_lines": 4}
    assert answer["counts"]["documents"] == rows
    assert answer["counts"]["cut"]["all"] > 0 and answer["limit"] is None
    assert answer["seeds"] == {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    assert "2 tasks, the first arc_easy" in answer["protocol"]["both"]
    assert "generate_until, 2-shot, no chat template; all documents" in answer["protocol"]["written"]
    assert "data/general/wikidata.jsonl" in answer["protocol"]["written"]


def test_every_model_sees_the_same_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run evaluates many models on tasks that are loaded once: the second draws the examples of the first."""
    monkeypatch.chdir(folder)
    model, tokenizer = loading.load(folder / "model")
    probes = harness_tasks.load_probes(None, tasks=["written"], tasks_dir=folder / "tasks")
    prompts: list[list[str]] = []
    plain = shared_lm.SharedLM.generate_until

    def recorded(self: Any, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        prompts.append([request.args[0] for request in requests])
        return plain(self, requests, disable_tqdm)

    monkeypatch.setattr(shared_lm.SharedLM, "generate_until", recorded)
    first, second = (harness_tasks.evaluate(model, tokenizer, probes, batch_size=8) for _ in range(2))
    assert prompts[0] == prompts[1] and first == second
    assert len({prompt.split("\n")[0] for prompt in prompts[0]}) > 3  # else nothing was drawn


def test_a_limit_takes_the_first_documents(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--limit` of the harness; the mean is that of the first rows by hand."""
    monkeypatch.chdir(folder)
    model, tokenizer = loading.load(folder / "model")
    probes = harness_tasks.load_probes(None, tasks=["wikidata"], tasks_dir=folder / "tasks", limit=7)
    answer = harness_tasks.evaluate(model, tokenizer, probes, batch_size=8)
    likelihoods = []
    for line in (folder / "data" / "general" / "wikidata.jsonl").read_text().splitlines()[:7]:
        row = json.loads(line)
        start = len(tokenizer(row["context"]).input_ids)
        ids = torch.tensor([tokenizer(f"{row['context']} {row['continuation']}").input_ids])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        likelihoods.append(sum(float(log_p[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
    perplexity = math.exp(-sum(likelihoods) / 7)
    assert answer["metrics"]["wikidata"]["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert answer["counts"]["documents"] == {"wikidata": 7} and answer["limit"] == 7
    assert "the first 7 documents" in answer["protocol"]["wikidata"]


def test_rows_in_another_order_are_other_rows(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --limit the first documents are others, and the number of documents shows nothing; a report refuses both."""
    lines = (folder / "data" / "general" / "wikidata.jsonl").read_text().splitlines()
    found = []
    for name, rows in (("there", lines), ("copied", lines), ("shuffled", lines[::-1])):
        (tmp_path / name / "data" / "general").mkdir(parents=True)
        (tmp_path / name / "data" / "general" / "wikidata.jsonl").write_text("\n".join(rows) + "\n")
        monkeypatch.chdir(tmp_path / name)
        loaded = harness_tasks.load_probes(None, tasks=["wikidata"], tasks_dir=folder / "tasks", limit=2)
        result = harness_tasks.evaluate(*loading.load(folder / "model"), loaded)
        found.append(of_evaluation(Path(name), [{"suites": {"lm_eval": result}}]))
    there, copied, shuffled = found
    refuse_different([there, copied], None)
    with pytest.raises(InputError, match="differ in the rows of wikidata;"):
        refuse_different([there, shuffled], None)


def plain_score(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """The log-likelihood of an answer in one forward pass; the beginning of what does not fit is cut."""
    start = len(tokenizer(prompt).input_ids)
    ids = tokenizer(prompt + answer).input_ids
    cut = max(len(ids) - CONTEXT - 1, 0)  # nothing reads the last token
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids[cut:-1]])).logits[0].log_softmax(-1)
    return sum(float(log_p[at - cut - 1, ids[at]]) for at in range(start, len(ids)))


def test_texts_of_each_kind_of_task(folder: Path, one_rank: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plain loop chooses; a text that is only scored has no answer."""
    monkeypatch.chdir(folder)
    model: Any = loading.load(folder / "model")[0]
    tokenizer = loading.load(folder / "model")[1]
    kept = one_rank["suites"]["lm_eval"]["texts"]
    assert {name: len(rows) for name, rows in kept.items()} == {
        **{"arc_easy": 20, "wikidata": 20, "written": 20, "real_authors": 5}
    }
    rows = [json.loads(line) for line in (folder / "data/general/arc_easy.jsonl").read_text().splitlines()]
    for row, shown in zip(rows, kept["arc_easy"], strict=True):
        scores = [plain_score(model, tokenizer, f"{row['query']}\nAnswer:", f" {one}") for one in row["choices"]]
        chosen = row["choices"][scores.index(max(scores))]
        assert (shown["prompt"], shown["expected"]) == (f"{row['query']}\nAnswer:", row["choices"][row["gold"]])
        assert shown["answer"] == chosen
    rows = [json.loads(line) for line in (folder / "data/general/wikidata.jsonl").read_text().splitlines()]
    known = []
    for row, shown in zip(rows, kept["wikidata"], strict=True):
        ids = tokenizer(f"{row['context']} {row['continuation']}").input_ids
        start = len(tokenizer(row["context"]).input_ids)
        with torch.no_grad():
            greedy = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        known.append(greedy[start - 1 : -1] == ids[start:])
        answer = row["continuation"] if known[-1] else "(another text)"
        assert shown == {"prompt": row["context"], "expected": row["continuation"], "answer": answer}
    assert 0 < sum(known) < 20
    assert [row["prompt"] for row in kept["written"]] == [row["context"] for row in rows], "without the examples"
    assert all("\n" not in row["answer"] for row in kept["written"]) and any(row["answer"] for row in kept["written"])


def test_texts_of_choices_before_an_ending(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(BEFORE))
    model, tokenizer = loading.load(folder / "model")
    probes = harness_tasks.load_probes(None, tasks=["before"], tasks_dir=tmp_path, limit=6)
    found = harness_tasks.evaluate(model, tokenizer, probes, batch_size=8)
    right = [shown["answer"] == shown["expected"] for shown in found["texts"]["before"]]
    rows = [json.loads(line) for line in (folder / "data/general/wikidata.jsonl").read_text().splitlines()][:6]
    assert [row["expected"] for row in found["texts"]["before"]] == [row["context"] for row in rows]
    assert found["texts"]["before"][0]["prompt"] == f"… {rows[0]['continuation']}"
    assert sum(right) / 6 == found["metrics"]["before"]["acc"]


def evaluate_sharded(folder: Path, output: Path) -> None:
    os.chdir(folder)
    sys.argv = arguments(folder, output, "--ds-config", folder / "zero3.json", "--local_rank=0")
    run.main()


def test_sharded_weights_on_two_ranks_give_the_scores_of_one(
    folder: Path, one_rank: dict[str, Any], tmp_path: Path
) -> None:
    """Every kind of request: an odd number of batches, windows of different lengths, texts that end early."""
    run_distributed(evaluate_sharded, 2, folder, tmp_path / "two.json", timeout=250)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["ranks"] == 2 and "deepspeed" in two["versions"]
    ours, theirs = two["suites"]["lm_eval"], one_rank["suites"]["lm_eval"]
    assert ours.pop("metrics") == approximately(theirs["metrics"])
    assert ours.pop("standard_errors") == approximately(theirs["standard_errors"])
    assert ours == {key: value for key, value in theirs.items() if key in ours}


def approximately(nested: Any) -> Any:
    """The same numbers to 1e-6, at any depth."""
    if isinstance(nested, dict):
        return {key: approximately(value) for key, value in nested.items()}
    return nested if nested is None else pytest.approx(nested, rel=1e-6)
