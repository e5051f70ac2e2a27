"""A checkpoint as a directory for ONNX Runtime GenAI, and back.

    model.onnx, model.onnx.data   the graph, and its tensors one after the other
    genai_config.json             what GenAI asks of a model: names, shapes, ids
    tokenizer files               the checkpoint's, byte for byte but for what GenAI does not read:
                                  cutting rules in tokenizer.json, and several chat templates in
                                  tokenizer_config.json, which get files of their own

The graph is the one GenAI's own builder makes of a Llama, with one more output, `hidden_states`
after the final norm; the builder is not used, because its quantizer would round again. All
arithmetic is fp32, but for products of type A8. q4_0 matrices become nodes that hold our codes,
com.microsoft MatMulNBits (x @ W.T; of type A8 onnx_activations.py says which ones round their
activations to 8 bits, as all of the builder's do) and GatherBlockQuantized (the embedding): value =
(code - 8) * scale over blocks of 32 along a row. A tied head and the embedding are two initializers
over the same bytes. q8_0 is int8 codes times scales, multiplied when the session opens (constant
folding): MatMulNBits has no fast fp32 kernel for 8 bits. Scales (fp16), unquantized weights (their
own type) and rotary tables also become fp32 only then: 4.6 bits a weight on disk, not 5.1.

Left out: other grids (MatMulNBits has no 5 bits, and no zero point is q4_1's minimum exactly),
sliding windows, experts: refused by name. Shapes: L length, N outputs, K inputs, V vocabulary, D
head width.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compress.doors import read_json
from compress.formats import check_config, codes_of
from compress.formats.gguf_tokenizer import split, templates_of
from compress.formats.onnx_activations import round_activations
from compress.formats.onnx_folder import CONFIG, MODEL, wheel
from compress.formats.onnx_graph import DATA, Graph, decoder
from compress.formats.onnxruntime import OnnxRuntime
from compress.models.checkpoint import check, head_dim, weight_files
from compress.models.end_files import GENERATION, as_value
from compress.models.ends import end_ids
from compress.models.tokenizer import MORE_TEMPLATES, copy_tokenizer, load_tokenizer

ARCHITECTURES = ("llama", "mistral", "qwen2")
# Whose frequencies don't depend on the prompt's length.
ROPES = ("default", "linear", "llama3", "yarn")
# What ByteLevel cuts by.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def export_onnx(
    checkpoint: Path,
    out: Path,
    type: str = "",
    rows: Tensor | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Writes `checkpoint` as the new directory `out`. No weight is rounded; of type A8, products
    round their activations, as far as they may on `rows` (R, L), token ids of training text
    (onnx_activations.py, whose figures are returned; of the other type there are none).

    ValueError, and no `out`: it exists; an architecture, grid, rope type, activation or tensor has
    no place in the graph; tokenizer.json or the end token is missing; codes are not what
    model.safetensors holds.
    """
    onnx = wheel("onnx")
    if out.exists():
        raise ValueError(f"{out} exists; give the name of a directory to be made")

    # What has no place in the directory is refused before anything is written.
    check(checkpoint)
    config: Any = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    check_architecture(config)
    if not (checkpoint / "tokenizer.json").is_file():
        raise ValueError(
            f"{checkpoint} has no tokenizer.json, the only kind that ONNX Runtime GenAI reads;"
            " export it as Hugging Face"
        )
    quantized = codes_of(checkpoint, f"onnx:{type}" if type else "onnx")
    if type and (rows is None or not rows.numel()):
        raise ValueError("onnx:A8 needs rows of training text; give them as token ids")
    about = _genai_config(checkpoint, config)

    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(file, framework="pt"))
            for file in weight_files(checkpoint)
        ]
        # The handle of a file is no mapping.
        weights = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        _check_tensors(checkpoint, config, set(weights))
        part.mkdir(parents=True)
        with (part / DATA).open("wb") as data:
            model = decoder(Graph(onnx, data, weights, quantized), config)

    # The other files, and the name last.
    onnx.save(model, part / MODEL)
    (part / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    copy_tokenizer(checkpoint, part)
    _only_splits(part / "tokenizer.json")
    _templates_apart(part)

    figures = {}
    if type and rows is not None:
        figures = round_activations(part, rows, log=log)
    os.replace(part, out)
    return figures


def _check_tensors(checkpoint: Path, config: Any, names: set[str]) -> None:
    """ValueError when a checkpoint with tensors of these names lacks one that the graph needs, or
    has one that the graph has no place for.
    """
    with torch.device("meta"):
        needed = set(AutoModelForCausalLM.from_config(config).state_dict())
    if config.tie_word_embeddings:
        needed.discard("lm_head.weight")

    # A tied head may be in the file all the same.
    missing = needed - names
    foreign = names - needed - {"lm_head.weight"}
    if missing or foreign:
        raise ValueError(
            f"{checkpoint}: tensors missing: {sorted(missing)[:3]}, without a place in the ONNX"
            f" graph: {sorted(foreign)[:3]}"
        )


def check_architecture(config: Any) -> None:
    """ValueError when the graph can't compute what a transformers config says."""
    allowed = {
        "model_type": ARCHITECTURES,
        "rope_type": ROPES,
        "hidden_act": ("silu",),
        "sliding_window": (None,),
    }
    check_config(config, "ONNX", "leave onnx out of export.files", **allowed)


def _genai_config(checkpoint: Path, config: Any) -> dict[str, Any]:
    """genai_config.json: greedy unless asked otherwise; bos and pad are generation_config.json's
    where it has them.
    """
    # Special ids: GenAI wants a pad token, which the end is where there is none.
    file = checkpoint / GENERATION
    about = read_json(file) if file.is_file() else {}
    ends = end_ids(checkpoint)
    ids = {key: getattr(config, key, None) for key in ("bos_token_id", "pad_token_id")}
    ids |= {key: about[key] for key in ids if about.get(key) is not None}
    ids["eos_token_id"] = as_value(ends)
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ends[0]

    # The graph as `onnx_graph.decoder` names its ends.
    inputs = {name: name for name in ("input_ids", "attention_mask")}
    outputs = {"logits": "logits"}
    for kind in ("key", "value"):
        inputs[f"past_{kind}_names"] = f"past_key_values.%d.{kind}"
        outputs[f"present_{kind}_names"] = f"present.%d.{kind}"
    decoder = {
        "filename": MODEL,
        "session_options": {},
        "head_size": head_dim(config),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": inputs,
        "outputs": outputs,
    }

    length = config.max_position_embeddings
    model = {
        "type": config.model_type,
        "context_length": length,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": length, "past_present_share_buffer": True}
    return {
        "model": model | {key: value for key, value in ids.items() if value is not None},
        "search": search,
    }


def _templates_apart(folder: Path) -> None:
    """Writes a tokenizer_config.json's list of chat templates as files, the default one as
    chat_template.jinja: transformers reads both, GenAI fails on a list. ValueError: none is the
    default, or a name is no file's.
    """
    file = folder / "tokenizer_config.json"
    about = read_json(file) if file.is_file() else {}
    if not isinstance(about.get("chat_template"), list):
        return

    named = templates_of(load_tokenizer(folder).chat_template)
    del about["chat_template"]
    file.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    # A file for each, named as transformers looks for it.
    (folder / MORE_TEMPLATES).mkdir(exist_ok=True)
    for name, template in named.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"the tokenizer's chat template {name!r} can't be a file; name it with letters,"
                " digits, _, . and -"
            )
        place = folder / MORE_TEMPLATES / f"{name}.jinja"
        if name == "default":
            place = folder / "chat_template.jinja"
        place.write_text(template, encoding="utf-8")


def _only_splits(file: Path) -> None:
    """Writes the Digits and ByteLevel rules of a tokenizer.json as the Splits they stand for:
    GenAI's tokenizer reads no other rule.

    Without this SmolLM2's "\\n\\n1" was [198, 198, 33], not [1116, 33]. A file with nothing to
    rewrite keeps its bytes.
    """
    state = json.loads(file.read_text(encoding="utf-8"))
    pre_tokenizer = state.get("pre_tokenizer") or {}
    old = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    rules = []
    for rule in old:
        if rule.get("type") == "Digits" and rule["individual_digits"]:
            rules.append(split(r"\p{N}"))
        elif rule.get("type") == "ByteLevel" and rule.get("use_regex", True):
            rules += [split(_GPT2), rule | {"use_regex": False}]
        else:
            rules.append(rule)

    if rules != old:
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": rules}
        file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


# For formats/__init__.py; parity asks for prompts and texts of at most 1,024 tokens.
write, reload = export_onnx, partial(OnnxRuntime, ctx_len=1024)
