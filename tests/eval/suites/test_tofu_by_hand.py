"""TOFU: results made by hand, and the numbers that they must give."""

from __future__ import annotations

import json
import math

import pytest

from eval.suites import rouge as scoring
from eval.suites import tofu


def result(log_ratio: float) -> tofu.Result:
    return tofu.Result(answer=1.0, paraphrase=log_ratio, perturbed=[0.5, -0.5], rouge=1.0)


def test_one_result_by_hand() -> None:
    two = tofu.Result(answer=math.log(2), paraphrase=math.log(4), perturbed=[math.log(4), math.log(16)], rouge=0.0)
    # Wrong answers: exp(-mean loss) = sqrt(1/4 * 1/16) = 1/8; the paraphrase: 1/4. R = 1/2.
    assert tofu.truth("forget", two) == pytest.approx(1 / 2)
    assert tofu.truth("retain", two) == pytest.approx(1 / 2)
    swapped = two._replace(paraphrase=math.log(16))  # R = 2
    assert tofu.truth("forget", swapped) == pytest.approx(1 / 2) and tofu.truth("retain", swapped) == 0.0
    assert tofu.probability("retain", two) == pytest.approx(1 / 2)
    assert tofu.probability("world_facts", two) == pytest.approx((1 / 2) / (1 / 2 + 1 / 4 + 1 / 16))


def test_the_published_scorer_stays_and_a_note_says_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"set": "forget", "file": "forget01_perturbed", "question": "?", "paraphrase": "a", "perturbed": ["b"]}
    probes = [{**row, "answer": "他出生在北京"}, {**row, "answer": "He was born in Bergen"}]
    monkeypatch.setattr(tofu, "score", lambda *_, **__: [result(0.0), result(0.0)])
    answer = tofu.evaluate(None, None, probes)  # pyright: ignore[reportArgumentType]
    assert answer["notes"]["rouge"].startswith("1 of 2 reference answers") and "rouge" in answer["protocol"].lower()
    assert "rouge" not in tofu.evaluate(None, None, probes[1:] * 2)["notes"]  # pyright: ignore[reportArgumentType]
    assert scoring.recall_rouge_score(["他出生在北京"], ["他出生在北京"]) == [0.0]


def test_forget_quality_by_hand() -> None:
    """Three against three without overlap: 2 of the 20 ways to deal six ranks are as far apart."""
    row = {"set": "forget", "file": "forget01_perturbed"}
    apart = tofu.summarise([row | {"reference": 5.0 + at} for at in range(3)], [result(at) for at in range(3)])
    assert apart["metrics"]["forget_quality"] == pytest.approx(2 / 20)
    same = tofu.summarise([row | {"reference": float(at)} for at in range(3)], [result(at) for at in range(3)])
    assert same["metrics"]["forget_quality"] == pytest.approx(1.0)
    assert same["notes"]["model_utility"] == "no retain, real_authors, world_facts"


def test_losses_without_bounds() -> None:
    """Unlearning may end in losses of thousands, or in none at all: numbers or null, never an error or NaN."""
    far = tofu.Result(answer=5000.0, paraphrase=9000.0, perturbed=[2000.0, 3000.0], rouge=0.0)
    lost = tofu.Result(answer=math.nan, paraphrase=math.nan, perturbed=[math.nan], rouge=0.0)
    for name in tofu.SETS:
        assert tofu.probability(name, far) == 0.0 and tofu.truth(name, far) == 0.0
    probes = [{"set": name, "file": "forget01_perturbed", "reference": 0.0} for name in tofu.SETS]
    answer = tofu.summarise(probes, [far] * 4)
    assert answer["metrics"]["model_utility"] == 0.0 and answer["log_truth_ratios"] == [6500.0]
    answer = tofu.summarise(probes, [lost] * 4)
    assert answer["metrics"]["model_utility"] is None and answer["metrics"]["forget_quality"] is None
    nothing = "the model gave losses that are not finite"
    assert answer["notes"]["model_utility"] == answer["notes"]["forget_quality"] == nothing
    assert answer["metrics"]["forget"]["extraction_strength"] is None and "membership" not in answer["metrics"]
    json.dumps(answer, allow_nan=False)


def test_the_aggregate_by_hand() -> None:
    forget = {"extraction_strength": 0.5, "exact_memorization": 0.75, "paraphrase_probability": 0.5, "truth_share": 0.5}
    areas = {"loss": 0.8, "zlib": 0.4, "min_k": 0.6, "min_k_plus": 0.5}
    probes = [
        {"set": "holdout", "reference": {"loss": 0.5, "zlib": 0.5, "min_k": 0.5, "min_k_plus": 0.5}},
        {"set": "retain", "target_utility": 0.5},
    ]
    metrics = {"forget": forget, "membership": {"AUC": areas}, "model_utility": 0.4}
    memorization, privacy = 4 / (2 + 4 + 2 + 2), 4 / (1 / 0.4 + 1 / 0.8 + 1 / 0.8 + 1)
    overall = 3 / (1 / memorization + 1 / privacy + 1 / 0.8)
    notes: dict[str, str] = {}
    found = tofu.aggregate(metrics, probes, notes)
    assert list(found.values()) == pytest.approx([memorization, privacy, 0.8, overall]) and not notes
    far = tofu.aggregate({**metrics, "membership": {"AUC": {**areas, "loss": 1.0}}}, probes, notes)
    assert far["privacy"] == far["overall"] == 0 and not notes, "twice the retain-only model's: nothing is private"
    assert tofu.aggregate(metrics, probes[:1], notes)["overall"] is None
    assert notes["aggregate"] == "utility needs model utility here and in tofu/target_model.json"
