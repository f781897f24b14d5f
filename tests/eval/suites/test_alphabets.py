"""References in other alphabets than a to z: the scorer rouge_score sees none of their letters, and would give 0."""

from __future__ import annotations

from typing import Any

import pytest

from eval.suites import bios, muse, rouge, rwku

RUSSIAN = "Он родился в Москве"  # four words


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        (RUSSIAN, RUSSIAN, 1.0),
        (RUSSIAN, "он РОДИЛСЯ, в Омске.", 3 / 4),  # neither case nor punctuation counts
        (RUSSIAN, "", 0.0),
        ("Ζει στην Αθήνα", "στην Αθήνα ζει", 2 / 3),  # the order does
        ("서울에 산다", "서울에 살았다", 1 / 2),
        ("Zoë Müller", "Zoe Muller", 0.0),  # other names; before, `zo` and `m ller` were words
        ("Zoë Müller", "Zoë lives", 1 / 2),
        ("the novels", "a novel", 1 / 2),  # English as published: with stems
    ],
)
def test_recall_of_the_suites_of_this_repository(reference: str, answer: str, expected: float) -> None:
    found = rouge.recall_by_script([reference], [answer], rouge.recall_rouge_score)
    assert found == pytest.approx([expected])


def test_bios_of_ones_own_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: Any = [{"split": "forget", "kind": "QA", "prompt": "?", "answer": RUSSIAN}]
    model: Any = type("Model", (), {"eval": lambda self: self})()
    monkeypatch.setattr(bios, "answer", lambda *_, **__: ["Он родился в Омске"])
    assert bios.evaluate(model, None, probes)["metrics"]["forget"] == {"QA": 0.75, "all": 0.75}  # pyright: ignore[reportArgumentType]
    own = bios.evaluate(model, None, probes)["protocol"]  # pyright: ignore[reportArgumentType]
    english = bios.evaluate(model, None, [{**probes[0], "answer": "In Moscow"}])["protocol"]  # pyright: ignore[reportArgumentType]
    assert english == bios.PROTOCOL and own != english, "such an evaluation of an earlier version is not comparable"


def test_published_scorers_stay_and_a_note_says_what_they_do_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: Any = [
        {"set": "F-QA", "subject": "x", "query": "?", "type": "", "answer": text}
        for text in (RUSSIAN, "Moscow", "東京")
    ]
    monkeypatch.setattr(rwku, "score", lambda *_, **__: ([{"rwku": 0.0, "sago": 0.0}] * 3, {"sago": [""] * 3}))
    note = rwku.evaluate(None, None, probes)["notes"]["rouge"]  # pyright: ignore[reportArgumentType]
    assert note.startswith("1 of 3") and "1 of 3 reference answers are in another alphabet" in note
    assert rouge.script_note(["Moscow", "it’s “5 €”", "Café Müller"]) == {}
    assert rouge.recall_rouge_score([RUSSIAN], [RUSSIAN]) == [0.0] == rouge.f1_rouge_score([RUSSIAN], [RUSSIAN])
    rows: Any = [{"suite": "muse_news", "set": "knowmem_forget_qa", "prompt": "?", "question": "?", "answer": RUSSIAN}]
    monkeypatch.setattr(muse, "answers_of", lambda *_: [RUSSIAN])
    monkeypatch.setattr(muse, "familiarity", lambda *_: [])
    model: Any = type("Model", (), {"eval": lambda self: self})()
    told = muse.evaluate(model, None, rows)  # pyright: ignore[reportArgumentType]
    assert told["metrics"]["forget"]["knowmem"] == 0.0 and told["notes"]["rouge"].startswith("1 of 1")
