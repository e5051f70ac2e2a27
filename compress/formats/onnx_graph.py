"""A decoder as an ONNX graph: the nodes that formats/onnx.py writes."""

from typing import Any, BinaryIO

import torch
from torch import Tensor

from compress.formats.onnx_weights import BLOCK, FP32
from compress.models.checkpoint import head_dim
from compress.quant.codes import Quantized, verified

DATA = "model.onnx.data"
OPSET, IR_VERSION = 21, 10
_CONTRIB = ("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention")  # of com.microsoft
_ALIGN, _INLINE = 64, 1024  # bytes: where tensors begin; below this a tensor stays in model.onnx


class Graph:
    """Nodes of an ONNX graph; tensors go to the data file as they come. Every method returns the
    name of what it adds.
    """

    def __init__(
        self, onnx: Any, data: BinaryIO, weights: dict[str, Any], quantized: dict[str, Quantized]
    ) -> None:
        self.onnx, self.data, self.weights, self.quantized = onnx, data, weights, quantized
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.outputs: set[str] = set()  # first outputs of nodes
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
        name = name or f"{op}_{len(self.nodes)}"
        outputs = [out or f"{name}/out"] if isinstance(out, str) else list(out)
        if outputs[0] in self.outputs:
            return outputs[0]

        self.outputs.add(outputs[0])
        domain = "com.microsoft" if op in _CONTRIB else ""
        self.nodes.append(
            self.onnx.helper.make_node(op, inputs, outputs, name, domain=domain, **attributes)
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
                tensor.data_location = self.onnx.TensorProto.EXTERNAL
                place = {"location": DATA, "offset": self._place(name, raw), "length": len(raw)}
                for key, entry in place.items():
                    tensor.external_data.add(key=key, value=str(entry))

        if value.dtype not in (torch.float16, torch.bfloat16, torch.int8):
            return name
        return self.node("Cast", name, out=name + FP32, to=self.onnx.TensorProto.FLOAT)

    def _place(self, name: str, raw: bytes) -> int:
        """Where a tensor's bytes begin in the data file, written there unless another name has
        brought them.
        """
        shared = name.partition("/")[0]
        if shared not in self.places:
            self.data.write(bytes(-self.data.tell() % _ALIGN))
            self.places[shared] = self.data.tell()
            self.data.write(raw)
        return self.places[shared]

    def matrix(self, name: str) -> str:
        """A tensor of the checkpoint in fp32: from its own type, or int8 codes times scales."""
        w = self.weights[name].get_tensor(name)
        if name not in self.quantized:
            return self.store(name, w)

        q = verified(name, w, self.quantized)
        codes = self.store(f"{name}.codes", q.codes.view(len(w), -1, BLOCK))
        scales = self.store(f"{name}.scales", q.scales[..., None])
        values = self.node("Mul", codes, scales, out=f"{name}/values")
        rows = self.store("rows", torch.tensor([0, -1]))
        return self.node("Reshape", values, rows, out=f"{name}/dense")

    def packed(self, name: str, *shape: int) -> tuple[str, str] | None:
        """Of a matrix on q4_0: two codes a byte, the first in the low half, as bytes (N, *shape),
        and scales (N, K / 32).
        """
        if name not in self.quantized or self.quantized[name].grid != "q4_0":
            return None

        q = verified(name, self.weights[name].get_tensor(name), self.quantized)
        codes = (q.codes[:, 0::2] | q.codes[:, 1::2] << 4).view(len(q.codes), *shape)
        packed_codes = self.store(f"{name}.codes/{len(shape)}", codes)
        return packed_codes, self.store(f"{name}.scales", q.scales)

    def embed(self, ids: str) -> str:
        """Rows of the embedding, fp32 (L, H)."""
        name = "model.embed_tokens.weight"
        packed = self.packed(name, -1)
        if packed is None:
            return self.node("Gather", self.matrix(name), ids)

        codes, scales = packed
        layout: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "bits": 4}
        return self.node("GatherBlockQuantized", codes, ids, scales, block_size=BLOCK, **layout)

    def linear(self, module: str, x: str, weight: str = "", out: str = "") -> str:
        """x (L, K) @ W.T + bias, where the checkpoint has one: (L, N)."""
        name, bias = weight or f"{module}.weight", f"{module}.bias"
        if packed := self.packed(name, -1, BLOCK // 2):
            # At accuracy level 1 activations stay fp32; GenAI's builder rounds them to 8 bits.
            n, k = self.quantized[name].codes.shape
            layout: dict[str, Any] = {"N": n, "K": k, "bits": 4, "block_size": BLOCK}
            layout["accuracy_level"] = 1
            y = self.node("MatMulNBits", x, *packed, out=out, name=module, **layout)
        else:
            columns = self.node("Transpose", self.matrix(name), perm=[1, 0])
            y = self.node("MatMul", x, columns, out=out, name=module)
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


def decoder(graph: Graph, config: Any) -> Any:
    """Adds the whole model, from `input_ids` to `logits`; returns the ModelProto."""
    shared = _shared_inputs(graph, config)
    x = graph.embed("input_ids")
    for layer in range(config.num_hidden_layers):
        x = _block(graph, config, layer, x, shared)
    hidden = graph.norm("model.norm", x, config.rms_norm_eps, out="hidden_states")
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else ""
    graph.linear("lm_head", hidden, head, out="logits")

    helper = graph.onnx.helper
    inputs, outputs = _signature(graph, config)
    nodes_and_tensors = helper.make_graph(
        graph.nodes, config.model_type, inputs, outputs, list(graph.tensors.values())
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        nodes_and_tensors, opset_imports=opsets, ir_version=IR_VERSION, producer_name="compress"
    )


def _cache_names(layer: int, when: str) -> list[str]:
    """Keys and values of a layer: `past_key_values` or `present`."""
    return [f"{when}.{layer}.{part}" for part in ("key", "value")]


def _signature(graph: Graph, config: Any) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs of the model with types and shapes: ids and mask in, logits and hidden
    states out, and the cache of every layer in and out.
    """
    info = graph.onnx.helper.make_tensor_value_info
    float32, int64 = graph.onnx.TensorProto.FLOAT, graph.onnx.TensorProto.INT64
    inputs = [
        info("input_ids", int64, ["batch", "length"]),
        info("attention_mask", int64, ["batch", "total"]),
    ]
    outputs = [
        info("logits", float32, ["batch", "length", config.vocab_size]),
        info("hidden_states", float32, ["batch", "length", config.hidden_size]),
    ]

    heads, width = config.num_key_value_heads, head_dim(config)
    for layer in range(config.num_hidden_layers):
        for name in _cache_names(layer, "past_key_values"):
            inputs.append(info(name, float32, ["batch", heads, "past", width]))
        for name in _cache_names(layer, "present"):
            outputs.append(info(name, float32, ["batch", heads, "total", width]))
    return inputs, outputs


def _shared_inputs(graph: Graph, config: Any) -> list[str]:
    """What attention reads in every layer: tokens of each row less one, tokens of the longest, and
    the rotary tables.
    """
    int32 = graph.onnx.TensorProto.INT32
    one = graph.store("one", torch.tensor([1]))
    tokens = graph.node("Sub", graph.node("ReduceSum", "attention_mask", one, keepdims=0), one)
    total = graph.node(
        "Gather", graph.node("Shape", "attention_mask"), graph.store("axis", torch.tensor(1))
    )

    return [
        graph.node("Cast", tokens, to=int32),
        graph.node("Cast", total, to=int32),
        *_rotary_tables(graph, config),
    ]


def _block(graph: Graph, config: Any, layer: int, x: str, shared: list[str]) -> str:
    """Adds a block, attention and then the gated FFN, each behind its norm and added to x."""
    name = f"model.layers.{layer}"
    h = graph.norm(f"{name}.input_layernorm", x, config.rms_norm_eps)
    q, k, v = (graph.linear(f"{name}.self_attn.{p}_proj", h) for p in "qkv")

    # Scores, mask, softmax, rotation and the cache are one operator.
    attended = graph.node(
        "GroupQueryAttention",
        q,
        k,
        v,
        *_cache_names(layer, "past_key_values"),
        *shared,
        out=(f"{name}.self_attn/out", *_cache_names(layer, "present")),
        name=f"{name}.self_attn",
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        do_rotary=1,
        scale=head_dim(config) ** -0.5,
    )
    x = graph.node("Add", x, graph.linear(f"{name}.self_attn.o_proj", attended))

    h = graph.norm(f"{name}.post_attention_layernorm", x, config.rms_norm_eps)
    gate = graph.linear(f"{name}.mlp.gate_proj", h)
    up = graph.linear(f"{name}.mlp.up_proj", h)
    gated = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
    return graph.node("Add", x, graph.linear(f"{name}.mlp.down_proj", gated))


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

    # Positions as a column, frequencies as a row.
    positions = graph.node(
        "Unsqueeze", graph.node("Range", start, end, step), graph.store("one", torch.tensor([1]))
    )
    angles = graph.node(
        "Mul", positions, graph.store("rotary.frequencies", rotary.inv_freq.float())
    )
    cosines = graph.node("Mul", graph.node("Cos", angles), scale)
    sines = graph.node("Mul", graph.node("Sin", angles), scale)
    return cosines, sines
