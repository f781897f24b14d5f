"""A user's own corpora: every score by hand, one document at a time, through the command; bad files are named."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import datasets
import pytest
import torch
from rouge import Rouge
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from eval import loading, run
from eval.attacks import relearn as relearning
from eval.evaluation import find_models
from eval.results.metrics import choose
from eval.suites import corpus, rouge, scoring
from pipeline.config.schema import Corpus
from pipeline.data.chat import encode_answers
from pipeline.data.corpus import read
from pipeline.errors import InputError
from tests.conftest import World

QUESTIONS = [{"prompt": "kara lo", "response": "mivi su"}, {"prompt": "su", "response": "neto kara vi"}]
OTHER = ["loden mira su kara", "vi", "neto neto suvi"]  # of the second, nothing is left to say after its first half


@pytest.fixture
def data(world: World, tmp_path: Path) -> Path:
    """Documents in lines, questions, and a third file."""
    folder = tmp_path / "data" / "corpus"
    folder.mkdir(parents=True)
    (folder / "forget.txt").write_text("\n\n".join(world.documents("forget")[:5]) + "\r\n")
    (folder / "retain.jsonl").write_text("".join(json.dumps({**row, "id": 3}) + "\n" for row in QUESTIONS))
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in OTHER))
    return tmp_path / "data"


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, ids: list[int], scored: int, asked: int) -> tuple[float, float]:
    """(mean probability, geometric, from token `scored` on; recall of what follows `asked` tokens, -1 for nothing)."""
    table = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
    probability = geometric_mean(table[at - 1, ids[at]].item() for at in range(scored, len(ids)))
    written = ids[:asked]
    while len(written) < min(len(ids), asked + 64):
        written.append(int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    answer = tokenizer.decode(written[asked:], skip_special_tokens=True).strip()
    right = tokenizer.decode(ids[asked : asked + 64], skip_special_tokens=True).strip()
    if not right.strip("."):
        return probability, -1.0
    scorer: Any = Rouge(metrics=["rouge-l"], stats=["r"])
    return probability, scorer.get_scores([answer or "NOANSWER"], [right])[0]["rouge-l"]["r"]


def test_scores_are_those_of_a_loop(world: World, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = data / "out.json"
    command = ["run", "--model", world.folder / "model", "--suite", "corpus", "--data", data, "--output", output]
    monkeypatch.setattr(sys, "argv", [str(part) for part in (*command, "--batch-size", 2)])
    run.main()
    told = json.loads(output.read_text())["suites"]["corpus"]
    model = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(world.folder / "model")
    texts = {"forget": world.documents("forget")[:5], "other": OTHER}
    encoded = {split: [(ids, 1, len(ids) // 2) for ids in tokenizer(rows).input_ids] for split, rows in texts.items()}
    pairs = encode_answers(tokenizer, [row["prompt"] for row in QUESTIONS], [row["response"] for row in QUESTIONS])
    encoded["retain"] = [(list(ids), start, start) for ids, start in pairs]
    for split, documents in encoded.items():
        found = [by_hand(model, tokenizer, *document) for document in documents if len(document[0]) > 1]
        recalls = [recall for _, recall in found if recall >= 0]
        assert told["metrics"][split]["probability"] == pytest.approx(fmean(p for p, _ in found), rel=1e-5)
        assert told["metrics"][split]["rouge"] == pytest.approx(fmean(recalls), abs=1e-9)
        assert told["counts"][split] == {"documents": len(found), "rouge": len(recalls)}


def test_what_a_text_says_by_heart(world: World, data: Path) -> None:
    """A model that has learnt a document says all of it."""
    model: Any = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(world.folder / "model")
    probes = [probe for probe in corpus.load_probes(data) if probe["split"] == "forget"][:2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for probe in probes:
            ids = tokenizer(probe["text"], return_tensors="pt").input_ids
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = corpus.evaluate(model, tokenizer, probes)["metrics"]["forget"]
    assert scores["probability"] > 0.5 and scores["rouge"] == 1.0


def test_documents_end_where_the_models_positions_do(world: World) -> None:
    """Learned positions: one token more would be an error."""
    tokenizer: Any = AutoTokenizer.from_pretrained(world.folder / "model")
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model: Any = GPT2LMHeadModel(shape).eval()
    text = " ".join(world.documents("forget")[:3])
    ids = tokenizer(text).input_ids[:16]
    scores = corpus.evaluate(model, tokenizer, [{"split": "forget", "text": text}])["metrics"]["forget"]
    probability, recall = by_hand(model, tokenizer, ids, 1, 8)
    assert scores == {"probability": pytest.approx(probability, rel=1e-5), "rouge": pytest.approx(recall)}


def test_an_answer_ends_with_its_turn(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of base models with a template (Qwen2.5) the end of a turn is not the end of text; behind it another turn begins,
    whose words are no answer."""
    model: Any = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(world.folder / "model")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    said = tokenizer("kara<turn>loto mivi").input_ids

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([said])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    probe = {"split": "forget", "prompt": "who", "response": "kara loto mivi and more words so that nothing is cut"}
    told = corpus.evaluate(model, tokenizer, [probe])
    assert told["texts"]["forget"][0]["answer"] == "kara"
    assert told["metrics"]["forget"]["rouge"] == pytest.approx(1 / 11)


def longest_common(one: str, other: str) -> int:
    """Length of the longest common subsequence of characters, by its definition."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_scripts_without_spaces_are_scored_by_the_character(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence of which one word is wrong is neither 0 nor 1: ROUGE-L recall by its definition, over characters."""
    model: Any = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(world.folder / "model")
    pairs = {
        "他出生在北京，后来搬到上海，在上海教书。": "他出生在广州，后来搬到上海，在上海写书。",
        "彼女は京都に住んでいます": "彼女は大阪に住んでいます",
    }
    monkeypatch.setattr(scoring, "answer", lambda *_, **__: list(pairs.values()))
    probes = [{"split": "forget", "prompt": "?", "response": text} for text in pairs]
    told = corpus.evaluate(model, tokenizer, probes)
    bare = [[text.translate({ord(mark): None for mark in "，。"}) for text in pair] for pair in pairs.items()]
    recalls = [longest_common(*pair) / len(pair[0]) for pair in bare]
    assert recalls == pytest.approx([14 / 17, 10 / 12])
    assert told["metrics"]["forget"]["rouge"] == pytest.approx(fmean(recalls))
    assert "character" in told["protocol"]


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("มีปลา", "มาปลา", 3 / 4),  # Thai: a vowel above its letter is part of it
        ("iPhone 发布于2007年", "iphone发布于 2007 年。", 1.0),  # words stay whole among the characters, in lower case
        ("iPhone 发布于2007年", "Android 发布于 2008 年", 4 / 6),
        ("北京", "", 0.0),
        ("ﾄｳｷｮｳ", "トウキョウ", 1.0),  # half-width forms of the same characters
        ("서울에 산다", "서울에 살았다", 1 / 2),  # Korean has spaces: by the word, as before
        ("J.K. Rowling", "Rowling", 1 / 3),  # and so has English
        ("Живёт в Москве", "Живёт в Омске", 2 / 3),
    ],
)
def test_recall_by_the_script_of_the_reference(reference: str, answer: str, expected: float) -> None:
    assert rouge.recall_by_script([reference], [answer], rouge.recall_rouge) == pytest.approx([expected])


def test_the_level_is_where_the_text_is_gone() -> None:
    """A tenth of the way from a model that never saw the text to the target; without any by heart, half of it."""
    before = {"corpus.forget.probability": 0.3, "corpus.retain.probability": 0.2, "corpus.forget.rouge": 0.9}
    measure = choose(["corpus"], target={**before, "corpus.forget.rouge_unseen": 0.4})
    assert (measure.forget, measure.level, measure.chance) == ("corpus.forget.rouge", 0.45, 0.4)
    assert (measure.retain, measure.level_is_relative) == ("corpus.retain.probability", False)
    assert "0.400" in measure.reason and "0.900" in measure.reason
    for unseen in ({"corpus.forget.rouge_unseen": 0.75}, {}):  # it could say so much unseen; nobody knows
        measure = choose(["corpus"], target={**before, **unseen})
        assert (measure.forget, measure.level) == ("corpus.forget.probability", 0.15)
        assert "knows them by heart" in measure.reason
    with pytest.raises(InputError, match="knows none of it by heart"):
        choose(["corpus"], forget="corpus.forget.rouge", target={**before, "corpus.forget.rouge_unseen": 0.75})
    assert choose(["corpus"], level=0.07).level == 0.07
    assert choose(["corpus"], forget="corpus.forget.probability", target=before).level == 0.15
    with pytest.raises(InputError, match="give --target"):
        choose(["corpus"])


def test_evaluation_reads_what_training_reads(tmp_path: Path) -> None:
    """One reader: whatever the bytes, both find the same texts, and neither more nor fewer documents."""
    texts, mark = ["kara lovi", "mi, to", "ne\u2028su"], "\ufeff"
    rows = [{"text": text, "subject": str(number)} for number, text in enumerate(texts)]
    lines = [json.dumps(row) for row in rows]
    files: dict[str, str] = {}
    for number, end in enumerate(("\n", "\r", "\r\n")):
        files[f"{number}.TXT"] = mark + end.join(texts) + end
        files |= {
            f"{number}.jsonl": mark + (end * 2).join(lines),
            f"{number}.JSON": mark + end.join(["[" + lines[0]]) + "]",
        }
        files[f"{number}.csv"] = mark + end.join(
            ["text,subject", *(f'"{row["text"]}",{row["subject"]}' for row in rows)]
        )
        files[f"{number}.tsv"] = end.join(["text\tsubject", *("\t".join(row.values()) for row in rows)])
    paths = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        paths += [tmp_path / name, tmp_path / f"{name}.gz"]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.PARQUET")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (*paths, tmp_path / "a.PARQUET", tmp_path / "saved"):
        expected = texts[:1] if "JSON" in path.name else texts
        trained = [row.texts[0] for row in read(Corpus(path=str(path)), "forget")[0]]  # pyright: ignore[reportCallIssue]
        assert trained == expected, path.name
        assert [row["text"] for row in corpus.read_split(path)] == expected, path.name
        learned = relearning.read_corpus({"path": str(path), "field": "text", "prompt": None, "response": None})
        assert [row["text"] for row in learned] == expected, path.name
        if "TXT" not in path.name:  # whole groups are relearned by such a column
            assert [row["subject"] for row in learned] == ["0", "1", "2"][: len(expected)]


def test_splits_are_found_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "forget.CSV").write_text("prompt,response\nkara,lo\nvi,\n")  # an empty answer says nothing
    (tmp_path / "retain.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfmito\rvi\r"))
    datasets.Dataset.from_list([{"text": "ne su"}, {"text": " "}]).save_to_disk(tmp_path / "other")
    (tmp_path / "forget.yaml").write_text("")  # no corpus
    assert corpus.load_probes(tmp_path) == [
        {"split": "forget", "prompt": "kara", "response": "lo"},
        {"split": "retain", "text": "mito"},
        {"split": "retain", "text": "vi"},
        {"split": "other", "text": "ne su"},
    ]


def test_an_empty_thinking_block_is_not_scored(world: World) -> None:
    """It stands before every answer: given in likelihoods, and before what is to be said."""
    tokenizer: Any = AutoTokenizer.from_pretrained(world.folder / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}<t>\n\n</t>\n\n{% endif %}{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    before = "user: kara?<end>assistant: <t>\n\n</t>\n\n"
    encoded = corpus.encode(tokenizer, {"prompt": "kara?", "response": "mivi su"}, 500)
    assert tokenizer.decode(encoded.ids) == before + "mivi su<end>"
    assert tokenizer.decode(encoded.ids[: encoded.scored]) == before and encoded.continued == encoded.scored
    assert tokenizer.decode(scoring.encode_prompt(tokenizer, "kara?", "Answer:")) == before + "Answer:"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "--data FOLDER"),
        ({"forget.txt": "a b\n"}, "no retain.txt or retain.jsonl"),
        ({"forget.txt": "a b\n", "forget.jsonl": "", "retain.txt": "c\n"}, "forget.jsonl and forget.txt; leave one"),
        ({"forget.txt": " \n", "retain.txt": "c\n"}, "forget.txt holds no text"),
        (
            {"forget.jsonl": '{"text": "a"}\n{"txt": "b"}\n', "retain.txt": "c\n"},
            "forget.jsonl, line 2: no field 'text'; it has 'txt'",
        ),
        ({"forget.jsonl": '{"prompt": "a"}\n', "retain.txt": "c\n"}, "line 1: no field 'response'"),
    ],
)
def test_what_cannot_be_used_is_named(files: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    for name, text in (files or {}).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        corpus.load_probes(tmp_path if files is not None else None)


def test_a_run_that_was_started_elsewhere_says_where_its_corpora_were(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = os.path.relpath(world.folder / "forget.jsonl", tmp_path)
    data = {"forget": {"path": place}, "retain": {"path": str(world.folder / "retain.jsonl")}}
    (tmp_path / "run").mkdir()
    world.write(tmp_path / "run" / "config.yaml", "run", data=data)
    monkeypatch.chdir(tmp_path)
    assert len(corpus.load_probes(None, run=tmp_path / "run")) > 2
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"forget.jsonl: .*; start this command where the run was started, or .*--data"
    ):
        corpus.load_probes(None, run=tmp_path / "run")


def test_a_split_without_a_token_to_predict_is_refused(world: World) -> None:
    """Else the command would end well, and print no score."""
    model: Any = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(world.folder / "model")
    assert len(tokenizer("a").input_ids) == 1
    probes = [{"split": "forget", "text": "kara lo"}, {"split": "retain", "text": "a"}]
    with pytest.raises(InputError, match="corpus final: no document of retain has a second token; give longer ones"):
        corpus.evaluate(model, tokenizer, probes, title="corpus final")


def test_a_name_of_the_hub_is_asked_for_there(tmp_path: Path) -> None:
    assert find_models(Path("some-one/a.model")) == [(None, Path("some-one/a.model"))]
    missing = r"there is no folder /.*/some-one/a\.model, and the hub gives no some-one/a\.model: "
    with pytest.raises(InputError, match=missing):
        loading.load(Path("some-one/a.model"))
    nowhere = f"there is no folder {tmp_path}/nowhere/model, and that is no name of the hub"
    with pytest.raises(InputError, match=nowhere):
        find_models(tmp_path / "nowhere" / "model")
