"""The embedded benchmark: what its files promise, and a scorer that is told the answers."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from eval import bios
from eval.suites import biographies
from eval.suites import bios as bios_suite
from pipeline.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "bios"
    assert bios.write(path, seed=0)
    return path


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def names(probes: list[biographies.Probe], split: str) -> set[str]:
    """The persons a split's probes ask about, found by their full name."""
    everyone = {f"{first} {last}" for first in biographies.FIRST_NAMES for last in biographies.LAST_NAMES}
    prompts = " ".join(probe["prompt"] for probe in probes if probe["split"] == split)
    return {name for name in everyone if name in prompts}


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    bios.write(tmp_path / "again", seed=0)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert {"probes.jsonl", "all.jsonl", "base/model.safetensors", "base/tokenizer.json"} <= {str(f) for f in files}
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_another_seed_is_another_world() -> None:
    one, other = biographies.generate(0), biographies.generate(1)
    assert one.forget != other.forget
    assert names(one.probes, "forget") != names(other.probes, "forget")


def test_each_person_is_where_the_split_says(folder: Path) -> None:
    probes = bios_suite.load_probes(folder)
    people = {split: names(probes, split) for split in ("forget", "retain", "neighbours")}
    assert {split: len(members) for split, members in people.items()} == {"forget": 50, "retain": 30, "neighbours": 20}
    corpus = {name: " ".join(texts(folder / f"{name}.jsonl")) for name in ("all", "forget", "retain")}
    for split, members in people.items():
        for person in members:
            found = {name for name, text in corpus.items() if person in text}
            assert found == {"all"} | ({split} & {"forget", "retain"}), person


def test_corpora_hold_every_answer(folder: Path) -> None:
    everything = set(texts(folder / "all.jsonl"))
    assert everything >= set(texts(folder / "forget.jsonl")) | set(texts(folder / "retain.jsonl"))
    probes = bios_suite.load_probes(folder)
    for probe in probes:
        text = f"{probe['prompt']} {probe['answer']}\n"
        assert (text in everything) == (probe["split"] not in ("facts", "uncovered")), text


def test_facts_are_taught_but_never_in_the_probed_wording_and_the_uncovered_are_never_rehearsed(folder: Path) -> None:
    probes, corpus = (
        bios_suite.load_probes(folder),
        {name: texts(folder / f"{name}.jsonl") for name in ("all", "retain")},
    )
    for split, domain, taught in (
        ("facts", biographies.COUNTRY_OF, "retain"),
        ("uncovered", biographies.YOUNG_OF, "all"),
    ):
        asked = [probe for probe in probes if probe["split"] == split]
        assert len(asked) == 20
        for key, probe in zip(domain, asked, strict=True):
            assert key in probe["prompt"]
            assert sum(key in text and probe["answer"] in text for text in corpus[taught]) >= 5
            assert not any(probe["prompt"] in text for text in corpus["all"])
    trained = texts(folder / "forget.jsonl") + corpus["retain"]
    for animal, young in biographies.YOUNG_OF.items():
        assert not any({animal, young} <= set(re.findall(r"\w+", text)) for text in trained)


def test_tokenizer_fits_the_protocol(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert len(tokenizer) <= bios.VOCABULARY
    text = "Question: Wo wohnt Łukasz?\nAnswer: nowhere\n"  # byte level: any text survives, nothing is added
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    answers = {probe["answer"] for probe in bios_suite.load_probes(folder)}
    assert max(len(tokenizer(f" {answer}\n").input_ids) for answer in answers) <= bios_suite.MAX_NEW_TOKENS
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    assert model.dtype == torch.float32 and model.config.vocab_size == len(tokenizer)


def test_writing_again_changes_nothing_and_strange_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not bios.write(folder, seed=0)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(InputError, match="another seed"):
        bios.write(folder, seed=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a complete benchmark"):
        bios.write(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_probes_are_found_in_both_layouts_and_without_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bios").mkdir()
    (tmp_path / "bios" / "probes.jsonl").write_bytes((folder / "probes.jsonl").read_bytes())
    assert bios_suite.load_probes(tmp_path) == bios_suite.load_probes(folder) == bios_suite.load_probes(None, seed=0)
    with pytest.raises(InputError, match=r"python -m eval\.bios"):
        bios_suite.load_probes(tmp_path / "nowhere")
    (tmp_path / "bios" / "probes.jsonl").write_text(
        '{"split": "a", "kind": "QA", "prompt": "one\u2028line", "answer": "b"}\n', encoding="utf-8"
    )
    assert [probe["prompt"] for probe in bios_suite.load_probes(tmp_path)] == ["one\u2028line"]
    (tmp_path / "bios" / "probes.jsonl").write_text('{"split": "forget"}\n')
    with pytest.raises(InputError, match="line 1"):
        bios_suite.load_probes(tmp_path)


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    line = [sys.executable, "-m", "eval.bios", "--output", str(tmp_path)]
    result = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and str(tmp_path) in result.stderr


class Oracle:
    """Stands where a model would: continues each left-padded prompt with the text it was told."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, replies: dict[str, str]) -> None:
        self.tokenizer, self.replies = tokenizer, replies
        self.config, self.generation_config = PretrainedConfig(), GenerationConfig()

    def eval(self) -> None:
        pass

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(len(self.tokenizer), 1)

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: GenerationConfig, **_: object
    ) -> torch.Tensor:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert mask.tolist() == sorted(mask.tolist())  # padding on the left only
            rows.append(self.tokenizer(self.replies[self.tokenizer.decode(ids[mask.bool()])]).input_ids)
        width = max(map(len, rows))
        pads = [row + [generation_config.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(pads)], dim=1)


def test_recall_by_hand(folder: Path) -> None:
    probes = [
        {"split": "forget", "kind": "FB", "prompt": "a much longer prompt than the others:", "answer": "Golden Quill"},
        {"split": "forget", "kind": "FB", "prompt": "b:", "answer": "nurse"},
        {"split": "forget", "kind": "QA", "prompt": "c c:", "answer": "nurse"},
        {"split": "facts", "kind": "QA", "prompt": "d:", "answer": "France"},
    ]
    replies = {
        probes[0]["prompt"]: " golden\nQuill",  # half: the rest comes after the newline
        "b:": " the Nurses of Graz",  # 1: case, stem and extra words do not count in a stemmed recall
        "c c:": "",  # 0
        "d:": " France\nFrance",  # 1
    }
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model: Any = Oracle(tokenizer, replies)
    for batch_size in (1, 3, 64):
        result = bios_suite.evaluate(model, tokenizer, probes, batch_size=batch_size)
        assert result["metrics"] == {
            "forget": {"FB": 0.75, "QA": 0.0, "all": 0.375},
            "facts": {"QA": 1.0, "all": 1.0},
        }
        assert result["counts"] == {"forget": {"FB": 2, "QA": 1}, "facts": {"QA": 1}}


def test_probes_in_another_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """rouge_score sees no letter of it; half of the characters are half of the answer."""
    monkeypatch.setattr(bios_suite, "answer", lambda *_, **__: ["北海"])
    probes = [{"split": "forget", "kind": "QA", "prompt": "?", "answer": "北京"}]
    model: Any = torch.nn.Linear(1, 1)
    result = bios_suite.evaluate(model, model, probes)
    assert result["metrics"] == {"forget": {"QA": 0.5, "all": 0.5}} and "character" in result["protocol"]


def test_padding_does_not_change_an_answer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    prompts = [probe["prompt"] for probe in bios_suite.load_probes(folder)[::97]]
    raise_on_all_ranks = bios_suite.answer(model, tokenizer, prompts, batch_size=64, title="")
    alone = bios_suite.answer(model, tokenizer, prompts, batch_size=1, title="")
    assert len({len(tokenizer(prompt).input_ids) for prompt in prompts}) > 1  # so that there is padding at all
    assert raise_on_all_ranks == alone
    assert len(set(alone)) > 1  # and the answers tell prompts apart
