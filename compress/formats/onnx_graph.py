"""A decoder as an ONNX graph: the nodes that formats/onnx.py writes."""

from typing import Any, BinaryIO

import torch
from torch import Tensor

from compress.formats.onnx_weights import BLOCK, FP32
from compress.models.checkpoint import head_dim
from compress.quant.codes import Quantized, verified

DATA = "model.onnx.data"
OPSET, IR_VERSION = 21, 10
_ALIGN, _INLINE = 64, 1024  # bytes: where tensors begin; below this a tensor stays in model.onnx


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
        return self.node("Cast", name, out=name + FP32, to=self.onnx.TensorProto.FLOAT)

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


def decoder(graph: Graph, config: Any) -> Any:
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
