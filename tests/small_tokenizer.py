"""A tokenizer of three words, for parents whose vocabulary is smaller than the tiny teacher's."""

from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json; texts end at id 2."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
