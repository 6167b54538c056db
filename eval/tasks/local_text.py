"""Documents of a text file, for the tasks of this folder; `lm_eval --metadata text=FILE` names the file."""

import re
from pathlib import Path

from datasets import Dataset


WORDS_BEFORE = 10  # fewer tell too little to guess the next from


def whole(text: str | None = None, **metadata) -> dict[str, Dataset]:
    return {"test": Dataset.from_list([{"text": read(text)}])}


def last_words(text: str | None = None, **metadata) -> dict[str, Dataset]:
    paragraphs = re.split(r"\n\s*\n", read(text))
    pairs = [paragraph.rsplit(maxsplit=1) for paragraph in paragraphs if len(paragraph.split()) > WORDS_BEFORE]
    if not pairs:
        raise ValueError(f"{text}: found no paragraph of more than {WORDS_BEFORE} words; expected at least one")
    return {"test": Dataset.from_list([{"context": context, "word": word} for context, word in pairs])}


def read(text):
    if text is None:
        raise ValueError("no text file is named; expected --text FILE, or --metadata text=FILE of lm_eval")
    return Path(text).read_text(encoding="utf-8")
