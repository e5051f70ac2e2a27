"""A checkpoint as a directory for ONNX Runtime GenAI, and back.

    model.onnx, model.onnx.data   the graph, and its tensors one after the other genai_config.json
    what GenAI asks of a model: names, shapes, ids tokenizer files               the checkpoint's,
    byte for byte but for what GenAI does not read: cutting rules in tokenizer.json, and
                                  several chat templates in tokenizer_config.json, which get files
                                  of their own

The graph is the one GenAI's own builder makes of a Llama, with one more output, `hidden_states`
after the final norm; the builder is not used, because its quantizer would round again. All
arithmetic is fp32. q4_0 matrices become nodes that hold our codes, com.microsoft MatMulNBits (x @
W.T; `accuracy_level` 1, where the builder's 4 rounds activations to 8 bits) and
GatherBlockQuantized (the embedding): value = (code - 8) * scale over blocks of 32 along a row. A
tied head and the embedding are two initializers over the same bytes. q8_0 is int8 codes times
scales, multiplied when the session opens (constant folding): MatMulNBits has no fast fp32 kernel
for 8 bits. Scales (fp16), unquantized weights (their own type) and rotary tables also become fp32
only then: 4.6 bits a weight on disk, not 5.1.

Left out: other grids (MatMulNBits has no 5 bits, and no zero point is q4_1's minimum exactly),
sliding windows, experts: refused by name. Shapes: L length, N outputs, K inputs, V vocabulary, D
head width.
"""

import json
import os
import re
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compress.doors import read_json
from compress.formats import check_config, codes_of
from compress.formats.gguf_tokenizer import split, templates_of
from compress.formats.onnx_folder import CONFIG, MODEL
from compress.formats.onnxruntime import OnnxRuntime, wheel
from compress.models.checkpoint import check, head_dim, weight_files
from compress.models.end_files import GENERATION, as_value
from compress.models.ends import end_ids
from compress.models.tokenizer import MORE_TEMPLATES, copy_tokenizer, load_tokenizer
from compress.quant.codes import Quantized, verified
from compress.score.size import size

DATA = "model.onnx.data"
BLOCK = 32
ARCHITECTURES = ("llama", "mistral", "qwen2")
ROPES = (
    "default",
    "linear",
    "llama3",
    "yarn",
)  # frequencies that don't depend on the prompt's length
OPSET, IR_VERSION = 21, 10
_ALIGN, _INLINE = 64, 1024  # bytes: where tensors begin; below this a tensor stays in model.onnx
_GPT2 = (  # what ByteLevel cuts by
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
_FP32 = "/fp32"  # what a Cast adds to a tensor's name


def export_onnx(checkpoint: Path, out: Path, type: str = "") -> dict[str, float]:
    """Writes `checkpoint` as the new directory `out`, of the one type there is; returns its
    `size`. Nothing is rounded.

    ValueError, and no `out`: it exists; an architecture, grid, rope type, activation or tensor has
    no place in the graph; tokenizer.json or the end token is missing; codes are not what
    model.safetensors holds.
    """
    onnx = wheel("onnx")
    if out.exists():
        raise ValueError(f"{out} exists; give the name of a directory to be made")
    check(checkpoint)
    config: Any = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    check_architecture(config)
    if not (checkpoint / "tokenizer.json").is_file():
        raise ValueError(
            f"{checkpoint} has no tokenizer.json, the only kind that ONNX Runtime GenAI reads;"
            " export it as Hugging Face"
        )
    made, about = codes_of(checkpoint, "onnx"), _genai_config(checkpoint, config)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(file, framework="pt"))
            for file in weight_files(checkpoint)
        ]
        # The handle of a file is no mapping.
        weights = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            needed = set(AutoModelForCausalLM.from_config(config).state_dict()) - (
                {"lm_head.weight"} if config.tie_word_embeddings else set()
            )
        missing, foreign = needed - set(weights), set(weights) - needed - {"lm_head.weight"}
        if missing or foreign:
            raise ValueError(
                f"{checkpoint}: tensors missing: {sorted(missing)[:3]}, without a place in the ONNX"
                f" graph: {sorted(foreign)[:3]}"
            )
        part.mkdir(parents=True)
        with (part / DATA).open("wb") as data:
            model = _decoder(Graph(onnx, data, weights, made), config)
    onnx.save(model, part / MODEL)
    (part / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    copy_tokenizer(checkpoint, part)
    _only_splits(part / "tokenizer.json")
    _templates_apart(part)
    os.replace(part, out)
    return size(out)


def check_architecture(config: Any) -> None:
    """ValueError when the graph can't compute what a transformers config says."""
    allowed = {
        "model_type": ARCHITECTURES,
        "rope_type": ROPES,
        "hidden_act": ("silu",),
        "sliding_window": (None,),
    }
    check_config(config, "ONNX", "leave onnx out of export.files", **allowed)


class Graph:
    """Nodes of an ONNX graph; tensors go to the data file as they come. Every method returns the
    name of what it adds.
    """

    def __init__(
        self, onnx: Any, data: BinaryIO, weights: dict[str, Any], made: dict[str, Quantized]
    ) -> None:
        self.onnx, self.data, self.weights, self.made = onnx, data, weights, made
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.made_here: set[str] = set()  # outputs of nodes
        self.places: dict[str, int] = {}  # where tensors begin in the data file

    def node(
        self,
        op: str,
        *inputs: str,
        out: str | tuple[str, ...] = "",
        name: str = "",
        **attributes: Any,
    ) -> str:
        """A node called `name`, of com.microsoft where ONNX has no such operator; returns its
        first output. What is there already is not added.
        """
        own = op in ("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention")
        name = name or f"{op}_{len(self.nodes)}"
        outputs = [out or f"{name}/out"] if isinstance(out, str) else list(out)
        if outputs[0] in self.made_here:
            return outputs[0]
        self.made_here.add(outputs[0])
        self.nodes.append(
            self.onnx.helper.make_node(
                op, inputs, outputs, name, domain="com.microsoft" if own else "", **attributes
            )
        )
        return outputs[0]

    def store(self, name: str, value: Tensor) -> str:
        """The tensor in its own type; 16-bit floats and int8 as the fp32 that a Cast makes of
        them. `X` and `X/2` share their bytes in the file.
        """
        if name not in self.tensors:
            kind = str(value.dtype).removeprefix("torch.").upper().replace("FLOAT32", "FLOAT")
            tensor = self.tensors[name] = self.onnx.TensorProto(
                name=name, data_type=self.onnx.TensorProto.DataType.Value(kind), dims=value.shape
            )
            raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if len(raw) < _INLINE:
                tensor.raw_data = raw
            else:
                if (shared := name.partition("/")[0]) not in self.places:
                    self.data.write(bytes(-self.data.tell() % _ALIGN))
                    self.places[shared] = self.data.tell()
                    self.data.write(raw)
                tensor.data_location = self.onnx.TensorProto.EXTERNAL
                for key, entry in (
                    ("location", DATA),
                    ("offset", self.places[shared]),
                    ("length", len(raw)),
                ):
                    tensor.external_data.add(key=key, value=str(entry))
        if value.dtype not in (torch.float16, torch.bfloat16, torch.int8):
            return name
        return self.node("Cast", name, out=name + _FP32, to=self.onnx.TensorProto.FLOAT)

    def matrix(self, name: str) -> str:
        """A tensor of the checkpoint in fp32: from its own type, or int8 codes times scales."""
        w = self.weights[name].get_tensor(name)
        if name not in self.made:
            return self.store(name, w)
        q = verified(name, w, self.made)
        codes, scales = (
            self.store(f"{name}.codes", q.codes.view(len(w), -1, BLOCK)),
            self.store(f"{name}.scales", q.scales[..., None]),
        )
        values = self.node("Mul", codes, scales, out=f"{name}/values")
        return self.node(
            "Reshape", values, self.store("rows", torch.tensor([0, -1])), out=f"{name}/dense"
        )

    def packed(self, name: str, *shape: int) -> tuple[str, str] | None:
        """Of a matrix on q4_0: two codes a byte, the first in the low half, as bytes (N, *shape),
        and scales (N, K / 32).
        """
        if name not in self.made or self.made[name].grid != "q4_0":
            return None
        q = verified(name, self.weights[name].get_tensor(name), self.made)
        codes = (q.codes[:, 0::2] | q.codes[:, 1::2] << 4).view(len(q.codes), *shape)
        return self.store(f"{name}.codes/{len(shape)}", codes), self.store(
            f"{name}.scales", q.scales
        )

    def embed(self, ids: str) -> str:
        """Rows of the embedding, fp32 (L, H)."""
        name = "model.embed_tokens.weight"
        if q := self.packed(name, -1):
            return self.node(
                "GatherBlockQuantized",
                q[0],
                ids,
                q[1],
                gather_axis=0,
                quantize_axis=1,
                bits=4,
                block_size=BLOCK,
            )
        return self.node("Gather", self.matrix(name), ids)

    def linear(self, module: str, x: str, weight: str = "", out: str = "") -> str:
        """x (L, K) @ W.T + bias, where the checkpoint has one: (L, N)."""
        name, bias = weight or f"{module}.weight", f"{module}.bias"
        if q := self.packed(name, -1, BLOCK // 2):
            n, k = self.made[name].codes.shape
            y = self.node(
                "MatMulNBits",
                x,
                *q,
                out=out,
                name=module,
                N=n,
                K=k,
                bits=4,
                block_size=BLOCK,
                accuracy_level=1,
            )
        else:
            y = self.node(
                "MatMul",
                x,
                self.node("Transpose", self.matrix(name), perm=[1, 0]),
                out=out,
                name=module,
            )
        return self.node("Add", y, self.matrix(bias)) if bias in self.weights else y

    def norm(self, module: str, x: str, eps: float, **named: str) -> str:
        """RMS norm; with the Add before it ONNX Runtime makes one SkipSimplifiedLayerNormalization
        of it.
        """
        return self.node(
            "SimplifiedLayerNormalization",
            x,
            self.matrix(f"{module}.weight"),
            epsilon=eps,
            axis=-1,
            stash_type=1,
            **named,
        )


def _decoder(graph: Graph, config: Any) -> Any:
    """Adds the whole model, from `input_ids` to `logits`; returns the ModelProto."""
    helper, f, i = graph.onnx.helper, graph.onnx.TensorProto.FLOAT, graph.onnx.TensorProto.INT64
    info, cache = (
        helper.make_tensor_value_info,
        [
            "batch",
            config.num_key_value_heads,
            "past",
            head_dim(config),
        ],
    )
    inputs = [
        info("input_ids", i, ["batch", "length"]),
        info("attention_mask", i, ["batch", "total"]),
    ]
    outputs = [
        info("logits", f, ["batch", "length", config.vocab_size]),
        info("hidden_states", f, ["batch", "length", config.hidden_size]),
    ]
    int32, one = graph.onnx.TensorProto.INT32, graph.store("one", torch.tensor([1]))
    tokens = graph.node(
        "Sub", graph.node("ReduceSum", "attention_mask", one, keepdims=0), one
    )  # of each row, less one
    total = graph.node(
        "Gather", graph.node("Shape", "attention_mask"), graph.store("axis", torch.tensor(1))
    )
    shared = [
        graph.node("Cast", tokens, to=int32),
        graph.node("Cast", total, to=int32),
        *_rotary_tables(graph, config),
    ]
    x = graph.embed("input_ids")
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        past, present = (
            [f"{when}.{layer}.{part}" for part in ("key", "value")]
            for when in ("past_key_values", "present")
        )
        inputs += [info(n, f, cache) for n in past]
        outputs += [info(n, f, [*cache[:2], "total", cache[3]]) for n in present]
        h = graph.norm(f"{name}.input_layernorm", x, config.rms_norm_eps)
        q, k, v = (graph.linear(f"{name}.self_attn.{p}_proj", h) for p in "qkv")
        attended = graph.node(
            "GroupQueryAttention",
            q,
            k,
            v,
            *past,
            *shared,
            out=(f"{name}.self_attn/out", *present),
            name=f"{name}.self_attn",
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
            scale=head_dim(config) ** -0.5,
        )
        x = graph.node("Add", x, graph.linear(f"{name}.self_attn.o_proj", attended))
        h = graph.norm(f"{name}.post_attention_layernorm", x, config.rms_norm_eps)
        gate, up = graph.linear(f"{name}.mlp.gate_proj", h), graph.linear(f"{name}.mlp.up_proj", h)
        gated = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
        x = graph.node("Add", x, graph.linear(f"{name}.mlp.down_proj", gated))
    hidden = graph.norm("model.norm", x, config.rms_norm_eps, out="hidden_states")
    graph.linear(
        "lm_head",
        hidden,
        "model.embed_tokens.weight" if config.tie_word_embeddings else "",
        out="logits",
    )
    made = helper.make_graph(
        graph.nodes, config.model_type, inputs, outputs, list(graph.tensors.values())
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="compress"
    )


def _rotary_tables(graph: Graph, config: Any) -> tuple[str, str]:
    """Cosines and sines (positions, D / 2) of position * frequency, as transformers computes them,
    made when the session opens.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    start, end, step, scale = (
        graph.store(f"rotary.{n}", torch.tensor(float(n)))
        for n in (0, config.max_position_embeddings, 1, rotary.attention_scaling)
    )
    positions = graph.node(
        "Unsqueeze", graph.node("Range", start, end, step), graph.store("one", torch.tensor([1]))
    )
    angles = graph.node(
        "Mul", positions, graph.store("rotary.frequencies", rotary.inv_freq.float())
    )
    return graph.node("Mul", graph.node("Cos", angles), scale), graph.node(
        "Mul", graph.node("Sin", angles), scale
    )


def _genai_config(checkpoint: Path, config: Any) -> dict[str, Any]:
    """genai_config.json: greedy unless asked otherwise; bos and pad are generation_config.json's
    where it has them.
    """
    file = checkpoint / GENERATION
    about, ends = read_json(file) if file.is_file() else {}, end_ids(checkpoint)
    ids = {key: getattr(config, key, None) for key in ("bos_token_id", "pad_token_id")}
    ids |= {key: about[key] for key in ids if about.get(key) is not None}
    ids |= {
        "eos_token_id": as_value(ends),
        "pad_token_id": ends[0] if ids["pad_token_id"] is None else ids["pad_token_id"],
    }
    kinds = ("key", "value")
    decoder = {
        "filename": MODEL,
        "session_options": {},
        "head_size": head_dim(config),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": (
            {n: n for n in ("input_ids", "attention_mask")}
            | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in kinds}
        ),
        "outputs": (
            {"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in kinds}
        ),
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
    (folder / MORE_TEMPLATES).mkdir(exist_ok=True)
    for name, template in named.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"the tokenizer's chat template {name!r} can't be a file; name it with letters,"
                " digits, _, . and -"
            )
        place = (
            folder / "chat_template.jinja"
            if name == "default"
            else folder / MORE_TEMPLATES / f"{name}.jinja"
        )
        place.write_text(template, encoding="utf-8")


def _only_splits(file: Path) -> None:
    """Writes the Digits and ByteLevel rules of a tokenizer.json as the Splits they stand for:
    GenAI's tokenizer reads no other rule.

    Without this SmolLM2's "\\n\\n1" was [198, 198, 33], not [1116, 33]. A file with nothing to
    rewrite keeps its bytes.
    """
    state = json.loads(file.read_text(encoding="utf-8"))
    whole = state.get("pre_tokenizer") or {}
    old, rules = whole.get("pretokenizers", [whole]), []
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


def decode_onnx(folder: Path) -> dict[str, Tensor]:
    """HF state-dict name -> fp32 tensor: the file's own numbers by the formulas of its operators.
    ValueError when it can't be read.

    A tied matrix comes once, under the embedding's name; where embedding and head differ, under a
    second name that no checkpoint has.
    """
    onnx = wheel("onnx")
    try:
        graph = onnx.load(folder / MODEL).graph
    except Exception as error:  # protobuf, checker and operating system raise unrelated classes
        raise ValueError(
            f"{folder} is no readable ONNX model ({error}); export it again"
        ) from error
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    decoded = {
        name: torch.from_numpy(value.astype("float32"))
        for name, value in held.items()
        if name.endswith((".weight", ".bias"))
    }
    for node in graph.node:
        codes = next((i for i in node.input if ".codes" in i), None)
        if codes is None or node.op_type == "Cast":
            continue
        q, d = (
            held[i.removesuffix(_FP32)]
            for i in (codes, next(i for i in node.input if ".scales" in i))
        )
        q = (
            q.astype("float32")
            if node.op_type == "Mul"
            else np.stack([q & 15, q >> 4], axis=-1).astype("float32") - 8
        )
        value = torch.from_numpy(
            q.reshape(len(d), -1, BLOCK) * d.reshape(len(d), -1, 1).astype("float32")
        ).flatten(1)
        name = codes.partition(".codes")[0]
        decoded[
            name if name not in decoded or torch.equal(decoded[name], value) else f"{name} (other)"
        ] = value
    return decoded


# For formats/__init__.py; parity asks for prompts and texts of at most 1,024 tokens.
write, reload = export_onnx, partial(OnnxRuntime, ctx_len=1024)
