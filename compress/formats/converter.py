"""A checkpoint as a GGUF by the converter that llama.cpp maintains, with our codes in its tensors.

The converter (formats/llama_conversion.py) knows names, metadata and the order of rows of a family;
our codes know the bytes. They meet in the rows: the converter is fed decoded weights in fp32, and
each row that reaches the writer is looked up by its value among those that were fed, and written as
the bytes of its codes. What was permuted, split, fused or stacked needs no table that way; what was
transposed or scaled has no match and is refused by name, and so is a matrix whose rows found no
place. Routers and convolutions are F32, as llama.cpp's own quantizer leaves them.

The tokenizer is ours (formats/gguf_tokenizer.py): the converter's own falls back to guesses. And
nothing of a model card or a folder's name gets in: llama.cpp's loader changes what it does by
general.name, so that is always NAME.

Left out: a table of rows on disk, multimodal checkpoints, types that round experts by themselves.
Legend: R rows, C columns, B bytes of a row.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from compress.formats.families import check_family, hparams, published_names
from compress.formats.gguf_tokenizer import write_tokenizer
from compress.formats.llama_conversion import converter_of
from compress.models.ends import end_ids
from compress.models.model_config import meta_model, read_config
from compress.models.tokenizer import load_tokenizer
from compress.quant.codes import Quantized, quantizable, verified
from compress.quant.grids import GRIDS
from compress.scratch import Scratch

NAME = "compressed model"
F32_ONLY = re.compile(r"_norm\.weight$|ffn_gate_inp|ssm_conv1d|shortconv\.conv")
HEADS = ("lm_head.weight", "embed_out.weight")


class Place(NamedTuple):
    """Where the bytes of a row are."""

    matrix: str
    row: int


class Rows:
    """Rows of the matrices that were fed and are not written yet, by their values."""

    def __init__(self) -> None:
        self.packed_RB: dict[str, np.ndarray] = {}
        self.kinds: dict[str, str] = {}  # ggml type
        self.waiting: dict[str, int] = {}  # rows of a matrix that found no place yet
        self.places: dict[bytes, Place] = {}

    def feed(self, name: str, decoded_RC: np.ndarray, packed_RB: np.ndarray, kind: str) -> None:
        """A matrix, the bytes of its rows and their ggml type."""
        self.packed_RB[name] = packed_RB
        self.kinds[name] = kind
        self.waiting[name] = len(decoded_RC)
        for row, values in enumerate(decoded_RC):
            self.places.setdefault(_digest(values), Place(name, row))

    def take(self, name: str, values: np.ndarray) -> tuple[np.ndarray, str]:
        """Bytes (..., B) and ggml type of a tensor (..., C). ValueError naming it when one of its
        rows was not fed, or they are of several types.
        """
        rows_RC = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
        looked_up = [self.places.get(_digest(row)) for row in rows_RC]
        places = [place for place in looked_up if place]
        if len(places) < len(rows_RC):
            raise ValueError(
                f"{len(rows_RC) - len(places)} of {len(rows_RC)} rows of the GGUF's {name} are no"
                " rows of codes: they have none, or llama.cpp wants them transposed or scaled;"
                " export compressed_tensors"
            )

        # A tensor of the file has one type.
        kinds = sorted({self.kinds[place.matrix] for place in places})
        if len(kinds) > 1:
            raise ValueError(
                f"the GGUF's {name} is one tensor of matrices on {', '.join(kinds)}; give them one"
                " grid"
            )
        packed_RB = np.stack([self.packed_RB[place.matrix][place.row] for place in places])
        for place in places:
            self.waiting[place.matrix] -= 1

        # Rows of one value stand for each other, so that they count together.
        if sum(self.waiting.values()) == 0:
            for table in (self.packed_RB, self.kinds, self.waiting, self.places):
                table.clear()
        return packed_RB.reshape(*values.shape[:-1], -1), kinds[0]

    def pass_over(self, values: np.ndarray) -> None:
        """A tensor (..., C) is written as numbers: its rows wait no more."""
        for row in np.ascontiguousarray(values).reshape(-1, values.shape[-1]):
            if place := self.places.get(_digest(row)):
                self.waiting[place.matrix] -= 1

    def check_taken(self) -> None:
        """ValueError naming the matrices that the file does not hold."""
        if names := [name for name, rows in self.waiting.items() if rows > 0]:
            raise ValueError(
                f"rows of {', '.join(names[:3])} found no place in the GGUF; export"
                " compressed_tensors"
            )


def _digest(row: np.ndarray) -> bytes:
    """What stands for a row's values."""
    return blake2b(row.tobytes(), digest_size=16).digest()


class Feed:
    """What the converter reads and writes instead of the checkpoint's tensors: fp32 numbers of a
    file of `type` in, their bytes out.
    """

    def __init__(self, type: str, quantized: dict[str, Quantized], checkpoint: Path) -> None:
        self.type, self.quantized = type, quantized
        self.matrices = quantizable(meta_model(read_config(checkpoint))).keys()
        self.rows = Rows()
        self.last: tuple[str, Tensor] | None = None  # experts are read in parts

    def part(self, name: str, stored: Callable[[], Tensor], i: int, count: int) -> Tensor:
        """The i-th of `count` equal parts of a tensor of the checkpoint."""
        if self.last is None or self.last[0] != name:
            self.last = name, self.read(name, stored)
        w = self.last[1]
        return w if count == 1 else w.reshape(count, -1, w.shape[-1])[i]

    def read(self, name: str, stored: Callable[[], Tensor]) -> Tensor:
        """A tensor of the checkpoint with the numbers that the file will hold. ValueError when
        F16 can't.
        """
        w = stored().float().clone()
        if w.ndim < 2:
            return w
        if self.type == "F16":
            half = w.half()
            if not half.isfinite().all():
                raise ValueError(
                    f"{name}: values up to {w.abs().max():.3g} don't fit F16 (65504); export as"
                    " Q8_0"
                )
            return half.float()

        # Convolutions and routers are F32, and so is what has no codes beside what has.
        rows_RC = w.reshape(-1, w.shape[-1])
        if name in self.quantized:
            q = verified(name, rows_RC, self.quantized)
        elif self.quantized or name not in self.matrices:
            return w
        else:
            grid = self.type.lower()
            q = Quantized(grid, *GRIDS[grid].encode(rows_RC, name))
        decoded_RC = q.decode()
        packed_RB = GRIDS[q.grid].pack(q.codes, q.scales)
        self.rows.feed(name, decoded_RC.numpy(), packed_RB.numpy(), q.grid.upper())
        return decoded_RC.reshape(w.shape)

    def packed(self, name: str, values: np.ndarray) -> tuple[np.ndarray, str]:
        """A tensor of the file as the writer takes it, and its ggml type."""
        matrix = values.ndim > 1 and name.endswith(".weight") and not F32_ONLY.search(name)
        if not matrix:
            if values.ndim > 1:
                self.rows.pass_over(values)
            return values, "F32"
        if self.type != "F16":
            return self.rows.take(name, values)
        half = values.astype(np.float16)
        exact = bool((half.astype(np.float32) == values).all())
        return (half, "F16") if exact else (values, "F32")


@contextmanager
def _model(checkpoint: Path, file: Path, file_type: int) -> Iterator[Any]:
    """The converter's model of a checkpoint, its tokenizer and `llama_ftype` ours."""
    import gguf

    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    check_family(config)
    with Scratch() as nothing:
        model = converter_of(config)(
            checkpoint,
            gguf.LlamaFileType.ALL_F32,
            file,
            eager=True,
            model_name=NAME,
            hparams=hparams(config),
        )
        model.dir_model_card = nothing
        writer = model.gguf_writer
        logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)  # it tells of keys set again
        writer.add_file_type = lambda _: writer.add_uint32("general.file_type", file_type)

        def set_vocab() -> None:
            embedding = writer.tensors[0].get("token_embd.weight")
            ids = embedding.shape[0] if embedding else config.vocab_size
            tokenizer = load_tokenizer(checkpoint)
            write_tokenizer(writer, tokenizer, ids, end_ids(checkpoint, tokenizer))

        # A tied head is the embedding, which the file holds once.
        model.set_vocab = set_vocab
        for name in HEADS if config.tie_word_embeddings else ():
            model.model_tensors.pop(name, None)
        yield model


def convert(
    checkpoint: Path, out_file: Path, type: str, file_type: int, quantized: dict[str, Quantized]
) -> None:
    """Writes `checkpoint` as `out_file` in `type`; `file_type`: its llama_ftype.

    ValueError: as `check_family`, or what `Feed` refuses. ConfigError: no converter is installed.
    """
    import gguf

    part = out_file.with_name(out_file.name + ".part")
    feed = Feed(type, quantized, checkpoint)
    with _model(checkpoint, part, file_type) as model:
        writer = model.gguf_writer
        add_tensor = writer.add_tensor

        def add(name: str, values: np.ndarray, **_: Any) -> None:
            raw, kind = feed.packed(name, values)
            add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])

        writer.add_tensor = add
        _feed(model, feed)
        feed.rows.check_taken()
        model.prepare_metadata(vocab_only=False)
        writer.write_header_to_file(path=part)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    os.replace(part, out_file)


def _feed(model: Any, feed: Feed) -> None:
    """Run a checkpoint's tensors through the converter, by their published names."""
    experts = model.find_hparam(["num_local_experts", "num_experts"], optional=True) or 1
    tensors = dict(model.model_tensors)
    model.model_tensors.clear()
    for name, stored in tensors.items():
        parts = published_names(model.hparams["model_type"], name, experts)
        for i, part in enumerate(parts):
            model.model_tensors[part] = partial(feed.part, name, stored, i, len(parts))
    model.prepare_tensors()


def expected(checkpoint: Path, type: str, quantized: dict[str, Quantized]) -> dict[str, Tensor]:
    """GGUF name -> fp32 of every tensor that a file of `type` must hold, before anything is
    packed.
    """
    numbers: dict[str, Tensor] = {}

    def keep(name: str, values: np.ndarray, **_: Any) -> None:
        numbers[name] = torch.from_numpy(values.astype(np.float32))

    with _model(checkpoint, checkpoint / "unwritten", 0) as model:
        model.gguf_writer.add_tensor = keep
        _feed(model, Feed(type, quantized, checkpoint))
    return numbers


def decoded(tensors: list[Any]) -> dict[str, Tensor]:
    """GGUF name -> fp32 of a file's tensors, as `read_fields` lists them."""
    import gguf

    return {
        tensor.name: torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=True)
        )
        for tensor in tensors
    }


def write_header(checkpoint: Path, file: Path) -> None:
    """A GGUF of the checkpoint's metadata and tokenizer without its tensors."""
    with _model(checkpoint, file, 0) as model:
        model.prepare_metadata(vocab_only=False)
        model.gguf_writer.write_header_to_file(path=file)
        model.gguf_writer.write_kv_data_to_file()
        model.gguf_writer.close()
