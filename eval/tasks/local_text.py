"""Documents of a text, for the tasks of this folder.

eval/harness.py gives them, as every command here reads them. `lm_eval --metadata '{"text": "FILE"}'` names a file of
plain text, which is one document.
"""

import re
from pathlib import Path

from datasets import Dataset


WORDS_BEFORE = 10  # fewer tell too little to guess the next from
TABLES = {".jsonl", ".json", ".parquet", ".arrow"}


def whole(documents: list[str] | None = None, text: str | None = None, **metadata) -> dict[str, Dataset]:
    return {"test": Dataset.from_list([{"text": document} for document in documents or [read(text)]])}


def last_words(documents: list[str] | None = None, text: str | None = None, **metadata) -> dict[str, Dataset]:
    paragraphs = [part for document in documents or [read(text)] for part in re.split(r"\n\s*\n", document)]
    pairs = [paragraph.rsplit(maxsplit=1) for paragraph in paragraphs if len(paragraph.split()) > WORDS_BEFORE]
    if not pairs:
        raise ValueError(f"the text: found no paragraph of more than {WORDS_BEFORE} words; expected at least one")
    return {"test": Dataset.from_list([{"context": context, "word": word} for context, word in pairs])}


def read(text):
    if text is None:
        raise ValueError("found no text; expected --text of eval/harness.py, or --metadata text=FILE of lm_eval")
    if Path(text).suffix.lower() in TABLES:
        raise ValueError(f"{text}: found a table; expected a file of plain text (eval/harness.py --text reads tables)")
    return Path(text).read_text(encoding="utf-8")
