"""Attacks on the forget corpus itself: each number against its definition, on a model that is small enough."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval import robustness
from eval.attacks import answers, training
from eval.attacks import run as attack_run
from eval.attacks.run import attacks_of
from eval.attacks.spec import Plan
from eval.files import read_jsonl
from eval.loading import load
from eval.suites import scoring
from tests.conftest import World
from tests.distributed import run_distributed
from tests.eval.attacks.lamps import FORGET, Reader
from tests.interrupted import run_in_process


@pytest.fixture
def plan_of(run: Path) -> Callable[..., Plan]:
    """options -> the plan of the command for the run, with suite `probes`."""

    def make(*options: object) -> Plan:
        return robustness.parse_command_line(["--run", str(run), "--suite", "probes", *map(str, options)])[0]

    return make


def attack_of(plan: Plan, name: str) -> Any:
    (attack,) = attacks_of(plan, [name])
    return attack


# ---------------------------------------------------------------------------------------------------------------------
# Few-shot prompts


def test_questions_after_examples_of_the_other_half(plan_of: Callable[..., Plan], world: World) -> None:
    attack = attack_of(plan_of("--shots", 3), "few_shot")
    model, tokenizer = load(world.folder / "model")
    seen: list[list[str]] = []

    def encode_answers(tokenizer: Any, questions: list[str], texts: list[str]) -> Any:
        seen.append(list(questions))
        return encoded(tokenizer, questions, texts)

    encoded = answers.encode_answers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "encode_answers", encode_answers)
        plain, found = (spec.measure(model, tokenizer) for spec in (attack.plain, attack.evaluation))
    known = {row["q"]: row["a"] for row in FORGET}
    asked, led = seen
    assert len(asked) == 5 and set(asked) < set(known)
    prompts = []
    for question, whole in zip(asked, led, strict=True):
        *examples, last = whole.split("\n\nQuestion: ")
        assert last == question and len(examples) == 3
        for example in examples:
            before, _, answer = example.partition("\nAnswer: ")
            assert known[before] == answer and before not in asked
        prompts.append({"q": whole, "a": known[question]})
    reader = Reader(world.folder / "model")
    for values, rows in ((plain, [{"q": q, "a": known[q]} for q in asked]), (found, prompts)):
        expected = {f"held_out.{name}": value for name, value in reader.measures(rows, ends=False).items()}
        assert values == pytest.approx(expected, rel=1e-4)


def test_an_answer_that_is_known_whole_counts_however_it_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that follows the examples writes an empty line behind its answer, and never the end of text."""
    model, tokenizer = load(world.folder / "model")
    newline = tokenizer("\n").input_ids[0]

    def read_logits(model: Any, sequences: list[list[int]], score: Any, **_: Any) -> list[Any]:
        found = []
        for at, ids in enumerate(sequences):
            following = torch.tensor([*ids[1:], newline])
            following[following == tokenizer.eos_token_id] = newline
            logits = torch.full((len(ids), len(tokenizer)), -30.0).scatter(1, following[:, None], 30.0)
            found.append(score(at, torch.tensor(ids), logits))
        return found

    monkeypatch.setattr(scoring, "read_logits", read_logits)
    found = answers.answer_measures(model, tokenizer, ["who", "where"], ["kara loto", "mivi"], 2)
    known = {"extraction_strength": 1.0, "exact_memorization": 1.0, "probability": 1.0, "loss": 0.0}
    assert found == pytest.approx(known, abs=1e-9)


def test_a_corpus_without_questions_has_no_examples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["forget"] |= {"field": "q", "prompt": None, "response": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name, message in (("few_shot", "has no questions"), ("kl", "name a file of them by --texts")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["robustness.py", "--run", str(run), "--suite", "probes", "--attacks", name])
            assert robustness.exit_status(robustness.main) == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_the_estimator_is_the_mean_over_all_choices() -> None:
    hits, samples = [0, 1, 3, 6], 6
    found = answers.leak_at(hits, samples)
    assert list(found) == ["leak@1", "leak@2", "leak@4"], "no more than there are samples"
    for k in (1, 2, 4):
        shares = []
        for c in hits:
            choices = list(itertools.combinations([True] * c + [False] * (samples - c), k))
            shares.append(sum(any(choice) for choice in choices) / len(choices))
        assert found[f"leak@{k}"] == pytest.approx(sum(shares) / len(shares))
    assert list(answers.leak_at([1], 200))[-1] == "leak@128"


def test_samples_are_drawn_from_the_models_own_distribution(world: World) -> None:
    model, tokenizer = load(world.folder / "model")
    ids, number = tokenizer("kara loto").input_ids, 4000

    def drawn(seed: int, batch_size: int = number) -> list[str]:
        stopping = scoring.Stopping(1, (), seed=seed)
        prompts = [ids] * number
        return scoring.answer(model, tokenizer, prompts, stopping=stopping, batch_size=batch_size, title="")

    state = torch.random.get_rng_state()
    found = drawn(0)
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's random numbers move"
    assert found == drawn(0) and found != drawn(1)
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    expected: Counter[str] = Counter()
    for token, share in enumerate(p.tolist()):
        expected[str(tokenizer.decode([token], skip_special_tokens=True)).strip()] += share
    counts = Counter(found)
    assert len(counts) > 100, "no token is cut off"
    for text, share in expected.items():
        spread = (share * (1 - share) / number) ** 0.5
        assert abs(counts[text] / number - share) < 6 * spread + 1e-9, text


def test_hits_are_counted_of_each_prompt(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four samples of the n-th prompt, n (at most four) say the answer; greedy decoding never does."""
    attack = attack_of(plan_of("--samples", 4), "leak")
    folder = plan_of().final
    model, tokenizer = load(folder)

    def answer(model: Any, tokenizer: Any, prompts: list[list[int]], *, stopping: Any, **_: Any) -> list[str]:
        texts = [str(tokenizer.decode(prompt)) for prompt in prompts]
        if stopping.seed is None:
            return ["no"] * len(prompts)
        assert len(prompts) == 40 and all(texts[at] == texts[at // 4 * 4] for at in range(40))
        rows = [next(row for row in FORGET if row["q"] in text) for text in texts]
        return [rows[at]["a"] if at % 4 < at // 4 else "kara loto" for at in range(40)]  # half of its words

    monkeypatch.setattr(scoring, "answer", answer)
    assert attack.plain.measure(model, tokenizer) == {"greedy": 0.0}
    shares = [min(n, 4) / 4 for n in range(10)]
    assert attack.evaluation.measure(model, tokenizer)["leak@1"] == pytest.approx(sum(shares) / 10)
    assert attack.evaluation.measure(model, tokenizer)["leak@4"] == pytest.approx(0.9)


def test_a_text_in_another_alphabet_leaks(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that recites every answer gives all of them away, also in Cyrillic."""
    plan = plan_of("--samples", 4)
    rows = [{"q": row["q"], "a": "Он живёт в Москве"} for row in FORGET]
    attack: Any = answers.leak(plan, rows)
    model, tokenizer = load(plan.final)

    def answer(model: Any, tokenizer: Any, prompts: list[list[int]], **_: Any) -> list[str]:
        texts = [str(tokenizer.decode(prompt)) for prompt in prompts]
        return [next(row["a"] for row in rows if row["q"] in text) for text in texts]

    monkeypatch.setattr(scoring, "answer", answer)
    assert attack.plain.measure(model, tokenizer) == {"greedy": 1.0}
    assert attack.evaluation.measure(model, tokenizer) == {"leak@1": 1.0, "leak@2": 1.0, "leak@4": 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# How far it moved


def test_divergence_by_its_definition(
    run: Path, plan_of: Callable[..., Plan], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = world.documents("retain")[:5]
    (run.parent / "texts.txt").write_text("\n".join(texts) + "\n")
    shutil.rmtree(run / "final")
    shutil.copytree(world.folder / "tied", run / "final")
    monkeypatch.setattr(robustness, "end_on_terminate", lambda: None)
    names, texts_file = ["few_shot", "leak", "kl"], run.parent / "texts.txt"
    line = ["--run", run, "--suite", "probes", "--attacks", *names, "--samples", 2, "--texts", texts_file]
    monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, line)])
    assert robustness.exit_status(robustness.main) == 0
    found = json.loads((run / "robustness.json").read_text())["attacks"]
    assert [entry["name"] for entry in found] == names
    for one in found[:2]:
        assert one["before"] and one["after"] and one["original"].keys() == one["after"].keys()
    entry = found[-1]
    (before, tokenizer), (after, _) = (load(world.folder / name) for name in ("model", "tied"))
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            p, q = (model(ids).logits[0].double().softmax(-1).tolist() for model in (before, after))
        for one, other in zip(p[:-1], q[:-1], strict=True):
            total += sum(a * torch.tensor(a / b).log().item() for a, b in zip(one, other, strict=True))
            count += 1
    assert entry["after"]["kl"] == pytest.approx(total / count, rel=1e-3) and total > 0
    assert entry["documents"] == 5 and entry["before"] == {}
    monkeypatch.setattr(attack_run, "load", None)
    assert robustness.exit_status(robustness.main) == 0, "nothing is missing, and no model is loaded again"


def test_the_same_weights_do_not_diverge_whatever_the_precision_they_are_stored_in(
    run: Path, plan_of: Callable[..., Plan], world: World
) -> None:
    """Published models are in bfloat16; a run on a CPU computes in float32 and stores its model so."""
    base = run.parent / "base"
    shutil.copytree(world.folder / "model", base)
    model: Any = load(base)[0]
    for scale, dtype, folder in ((4.0, torch.bfloat16, base), (1.0, torch.float32, run / "final")):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)  # so that predictions are as sharp as those of a model that knows something
        model = model.to(dtype)
        model.save_pretrained(folder)
    assert [load(folder)[0].dtype for folder in (base, run / "final")] == [torch.bfloat16, torch.float32]
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["path"] = str(base)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run.parent / "texts.txt").write_text("\n".join(world.documents("retain")) + "\n")
    attack = attack_of(plan_of("--texts", run.parent / "texts.txt"), "kl")
    assert abs(attack.evaluation.measure(*load(run / "final"))["kl"]) < 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# Relearning curves


def halves(run: Path) -> tuple[list[Any], list[Any]]:
    folder = run / "robustness"
    return read_jsonl(folder / "relearn_curve.jsonl"), read_jsonl(folder / "relearn_curve.held_out.jsonl")


def attack_with(call: Any, run: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> dict[str, Any]:
    monkeypatch.setattr(training, "call", call)
    monkeypatch.setattr(robustness, "end_on_terminate", lambda: None)
    line = ["--run", run, "--suite", "probes", "--attacks", "relearn_curve", "--lr", 0.01, *options]
    monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, line)])
    assert robustness.exit_status(robustness.main) == 0
    (entry,) = json.loads((run / "robustness.json").read_text())["attacks"]
    return entry


def test_a_curve_is_what_the_training_measured(run: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(line: list[str], log: Path) -> int:
        config = yaml.safe_load(Path(line[line.index("--config") + 1]).read_text())
        assert config["train"]["probe_every"] == 2 and config["optimizer"]["schedule"] == "constant"
        assert config["data"]["retain"]["path"] == config["data"]["probes"]["retain"]["path"].replace(".retain", "")
        rows = [
            {"step": 0, "probe/held_out/probability": 0.1, "probe/retain/probability": 0.2},
            {"step": 1, "retain_loss": 3.0},
            {"step": 2, "probe/held_out/probability": 0.3, "probe/retain/probability": None},
        ]
        shutil.copytree(world.folder / "model", log.with_suffix("") / "final")
        (log.with_suffix("") / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0

    entry = attack_with(learn, run, monkeypatch, "--steps", 20)
    first = {"step": 0, "held_out": {"probability": 0.1}, "relearned": {"probability": 0.2}}
    assert entry["curve"] == [
        first,
        {"step": 2, "held_out": {"probability": 0.3}, "relearned": {"probability": None}},
    ]
    assert entry["before"] == {"held_out.probability": 0.1, "relearned.probability": 0.2}
    assert entry["after"] == {"held_out.probability": 0.3}
    learned, other = halves(run)
    assert len(learned) == len(other) == 5 and sorted(map(str, [*learned, *other])) == sorted(map(str, FORGET))


@pytest.mark.slow
def test_a_curve_begins_and_ends_with_its_models(run: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(line: list[str], log: Path) -> int:
        run_distributed(run_in_process, 1, line[line.index("pipeline.train") + 1 :])
        return 0

    entry = attack_with(learn, run, monkeypatch, "--steps", 4, "--ranks", 1)
    assert [row["step"] for row in entry["curve"]] == [0, 1, 2, 3, 4]
    for when, folder in ((0, world.folder / "model"), (-1, run / "robustness" / "relearn_curve" / "final")):
        for name, rows in zip(("relearned", "held_out"), halves(run), strict=True):
            assert entry["curve"][when][name] == pytest.approx(Reader(folder).measures(rows), rel=1e-4)
    assert entry["after"]["relearned.loss"] < entry["before"]["relearned.loss"] - 0.1
