"""Put your own questions to a model, and to another beside it: one screen, one question a line.

    python -m eval.chat --model FOLDER [--beside MODEL] [--max-new-tokens N] [--allow-pickle] [--trust-remote-code]

FOLDER is a run (its `final/`, else its last export, answers) or any model folder or hub name. Beside a run, the model
that it began with answers too, or the one that --beside names. Questions come from the terminal or from a pipe, and
`\\n` in a line is a new line. Answers are greedy, in the chat template if the tokenizer has one; else the model
continues the line.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from eval.evaluation import HUB_NAME, find_models
from eval.files import exit_status, read_config
from eval.loading import Trust, add_trust_options, is_model, load, trust_of
from eval.suites import scoring
from pipeline.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NARROW = 60  # columns of a terminal below which answers stand under each other

PROMPT = "> "


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.chat", description="Put your own questions to two models.")
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="a run or model folder, or a name on the hub")
    add("--beside", type=Path, metavar="MODEL", help="the other model (default: the one that a run began with)")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="of an answer (default 100)")
    add_trust_options(parser)
    return parser


def models_of(folder: Path, beside: Path | None) -> list[tuple[str, Path]]:
    """(name, folder) of the models that answer: the one before unlearning first, if there is one.

    Raises:
        InputError: `folder` holds no model (see `find_models`), the run's config.yaml cannot be read, or names a model
            that is not there.
    """
    step, model = find_models(folder)[-1]
    if beside is None and step is not None:
        beside = Path(read_config(folder, ("model",))["model"]["path"])
        if not is_model(beside) and (beside.exists() or not HUB_NAME.fullmatch(str(beside))):
            raise InputError(f"{folder} began with {beside}, which is no model folder here; name it by --beside")
    elif beside is not None:
        beside = find_models(beside, "--beside")[-1][1]
    return [*([("before", beside)] if beside else []), ("after" if beside else "answer", model)]


def load_models(
    models: Sequence[tuple[str, Path]], trust: Trust
) -> list[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """The models with their tokenizers; raises InputError, for the model before with the option that names another."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # `answer` itself says that a question is too long
    loaded = []
    for name, folder in models:
        try:
            loaded.append(load(folder, trust=trust))
        except InputError as error:
            hint = "; --beside takes another model" if name == "before" else ""
            raise InputError(f"{error}{hint}") from error
    return loaded


def questions(interactive: bool) -> Iterator[str]:
    """The lines that are not empty, until the input ends; a terminal gets a prompt.

    Raises:
        InputError: a line is not UTF-8.
    """
    while True:
        if interactive:
            print(PROMPT, end="", flush=True)
        try:
            line = sys.stdin.readline()
            line.encode()  # in a locale without UTF-8, a byte that is none becomes a character that has no encoding
        except UnicodeError:
            raise InputError("a question is not UTF-8 text; convert it (iconv -f LATIN1 -t UTF-8)") from None
        if not line:
            return
        if line.strip():
            yield line.strip().replace("\\n", "\n")


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, max_new_tokens: int) -> str:
    """The greedy answer to one question, or in brackets why there is none."""
    stopping = scoring.Stopping(max_new_tokens, scoring.ends_of_answer(model, tokenizer))
    prompt, positions = scoring.encode_prompt(tokenizer, question), scoring.positions_of(model)
    if not prompt:
        return "(the question has no token)"
    if positions is not None and len(prompt) > positions:
        return f"(the question has {len(prompt)} tokens, and this model reads {positions}: shorten it)"
    [answer] = scoring.answer(model, tokenizer, [prompt], stopping=stopping, batch_size=1, title="answer")
    return answer


def screen(names: Sequence[str], answers: Sequence[str], width: int) -> str:
    """The answers side by side under their names, or under each other where the terminal is narrow."""
    texts = [text or "(nothing)" for text in answers]
    column = (width - 3 * (len(names) - 1)) // len(names)
    if width < NARROW or len(names) == 1:
        return "\n".join(
            f"{name}:\n" + "\n".join(f"  {line}" for line in wrap(text, max(width - 2, 20)))
            for name, text in zip(names, texts, strict=True)
        )
    columns = [[name, "-" * column, *wrap(text, column)] for name, text in zip(names, texts, strict=True)]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(column) for cell in row).rstrip() for row in rows)


def wrap(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {arguments.max_new_tokens}: give 1 or more")
    models = models_of(arguments.model, arguments.beside)
    loaded = load_models(models, trust_of(arguments))
    interactive = sys.stdin.isatty()
    names = [name for name, _ in models]
    print("\n".join(f"{name}: {folder}" for name, folder in models))
    if interactive:
        print("A question a line; Ctrl-D ends.")
    for question in questions(interactive):
        answers = [answer(*one, question, arguments.max_new_tokens) for one in loaded]
        width = min(shutil.get_terminal_size().columns or 80, 160)
        print(("" if interactive else f"\n{PROMPT}{question}\n") + screen(names, answers, width), flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
