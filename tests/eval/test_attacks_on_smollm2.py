"""The attacks on a real pretrained model and real rows, each against its definition in a plain loop.

`pytest -s` prints what each attack took, and what the plain loop took for the same rows.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import robustness
from eval.attacks import answers
from eval.files import read_jsonl
from eval.suites import scoring
from pipeline.config.load import resolve, to_yaml
from pipeline.config.schema import REPOSITORY
from tests.eval import plain_loops as plain
from tests.eval.attacks.test_quantize import PUBLISHED_NF4, rounded_by_hand
from tests.eval.suites.questions import read_rows, write_rows

pytestmark = pytest.mark.slow  # a model of 540 MB, and minutes

Row = dict[str, str]
CLOSE = 2e-4  # relative: a batch with padding has other rounding errors than a row alone
ROUNDING = 1e-3  # relative: 63 of 2 x 106 million weights lie between two values, where float32 decides otherwise
TRAINED = 2e-3  # relative, after some steps: where a gradient is nearly 0, rounding decides the sign that Adam follows
SHOTS, SAMPLES, STEPS, LR = 2, 8, 3, 1e-4
LEARNT = 2  # steps; after five the model knows every answer


def pairs_of(rows: list[dict[str, Any]]) -> list[Row]:
    return [{key: row[key] for key in ("question", "answer")} for row in rows]


@pytest.fixture(scope="module")
def forget(data: Path) -> list[Row]:
    """Six short answers about one author of TOFU."""
    return pairs_of(read_rows(data / "tofu" / "forget01_perturbed.json")[1:7])


@pytest.fixture(scope="module")
def retain(data: Path) -> list[Row]:
    return pairs_of(read_rows(data / "tofu" / "retain99.json")[:3])


def loaded(folder: Path) -> plain.Reader:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return plain.Reader(model, AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def run(smollm2: Path, forget: list[Row], retain: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose model knows a part of the six answers by heart."""
    folder = tmp_path_factory.mktemp("attacks")
    for name, rows in (("forget", forget), ("retain", retain)):
        write_rows(folder / f"{name}.jsonl", rows)
    keys = {"prompt": "question", "response": "answer"}
    config = {
        "output": str(folder / "run"),
        "cache": str(folder / "cache"),
        "model": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct", "dtype": "float32", "gradient_checkpointing": False},
        "data": {
            "max_length": 256,
            "packing": "documents",
            **{name: {"path": str(folder / f"{name}.jsonl"), **keys} for name in ("forget", "retain")},
        },
        "objective": {"forget": "npo", "retain": "nll"},
        "train": {"steps": 1, "batch_size": 3, "micro_batch_size": 3, "deepspeed": "zero1"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    reader = loaded(smollm2)
    with plain.timed("learning 6 rows"):
        sequences = [reader.pair(row["question"], row["answer"])[:2] for row in forget]
        for _ in plain.learn(reader.model, sequences, lr=LR, steps=LEARNT):
            pass
    for part in (reader.model, reader.tokenizer):
        part.save_pretrained(folder / "run" / "final")
    (folder / "run" / "config.yaml").write_text(to_yaml(resolve(folder / "recipe.yaml")))
    return folder / "run"


@pytest.fixture
def attack(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What the command writes of each attack: names, options -> {name: entry}."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(robustness, "end_on_terminate", lambda: None)

    def command(*names: str, **options: object) -> dict[str, Any]:
        output = tmp_path / "attacked.json"
        line: list[object] = ["--run", run, "--suite", "probes", "--output", output, "--attacks", *names]
        line += [part for name, value in options.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, line)])
        with plain.timed(f"attack {' '.join(names)}"):
            assert robustness.exit_status(robustness.main) == 0
        return {entry["name"]: entry for entry in json.loads(output.read_text())["attacks"]}

    return command


def measured(reader: plain.Reader, rows: list[Row], *, ends: bool = True) -> dict[str, float]:
    return plain.measures_of([reader.answered(row["question"], row["answer"]) for row in rows], ends=ends)


def agree(found: dict[str, float], expected: dict[str, float], bound: float, what: str) -> None:
    """Each score to `bound` of its value; prints the largest difference."""
    assert found.keys() == expected.keys(), what
    apart = {key: abs(found[key] - value) / max(abs(value), 1e-9) for key, value in expected.items()}
    print(f"{what}: differs by at most {max(apart.values()):.1e}")
    assert max(apart.values()) <= bound, apart


def named(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}.{name}": value for name, value in scores.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Rounding


def rounded_to_nf4(weight: np.ndarray) -> np.ndarray:
    """Each value to the nearest of the published 16, in units of the largest of its 64 neighbours in memory."""
    blocks = weight.astype(np.float64).reshape(-1, 64)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    shares, codes = blocks / scale, np.full(blocks.shape, PUBLISHED_NF4[0])
    for code in PUBLISHED_NF4[1:]:
        codes = np.where(np.abs(shares - code) < np.abs(shares - codes), code, codes)
    return (codes * scale).reshape(weight.shape)


ROUNDED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "int8": lambda weight: rounded_by_hand(weight, 8, weight.shape[1]),
    "int4": lambda weight: rounded_by_hand(weight, 4, 128),
    "nf4": rounded_to_nf4,
}


def test_rounded_weights(
    run: Path, forget: list[Row], retain: list[Row], attack: Callable[..., dict[str, Any]]
) -> None:
    """Of the 210 matrices in the 30 blocks each group of weights is rounded by itself, in float64."""
    found = attack(*ROUNDED)
    scores = []
    for name, rounded in ROUNDED.items():
        reader, count = loaded(run / "final"), 0
        with plain.timed(f"plain loop, {name}, and 6 + 3 answers"):
            for key, weight in reader.model.named_parameters():
                if "_proj." in key:
                    weight.data = torch.from_numpy(rounded(weight.detach().numpy())).float()
                    count += weight.numel()
            own = {**named("forget", measured(reader, forget)), **named("retain", measured(reader, retain))}
        own["forget_nll"] = own["forget.loss"]
        agree(found[name]["after"], own, ROUNDING, name)
        assert found[name]["rounded_share"] == count / 134_515_008
        scores.append(own["forget.loss"])
    reader = loaded(run / "final")
    before = {**named("forget", measured(reader, forget)), **named("retain", measured(reader, retain))}
    agree(found["int8"]["before"], {**before, "forget_nll": before["forget.loss"]}, CLOSE, "not rounded")
    assert len({round(score, 2) for score in [*scores[1:], before["forget.loss"]]}) == 3, "4 bits change the scores"


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_leak(
    run: Path, forget: list[Row], attack: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts that the command drew, scored again, and leak@k as the share of all sets of k of them with a hit."""
    drawn, written = scoring.answer, list[list[str]]()

    def recorded(*arguments: Any, **named: Any) -> list[str]:
        written.append(drawn(*arguments, **named))
        return written[-1]

    monkeypatch.setattr(scoring, "answer", recorded)
    entry = attack("leak", samples=SAMPLES)["leak"]
    greedy, sampled = written
    reader = loaded(run / "final")
    with plain.timed("plain loop, 6 greedy answers"):
        lengths = [len(ids) - start for ids, start, _ in (reader.pair(*row.values()) for row in forget)]
        texts = [reader.writes(reader.question(row["question"]), n) for row, n in zip(forget, lengths, strict=True)]
    assert greedy == [text.strip() for text in texts]

    def hit(row: Row, text: str) -> bool:
        return plain.stemmed_recall(row["answer"], text) >= 0.8

    assert entry["before"] == {"greedy": fmean(hit(row, text) for row, text in zip(forget, texts, strict=True))}
    hits = [[hit(row, text) for text in sampled[n * SAMPLES : (n + 1) * SAMPLES]] for n, row in enumerate(forget)]
    assert len(sampled) == 6 * SAMPLES and any(0 < sum(own) < SAMPLES for own in hits), hits
    assert list(entry["after"]) == ["leak@1", "leak@2", "leak@4", "leak@8"]
    for k in (1, 2, 4, 8):
        shares = [fmean(any(chosen) for chosen in itertools.combinations(own, k)) for own in hits]
        assert entry["after"][f"leak@{k}"] == pytest.approx(fmean(shares)), k


def test_samples_follow_the_distribution_of_the_model(run: Path) -> None:
    """One token after a short prompt: no temperature, top-k or top-p, whatever other libraries have as defaults."""
    reader, number = loaded(run / "final"), 1000
    ids = reader.tokenizer("The author").input_ids
    with plain.timed(f"{number} samples of one token"):
        stopping = scoring.Stopping(1, (), seed=3)
        texts = scoring.answer(
            reader.model, reader.tokenizer, [ids] * number, stopping=stopping, batch_size=number, title=""
        )
    expected: Counter[str] = Counter()
    for token, share in enumerate(reader.table([*ids, 0])[-1].exp().tolist()):
        expected[reader.tokenizer.decode([token], skip_special_tokens=True).strip()] += share
    counts = Counter(texts)
    common = [text for text, _ in expected.most_common(60)]
    rest = {text: share for text, share in expected.items() if text not in common[:50]}
    for name, among in {**{text: [text] for text in common}, "rest": [*rest]}.items():
        share, found = sum(expected[text] for text in among), sum(counts[text] for text in among) / number
        assert abs(found - share) < 5 * (share * (1 - share) / number) ** 0.5 + 1 / number, (name, share, found)
    assert sum(rest.values()) > 0.1, "a cut at 50 tokens would be seen"


# ---------------------------------------------------------------------------------------------------------------------
# Examples before a question


def test_few_shot(
    run: Path, forget: list[Row], attack: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is put together from the rows: two answered questions of the other half, then the question."""
    encode, asked = answers.encode_answers, list[list[str]]()

    def recorded(tokenizer: Any, questions: list[str], texts: list[str]) -> Any:
        asked.append([*questions])
        return encode(tokenizer, questions, texts)

    monkeypatch.setattr(answers, "encode_answers", recorded)
    entry = attack("few_shot", shots=SHOTS)["few_shot"]
    plainly, led = asked
    held_out = [row for row in forget if row["question"] in plainly]
    examples = [row for row in forget if row not in held_out]
    assert len(held_out) == len(examples) == 3
    reader, prompts = loaded(run / "final"), list[Row]()
    for row, whole in zip(held_out, led, strict=True):
        chosen = [one for one in itertools.permutations(examples, SHOTS) if put(one, row) == whole]
        assert len(chosen) == 1, whole
        prompts.append({"question": put(chosen[0], row), "answer": row["answer"]})
    with plain.timed("plain loop, 3 answers without and with two examples"):
        without, after = (measured(reader, rows, ends=False) for rows in (held_out, prompts))
    agree(entry["before"], named("held_out", without), CLOSE, "without examples")
    agree(entry["after"], named("held_out", after), CLOSE, "with two examples")
    assert abs(after["probability"] - without["probability"]) > 0.01


def put(examples: tuple[Row, ...], row: Row) -> str:
    before = "".join(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in examples)
    return f"{before}Question: {row['question']}"


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning


def test_relearning(run: Path, forget: list[Row], tmp_path: Path, attack: Callable[..., dict[str, Any]]) -> None:
    """A plain loop learns one half at a constant rate and measures both halves at the same numbers of steps."""
    entry = attack("relearn_curve", steps=STEPS, lr=LR, ranks=1)["relearn_curve"]
    half, other = (read_jsonl(tmp_path / "attacked" / f"relearn_curve{part}.jsonl") for part in ("", ".held_out"))
    assert len(half) == len(other) == 3 and sorted(map(str, [*half, *other])) == sorted(map(str, forget))
    reader, curve = loaded(run / "final"), list[dict[str, Any]]()
    with plain.timed(f"plain loop, {STEPS} steps on 3 answers, measured {STEPS + 1} times with 3 others"):
        sequences = [reader.pair(row["question"], row["answer"])[:2] for row in half]
        for step in plain.learn(reader.model, sequences, lr=LR, steps=STEPS):
            curve.append({"step": step, "held_out": measured(reader, other), "relearned": measured(reader, half)})
    compare(entry["curve"], curve)
    first, last = (curve[at]["held_out"]["probability"] for at in (0, -1))
    assert abs(last - first) > 0.01 and curve[-1]["relearned"]["loss"] < curve[0]["relearned"]["loss"] - 0.1


def compare(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        bound = TRAINED if other["step"] else CLOSE
        for name in other.keys() - {"step"}:
            agree(one[name], other[name], bound, f"{name} after {other['step']} steps")


def test_unrelated_fine_tuning(
    run: Path, forget: list[Row], retain: list[Row], data: Path, tmp_path: Path, attack: Callable[..., dict[str, Any]]
) -> None:
    """A plain loop learns three texts of Wikipedia; the forget corpus on the way, and both corpora at the end."""
    texts = [row["text"] for row in json.loads((data / "rwku" / "Batch" / "1-50" / "passage.json").read_text())[:3]]
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    entry = attack("unrelated", steps=STEPS, lr=LR, ranks=1, texts=tmp_path / "texts.jsonl")["unrelated"]
    reader, curve = loaded(run / "final"), list[dict[str, Any]]()
    with plain.timed(f"plain loop, {STEPS} steps on 3 texts, measured {STEPS + 1} times with 6 answers"):
        sequences = [(reader.tokenizer(text).input_ids, 1) for text in texts]
        for step in plain.learn(reader.model, sequences, lr=LR, steps=STEPS):
            learned = plain.measures_of([reader.text(text) for text in texts])
            curve.append({"step": step, "forget": measured(reader, forget), "relearned": learned})
        after = {**named("forget", curve[-1]["forget"]), **named("retain", measured(reader, retain))}
    compare(entry["curve"], curve)
    agree(entry["after"], {**after, "forget_nll": after["forget.loss"]}, TRAINED, "the suite at the end")
    assert curve[-1]["relearned"]["loss"] < curve[0]["relearned"]["loss"] - 0.1
    assert abs(after["forget.loss"] - curve[0]["forget"]["loss"]) > 2e-3
