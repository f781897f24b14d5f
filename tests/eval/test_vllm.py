"""The backend vllm, with a stub of its interface: the scores are those of transformers."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from eval import evaluation, run, vllm_model
from eval.suites import shared_lm
from pipeline.errors import InputError
from tests.conftest import World
from tests.eval import vllm_stub
from tests.eval.suites.questions import QUIZ, write_rows

TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The stub in the place of the package; the arguments of the engines that it made."""
    monkeypatch.setitem(sys.modules, "vllm", vllm_stub)
    monkeypatch.setattr(vllm_model, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(evaluation, "version", lambda name: "0.11" if name == "vllm" else version(name))
    vllm_stub.LLM.made.clear()
    return vllm_stub.LLM.made


@pytest.fixture
def data(world: World, tmp_path: Path) -> Path:
    """What suites corpus, bios, wmdp_bio and a task of one's own read; the prompts fit the model's vocabulary."""
    for task in ("forget", "retain"):
        write_rows(tmp_path / "corpus" / f"{task}.jsonl", [{"text": text} for text in world.documents(task)[:7]])
    probes = [{"split": "retain", "kind": "QA", "prompt": text, "answer": "mi"} for text in ("kara lo", "mi", "ne su")]
    write_rows(tmp_path / "probes.jsonl", probes)
    write_rows(tmp_path / "wmdp" / "wmdp_bio.jsonl", QUIZ)
    (tmp_path / "choices.yaml").write_text(TASK.format(file=tmp_path / "wmdp" / "wmdp_bio.jsonl"))
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, model: Path, data: Path, *more: str) -> dict[str, Any]:
    given = ["run.py", "--model", model, "--data", data, "--output", data / "scores.json", *more]
    monkeypatch.setattr(sys, "argv", [*map(str, given)])
    run.main()
    return json.loads((data / "scores.json").read_text())


def test_scores_are_those_of_transformers(
    world: World, data: Path, vllm: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["--suite", "corpus", "bios", "wmdp_bio", "lm_eval", "--tasks", "choices", "--tasks-dir", str(data)]
    expected = command(monkeypatch, world.folder / "model", data, *names)
    assert not vllm
    found = command(monkeypatch, world.folder / "model", data, *names, "--backend", "vllm")
    own = {"model": str(world.folder / "model"), "dtype": "float32", "load_format": "safetensors", "gpus": 1}
    assert vllm == [own] and found["versions"]["vllm"] == "0.11" and found["dtype"] == "float32"
    for suite in ("corpus", "bios"):
        assert found["suites"][suite]["texts"] == expected["suites"][suite]["texts"]
    for suite in ("bios", "wmdp_bio", "lm_eval"):
        assert found["suites"][suite]["metrics"] == expected["suites"][suite]["metrics"]
    for split, scores in expected["suites"]["corpus"]["metrics"].items():
        assert found["suites"]["corpus"]["metrics"][split] == pytest.approx(scores, rel=1e-5)


def test_likelihoods_of_the_harness_are_those_of_transformers(
    world: World, vllm: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of answers with several tokens, in contexts longer than the model's, and of whole texts."""
    from eval.loading import NO_TRUST, load
    from tests.eval.suites.test_harness import Request

    requests = [Request("kara lo mi ne", f" {text}") for text in ("su", "su kato", "lora vi mi", "kara")]
    answers = []
    for model, tokenizer in (load(world.folder / "model"), vllm_model.load_vllm(world.folder / "model", NO_TRUST)):
        lm = shared_lm.language_model(model, tokenizer, 4, "")
        answers.append((lm.loglikelihood(requests), lm.loglikelihood_rolling([Request("kara lo mi", "")])))
    (theirs, whole), (ours, summed) = answers
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert summed == pytest.approx(whole, rel=1e-5)


def test_a_task_in_which_the_model_writes_is_refused(world: World, vllm: list[dict[str, Any]]) -> None:
    from eval.loading import NO_TRUST

    model, tokenizer = vllm_model.load_vllm(world.folder / "model", NO_TRUST)
    request: Any = type("Request", (), {"task_name": "gsm8k"})()
    with pytest.raises(InputError, match=r"in gsm8k the model writes.*leave --backend out"):
        shared_lm.language_model(model, tokenizer, 1, "lm_eval").generate_until([request])


def test_a_text_as_long_as_the_context_is_refused(world: World, vllm: list[dict[str, Any]]) -> None:
    from eval.loading import NO_TRUST

    model: Any = vllm_model.load_vllm(world.folder / "model", NO_TRUST)[0]
    model.config.max_position_embeddings = 8
    with pytest.raises(InputError, match=r"a text has 8 tokens, and vLLM scores at most 7"):
        model.score([[3] * 8])


@pytest.mark.parametrize(
    ("suites", "more", "ranks", "message"),
    [
        (["tofu"], [], 1, "suite tofu reads the distribution over all tokens"),
        (["bios"], ["--device-map", "auto"], 1, "places the weights itself"),
        (["bios"], [], 2, "there are 2; start one"),
    ],
)
def test_what_does_not_go_with_it(
    suites: list[str],
    more: list[str],
    ranks: int,
    message: str,
    world: World,
    tmp_path: Path,
    vllm: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match=message):
        command(monkeypatch, world.folder / "model", tmp_path, "--suite", *suites, "--backend", "vllm", *more)
    assert not vllm


def test_a_missing_package_is_named_before_a_model_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"vllm is not installed; run `pip install vllm`"):
        command(monkeypatch, tmp_path / "nowhere", tmp_path, "--suite", "bios", "--backend", "vllm")


def test_an_adapter_is_refused(tmp_path: Path, vllm: list[dict[str, Any]]) -> None:
    from eval.loading import NO_TRUST

    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"is an adapter; export with model\.lora\.merge"):
        vllm_model.load_vllm(tmp_path, NO_TRUST)
