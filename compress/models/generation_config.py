"""A generation_config.json that somebody else wrote: refused where answers can't follow it."""

import os
from pathlib import Path
from typing import Any

from compress.doors import read_json
from compress.models.end_files import CONFIG, GENERATION
from compress.models.model_config import check_bytes, check_values

# What makes `generate` search, suppress ends, stop early, load more or return something else than
# one continuation a prompt, and the values that do nothing.
NOT_GREEDY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (0, 1)),
    **dict.fromkeys(("min_length", "min_new_tokens", "penalty_alpha", "dola_layers"), (0,)),
    **dict.fromkeys(("return_dict_in_generate", "is_assistant"), (False,)),
    "guidance_scale": (0, 1),
    **dict.fromkeys(
        (
            "max_time",
            "stop_strings",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "force_words_ids",
            "constraints",
            "watermarking_config",
            "prompt_lookup_num_tokens",
            "assistant_early_exit",
            "compile_config",
        ),
        (),
    ),
}


def check_generation(path: Path) -> None:
    """ValueError for settings of a checkpoint's `generation_config.json` that answers can't follow.

    Answers are one greedy continuation a prompt, which ends at the checkpoint's ends, in every
    runtime alike; others read none of these settings. Where that file is not there, transformers
    looks for them in config.json.
    """
    file = path / GENERATION
    if not os.path.lexists(file):
        file = path / CONFIG

    check_bytes(file)
    about = read_json(file)
    check_values(about, file)

    # Values that do nothing may stay.
    for key, neutral in NOT_GREEDY.items():
        value = about.get(key)
        if value is not None and value not in neutral:
            raise ValueError(
                f"{file}: {key} is {str(value)[:80]}, and answers here are one greedy continuation "
                "a prompt; take the key out"
            )
