"""The answers that evaluations keep, and how the report shows them: each checked against the model's own answers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.evaluation import evaluate_all, find_models, load_suites
from eval.loading import load
from eval.reporting import run_report
from eval.reporting.answers import Answers, answers_html, answers_markdown, changed
from eval.results import grouping, texts, trajectories
from eval.results.metrics import MEASURES
from eval.suites import bios, corpus, rwku, scoring, tofu
from eval.suites.rouge import recall_rouge
from eval.suites.texts import MOST_TEXTS, Answered, choose_texts
from pipeline.errors import InputError
from tests.conftest import World
from tests.eval.runs import make_run

BIOS = MEASURES[0]
Rows = list[dict[str, str]]


def row(prompt: str, answer: str, expected: str = "right") -> dict[str, str]:
    return {"prompt": prompt, "expected": expected, "answer": answer}


def test_at_most_twenty_of_a_set_and_always_the_same() -> None:
    def ask(message: str) -> dict[str, list[Answered]]:
        sets = ["a"] * 70 + ["b"] * 3
        rows = [Answered(prompt=str(at), expected="", answer=f"{message}{at}") for at in range(73)]
        return choose_texts(zip(sets, rows, strict=True))

    one, other = ask("x"), ask("y")
    assert MOST_TEXTS == 20 and len(one["a"]) == 20 and [r["prompt"] for r in one["b"]] == ["70", "71", "72"]
    chosen = [int(r["prompt"]) for r in one["a"]]
    assert chosen == sorted({*chosen}) and chosen == [int(r["prompt"]) for r in other["a"]]
    assert min(chosen) < 20 and max(chosen) > 50, "from everywhere, not the first ones"
    assert all(r["answer"] == f"x{r['prompt']}" for r in one["a"])


@pytest.fixture
def model(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A tiny model whose answer to the n-th prompt is `said n`, and whose losses are 1: what is kept, not how it is
    computed."""
    monkeypatch.setattr(scoring, "answer", lambda m, t, prompts, **_: [f"said {n}" for n in range(len(prompts))])
    monkeypatch.setattr(scoring, "answer_losses", lambda m, answers, **_: [1.0] * len(answers))
    folder = world.folder / "model"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_every_suite_that_generates_keeps_prompt_expected_and_answer(model: tuple[Any, Any], data: Path) -> None:
    questions = [probe for probe in rwku.load_probes(data) if probe["set"] in rwku.QUESTIONS]
    cases = [
        (bios, bios.load_probes(None), ("split", "prompt", "answer")),
        (tofu, tofu.load_probes(data), ("set", "question", "answer")),
        (rwku, questions, ("set", "query", "answer")),
    ]
    for suite, probes, (name, prompt, answer) in cases:
        kept: dict[str, Rows] = suite.evaluate(*model, probes)["texts"]
        assert {*kept} == {probe[name] for probe in probes}
        numbers = {(p[name], p[prompt], p[answer], f"said {n}") for n, p in enumerate(probes)}
        for set_name, rows in kept.items():
            assert len(rows) == min(20, sum(probe[name] == set_name for probe in probes))
            assert {(set_name, r["prompt"], r["expected"], r["answer"]) for r in rows} <= numbers


def test_a_document_is_kept_as_its_halves(world: World, model: tuple[Any, Any]) -> None:
    texts_ = world.documents("forget")[:4]
    probes = [{"split": "forget", "text": text} for text in texts_]
    probes.append({"split": "retain", "prompt": "kara lo", "response": "mivi su"})
    kept = corpus.evaluate(*model, probes)["texts"]
    whole = ["".join((r["prompt"] + r["expected"]).split()) for r in kept["forget"]]
    assert whole == ["".join(text.split()) for text in texts_]
    assert [r["answer"] for r in kept["forget"]] == [f"said {n}" for n in range(4)]
    assert kept["retain"] == [row("kara lo", "said 4", "mivi su")]


def test_what_a_model_says_that_never_saw_the_text() -> None:
    """By its definition: of the other documents of the split with another ending, the one that shares most words."""
    prompts = ["the job of Ann is", "the job of Bob is", "the cat of Bob has", "the job of Ann is"]
    endings = ["a baker in Rome", "a nurse in Rome", "two tails", "a baker in Rome"]
    found = corpus.unseen_recalls(["forget"] * 4, prompts, endings)
    # 0 and 3 say the same and do not count for each other: both have 1 as the nearest; 1 has 0 (4 of 6 words).
    # 2 shares the, of, Bob with 1 (3 of 7 words), and the, of with the others.
    nearest = {0: 1, 1: 0, 2: 1, 3: 1}
    assert found == {at: recall_rouge([endings[at]], [endings[other]])[0] for at, other in nearest.items()}
    assert found[0] == 3 / 4 and found[2] == 0.0
    assert corpus.unseen_recalls(["a", "b"], ["x", "y"], ["one", "two"]) == {}, "nothing to compare with"


def test_a_retain_file_that_the_training_saw_is_noticed(world: World, tmp_path: Path) -> None:
    """Through the evaluation of a run: three of the five documents are in the run's own corpus."""
    run_folder, data = tmp_path / "run", tmp_path / "data"
    config = world.configuration(run_folder)
    (run_folder / "exports" / "step-1").mkdir(parents=True)
    data.mkdir()
    (run_folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (run_folder / "config.yaml").write_text(json.dumps(config))
    for file in (world.folder / "model").iterdir():
        (run_folder / "exports" / "step-1" / file.name).write_bytes(file.read_bytes())
    seen = world.documents("retain")[:3]
    (data / "forget.txt").write_text("\n".join(world.documents("forget")[:2]))
    (data / "retain.txt").write_text(
        "\n".join([seen[0].upper(), "  ".join(seen[1].split()), seen[2], "ne su", "lo lo"])
    )
    suites = load_suites(["corpus"], data, {})
    entries, _ = evaluate_all(find_models(run_folder), suites, 8, load)
    assert entries[0]["suites"]["corpus"]["retain_seen"] == {"documents": 5, "seen": 3}
    probes = suites[0].probes
    assert corpus.seen_in_training(probes, {"data": {"retain": {"path": str(tmp_path / "gone.jsonl")}}}) is None
    assert corpus.seen_in_training(probes, {"data": {"retain": None}}) is None


# ---------------------------------------------------------------------------------------------------------------------
# The report


def put(folder: Path, kept: dict[int, dict[str, Rows]], **further: Any) -> None:
    """Texts into the evaluation of a run, by step."""
    path = folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for entry in evaluation["trajectory"]:
        entry["suites"]["bios"] |= {"texts": kept.get(entry["step"], {}), **further}
    path.write_text(json.dumps(evaluation))


def scores(forget: float, retain: float) -> dict[str, dict[str, Any]]:
    return {"bios": {"forget": {"all": forget}, "retain": {"all": retain}}}


@pytest.fixture
def groups(tmp_path: Path) -> dict[str, list[trajectories.Run]]:
    """Two methods: sago is below the level from step 20 on, sum never."""
    sago = make_run(tmp_path / "sago", [scores(0.5, 0.9), scores(0.05, 0.8), scores(0.0, 0.7)])
    plain = make_run(tmp_path / "sum", [scores(0.9, 0.9), scores(0.6, 0.5)], rule="sum")
    for folder, steps in ((sago, (10, 20, 30)), (plain, (10, 20))):
        put(folder, {s: {"retain": [row("c", "kept")], "forget": [row("a", f"{folder.name} {s}"), row("b", "<b>x</b>")]}
                     for s in steps})  # fmt: skip
    runs = [trajectories.prepare(trajectories.read_run(folder), BIOS, None) for folder in (sago, plain)]
    return grouping.group_runs(runs)


def test_prompts_are_paired_with_the_target_and_read_at_the_level(groups: dict[str, list[trajectories.Run]]) -> None:
    target = {"bios.retain": [row("c", "kept")], "bios.forget": [row("b", "old b"), row("lost", ""), row("a", "old a")]}
    found = texts.compare_texts(groups, BIOS, target)
    assert found.before and found.names == ("before", "npo+nll sago, step 20", "npo+nll sum, step 20")
    assert list(found.sets) == ["bios.forget", "bios.retain"], "what must go comes first"
    assert [(one.prompt, one.answers) for one in found.sets["bios.forget"]] == [
        ("b", ("old b", "<b>x</b>", "<b>x</b>")),
        ("a", ("old a", "sago 20", "sum 20")),
    ]
    assert not texts.compare_texts(groups, BIOS, {}).before
    old = {"bios.forget": [row("another prompt", "")]}
    assert texts.compare_texts(groups, BIOS, old).sets == {}


def test_the_page_shows_them_first_after_the_verdict(groups: dict[str, list[trajectories.Run]], tmp_path: Path) -> None:
    target = {"bios.forget": [row("a", "old sago"), row("b", "<script>alert(1)</script>")]}
    run_report.write_report(tmp_path / "report", groups, BIOS, None, target)
    page = (tmp_path / "report" / "index.html").read_text()
    order = [page.index(part) for part in ('class="verdict"', '<h2 id="what-the', "old", '<h2 id="results')]
    assert order == sorted(order)
    assert "<script>alert" not in page and "<b>x</b>" not in page and "&lt;b&gt;x&lt;/b&gt;" in page
    assert "<small>before</small><span><del>old</del> sago</span>" in page
    assert "<span>sago <ins>20</ins></span>" in page and "<span><ins>sum 20</ins></span>" in page
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "| a | right | **old** sago | sago **20** | **sum 20** |" in markdown
    for line in re.findall(r"(?m)^\| [ab] \|.*", markdown):
        assert len(re.findall(r"(?<!\\)\|", line)) == 6


def test_what_no_model_wrote_is_called_so_and_wmdp_must_go() -> None:
    rows = [{"prompt": "a", "expected": "right", "teacher_forced": message} for message in ("old", "new")]
    forced = texts.pair_up([rows[:1], rows[1:]])
    assert forced == [texts.Sides("a", "right", ("old", "new"), teacher_forced=True)]
    assert texts.pair_up([rows[:1], [row("a", "written")]]) == [], "of two kinds"
    title = texts.title_of_set("probes.forget", forced)
    assert title.startswith("What must go: forget (probes); not written but the likeliest token at each place")
    plain = [texts.Sides("a", "right", ("old", "new"))]
    titles = [texts.title_of_set(name, plain) for name in ("wmdp_bio.all", "mmlu.all", "bios.forget", "lm_eval.arc")]
    kept = ["What must go: WMDP Bio", "What should stay: MMLU", "What must go: forget (bios)"]
    assert titles == [*kept, "What should stay: arc (lm_eval)"]
    entry = {"suites": {"probes": {"texts": {"forget": rows}}}}
    assert texts.texts_of(entry, Path("here")) == {"probes.forget": rows}
    with pytest.raises(InputError, match=r"suite probes has texts that eval\.run did not write"):
        texts.texts_of({"suites": {"probes": {"texts": {"forget": [{"prompt": "a"}]}}}}, Path("here"))


def test_old_evaluations_have_no_text_and_the_report_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "old", [scores(0.5, 0.9), scores(0.05, 0.8)])
    runs = [trajectories.prepare(trajectories.read_run(folder), BIOS, None)]
    run_report.write_report(tmp_path / "report", grouping.group_runs(runs), BIOS, None)
    assert "No text to show" in (tmp_path / "report" / "report.md").read_text()


def test_a_rehearsed_retain_file_is_reported(tmp_path: Path) -> None:
    measure = next(one for one in MEASURES if one.suite == "corpus")
    of = {"forget": {"rouge": 0.1, "probability": 0.1}, "retain": {"probability": 0.5}}
    folder = make_run(tmp_path / "run", [{"corpus": of}])
    path = folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["trajectory"][-1]["suites"]["corpus"]["retain_seen"] = {"documents": 5, "seen": 3}
    path.write_text(json.dumps(evaluation))
    runs = [trajectories.prepare(trajectories.read_run(folder), measure, None)]
    run_report.write_report(tmp_path / "report", grouping.group_runs(runs), measure, None)
    assert f"3 of 5 documents ({folder})" in (tmp_path / "report" / "report.md").read_text()


def test_words_that_differ_are_marked() -> None:
    before, after = changed("Ann lives in Rome now", "Ann lived in Paris now")
    assert [piece for piece, mark in before if mark] == ["lives", "Rome"]
    assert [piece for piece, mark in after if mark] == ["lived", "Paris"]
    assert "".join(piece for piece, _ in before) == "Ann lives in Rome now"
    assert changed("same", "same") == ([("same", False)], [("same", False)])


def test_a_long_prompt_is_cut_at_its_beginning_and_nothing_is_said_as_such() -> None:
    sides = texts.Sides("x" * 1000 + " the end", "right", ("", "a | b"))
    block = Answers("title", ("before", "after"), [sides], before=True, shown=1)
    page, markdown = answers_html(block), answers_markdown(block)
    assert "the end" in page and "x" * 500 not in page and "<i>(nothing)</i>" in page
    assert "*(nothing)*" in markdown and "**a \\| b**" in markdown
