"""Where a text ends: one answer from four places, for generation, proof and every export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken

from compress.formats.compressed_tensors import ReloadedDirectory, export_compressed_tensors
from compress.formats.gguf import ReloadedGguf, export_gguf
from compress.formats.gguf_tokenizer import ENDS_BY_NAME, read_tokenizer
from compress.formats.llamacpp import LlamaCpp
from compress.formats.onnx import export_onnx
from compress.formats.onnxruntime import OnnxRuntime
from compress.models.checkpoint import copy_beside, digest, load_model, model_of, save_model
from compress.models.end_files import as_ids, in_files
from compress.models.ends import end_ids, obey, stated, turn_end
from compress.models.gguf_header import read_fields
from compress.models.tokenizer import load_tokenizer
from compress.quant.settings import GridName
from compress.score.parity import _ends_agree
from compress.stages.ptq import Ptq
from compress.store import Store
from compress.teacher import open_teacher

PAD, START, END = 0, 1, 2  # special tokens of the tiny teacher
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def edit(file: Path, **changes) -> None:
    """Set keys of a JSON file; `...` takes one out."""
    about = json.loads(file.read_text()) if file.is_file() else {}
    about = {key: value for key, value in (about | changes).items() if value is not ...}
    file.write_text(json.dumps(about))


def variant(
    teacher: Path,
    out: Path,
    config=END,
    generation=END,
    tokenizer="<|im_end|>",
    template: str | None = None,
) -> Path:
    """The tiny teacher with other ends; `...` leaves a key, or the file, out."""
    shutil.copytree(teacher, out)
    edit(out / "config.json", eos_token_id=config)
    edit(out / "generation_config.json", eos_token_id=generation)
    edit(out / "tokenizer_config.json", eos_token=tokenizer)
    if generation is ...:
        (out / "generation_config.json").unlink()
    if template is not None:
        (out / "chat_template.jinja").write_text(template)
    return out


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({}, [END]),
        ({"generation": [END, PAD]}, [END, PAD]),  # Qwen2.5-Instruct
        (
            {"config": PAD, "generation": PAD},
            [END, PAD],
        ),  # tuned, with the base model's configuration
        ({"config": None, "generation": ...}, [END]),
        (
            {"config": ..., "generation": ..., "template": ""},
            [END],
        ),  # a base model: its tokenizer alone
        ({"config": [END, PAD], "generation": [PAD, START]}, [END, PAD, START]),
        (
            {"tokenizer": "<|endoftext|>", "config": PAD, "generation": PAD},
            [PAD, END],
        ),  # only the template closes with it
        ({"tokenizer": ..., "config": [PAD], "generation": ..., "template": ""}, [PAD]),
        ({"config": 300, "generation": [300, END]}, None),
    ],
)
def test_ends_are_the_union_of_four_places_the_tokenizers_first(
    tiny_teacher, tmp_path, ends, expected
):
    folder = variant(tiny_teacher, tmp_path / "m", **ends)
    if expected is None:
        with pytest.raises(
            ValueError,
            match=r"config.json: eos_token_id 300 \(.*\) is ordinary text to the tokenizer",
        ):
            end_ids(folder)
    else:
        assert end_ids(folder) == expected


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ({"config": 512}, r"config.json ends texts at id 512, and the model has ids up to 511"),
        ({"generation": [END, 700]}, r"generation_config.json ends texts at id 700"),
        (
            {"generation": "<|im_end|>"},
            r"generation_config.json: eos_token_id '<\|im_end\|>' is neither a token id nor a list",
        ),
        ({"config": [END, -1]}, r"config.json: eos_token_id \[2, -1\] is neither"),
        ({"config": True}, r"config.json .*'eos_token_id' with value True"),
        ({"generation": [[2]]}, r"generation_config.json: eos_token_id \[\[2\]\] is neither"),
        ({"generation": 40}, r"generation_config.json: eos_token_id 40 \(.*\) is ordinary text"),
        ({"tokenizer": "<|new|>"}, r"the tokenizer's eos_token ends texts at id 512"),
        (
            {"config": ..., "generation": ..., "tokenizer": ..., "template": ""},
            "has no EOS token in config.json, generation_config.json, tokenizer",
        ),
    ],
)
def test_ends_that_can_not_be_are_refused_when_the_teacher_is_opened(
    tiny_teacher, tmp_path, ends, message
):
    folder = variant(tiny_teacher, tmp_path / "m", **ends)
    with pytest.raises(ValueError, match=message):
        open_teacher(str(folder), None, Store(tmp_path / "store"), lambda line: None)


def test_a_tokenizer_without_an_end_gets_the_models(tiny_teacher, tmp_path):
    folder = variant(tiny_teacher, tmp_path / "m", tokenizer=..., template="")
    assert load_tokenizer(folder).eos_token_id == END
    open_teacher(str(folder), None, Store(tmp_path / "store"), lambda line: None)


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (CHATML, END),
        (CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", END),
        ("", None),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        (
            "{% for m in messages %}<|im_start|>{{ m.content }}<|im_start|>{% endfor %}",
            None,
        ),  # opens turns as well
        ("{% for m in messages %}{{ m.content }} the end<|im_end|>{% endfor %}", None),
        ("{{ raise_exception('never') }}", None),
        ("nothing of what was said", None),
    ],
)
def test_the_templates_end_is_the_special_token_that_closes_an_answer(
    tiny_teacher, template, closing
):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = template
    assert turn_end(tokenizer) == closing


def test_ids_are_none_one_or_a_list():
    assert as_ids(None, "x") == [] and as_ids(3, "x") == [3] and as_ids([3, 1, 3], "x") == [3, 1]


def test_ends_of_a_multimodal_wrapper_are_its_text_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [7]}}))
    assert in_files(tmp_path) == {"config.json": [7]}


@pytest.fixture(scope="module", params=["instruct", "base_tuned", "config_none"])
def quantized(request, tiny_teacher, tmp_path_factory) -> Path:
    """A Q4_0 student of teachers whose files disagree."""
    folder = tmp_path_factory.mktemp(request.param)
    ends = {
        "instruct": {"generation": [END, PAD]},
        "base_tuned": {"config": PAD, "generation": PAD},
        "config_none": {"config": None},
    }
    Ptq(grid=GridName.q4_0).run(
        variant(tiny_teacher, folder / "teacher", **ends[request.param]), folder / "hf", None
    )
    return folder / "hf"


def test_a_student_ends_where_its_teacher_does_whatever_reads_it(quantized):
    ends = end_ids(quantized.parent / "teacher")
    assert set(end_ids(quantized)) == set(ends)
    assert set(
        load_model(quantized).generation_config.eos_token_id if len(ends) > 1 else [END]
    ) == set(ends)
    assert set(stated(quantized, load_tokenizer(quantized))["config.json"]) == set(ends)


def test_every_export_ends_where_its_checkpoint_does(quantized, tmp_path):
    ends, tokenizer = set(end_ids(quantized)), load_tokenizer(quantized)
    export_compressed_tensors(quantized, tmp_path / "packed")
    export_gguf(quantized, tmp_path / "m.gguf", "Q4_0")
    export_onnx(quantized, tmp_path / "onnx")
    for reloaded in (
        ReloadedDirectory(tmp_path / "packed", 1),
        ReloadedGguf(tmp_path / "m.gguf", 1),
    ):
        try:
            assert (
                reloaded.eos_ids() == ends
                and all(map(reloaded.ends_at, ends))
                and not reloaded.ends_at(50)
            )
            assert _ends_agree(quantized, tokenizer, reloaded)
        finally:
            reloaded.close()
    about = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["model"]
    assert set(as_ids(about["eos_token_id"], "x")) == ends


def test_a_file_that_lost_an_end_or_names_another_is_no_proof(tiny_teacher, tmp_path):
    folder = variant(tiny_teacher, tmp_path / "m", generation=[END, PAD])

    class Reloaded:
        def __init__(self, *ends):
            self.ends = set(ends)

        def eos_ids(self):
            return self.ends

        def ends_at(self, token):
            return token in self.ends

    tokenizer = load_tokenizer(folder)
    assert _ends_agree(folder, tokenizer, Reloaded(PAD, END))
    assert not _ends_agree(folder, tokenizer, Reloaded(END))
    assert not _ends_agree(folder, tokenizer, Reloaded(PAD, END, START))


def test_torch_obeys_all_ends(tiny_teacher, tmp_path):
    folder = variant(tiny_teacher, tmp_path / "m", generation=[END, PAD])
    model = load_model(folder)
    assert obey(model, folder) == {END, PAD} and model.generation_config.eos_token_id == [END, PAD]


def with_special(teacher: Path, out: Path, names: list[str]) -> Path:
    """The tiny teacher with more special tokens and rows for them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(teacher)
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True
    )
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=(len(tokenizer) + 31) // 32 * 32, **shape))
    save_model(model, out, tokenizer_from=out)
    tokenizer.save_pretrained(out)
    return out


def test_llama_cpp_ends_at_the_tokens_that_it_is_said_to_know_by_name(tiny_teacher, tmp_path):
    names = sorted(ENDS_BY_NAME)
    folder = with_special(tiny_teacher, tmp_path / "m", [*names, "<|other|>"])
    export_gguf(folder, tmp_path / "m.gguf", "F16")
    tokenizer, llama = (
        load_tokenizer(folder),
        LlamaCpp(tmp_path / "m.gguf", 1, 32, 1, embedding=False),
    )
    try:
        assert [
            name for name in names if not llama.ends_at(tokenizer.convert_tokens_to_ids(name))
        ] == []
        assert not llama.ends_at(tokenizer.convert_tokens_to_ids("<|other|>"))
    finally:
        llama.close()


def test_a_gguf_has_room_for_three_ends_and_more_that_llama_cpp_knows(tiny_teacher, tmp_path):
    folder = with_special(tiny_teacher, tmp_path / "m", ["<|a|>", "<|b|>", "<|c|>", "<|eot_id|>"])
    a, b, c, known = range(512, 516)
    edit(folder / "generation_config.json", eos_token_id=[a, b, known])
    export_gguf(folder, tmp_path / "m.gguf", "F16")
    reloaded = ReloadedGguf(tmp_path / "m.gguf", 1)
    try:
        assert reloaded.eos_ids() == {END, a, b} and all(map(reloaded.ends_at, (END, a, b, known)))
        assert read_tokenizer(reloaded.fields, tmp_path)["eos_token_id"] == [END, a, b]
    finally:
        reloaded.close()
    edit(folder / "generation_config.json", eos_token_id=[a, b, c, known])
    with pytest.raises(
        ValueError,
        match=(
            r"texts end at 5 tokens; a GGUF has keys for three, and llama.cpp does not know \[514\]"
            r" by name"
        ),
    ):
        export_gguf(folder, tmp_path / "n.gguf", "F16")


TOOLS = "{{ tools }}" + CHATML


@pytest.fixture(params=["in the config", "in a folder"])
def named(request, tiny_teacher, tmp_path) -> Path:
    """The tiny teacher with a second chat template, in the older and the newer layout."""
    folder = variant(tiny_teacher, tmp_path / "named")
    if request.param == "in a folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    else:
        (folder / "chat_template.jinja").unlink()
        templates = [
            {"name": "tool_use", "template": TOOLS},
            {"name": "default", "template": CHATML},
        ]
        edit(folder / "tokenizer_config.json", chat_template=templates)
    return folder


def test_named_templates_are_in_the_gguf_by_name_and_come_back(named, tmp_path):
    assert end_ids(named) == [END]
    export_gguf(named, tmp_path / "m.gguf", "F16")
    fields = read_fields(tmp_path / "m.gguf")[0]
    assert fields["tokenizer.chat_template"] == CHATML and fields["tokenizer.chat_templates"] == [
        "tool_use"
    ]
    assert fields["tokenizer.chat_template.tool_use"] == TOOLS
    (tmp_path / "back").mkdir()
    read_tokenizer(fields, tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").chat_template == {"default": CHATML, "tool_use": TOOLS}


def test_named_templates_go_along_and_are_in_the_digest(named, tmp_path):
    (tmp_path / "copy").mkdir()
    copy_beside(named, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").chat_template == {"default": CHATML, "tool_use": TOOLS}
    before, folder = digest(named), named / "additional_chat_templates"
    file = folder / "tool_use.jinja" if folder.is_dir() else named / "tokenizer_config.json"
    file.write_text(file.read_text().replace("{{ tools }}", "{{ tools }} "))
    assert digest(named) != before


def test_genai_asks_by_the_default_template_and_transformers_finds_all(named, tmp_path):
    export_onnx(named, tmp_path / "onnx")
    assert load_tokenizer(tmp_path / "onnx").chat_template == {"default": CHATML, "tool_use": TOOLS}
    runtime = OnnxRuntime(tmp_path / "onnx", 1, 64)
    try:
        assert (
            runtime.chat_prompt([{"role": "user", "content": "Hello"}])
            == "<|im_start|>user\nHello<|im_end|>\n"
        )
    finally:
        runtime.close()
    assert model_of(tmp_path / "onnx").digest != model_of(named).digest


def test_templates_of_which_none_is_the_default_are_no_gguf(named, tmp_path):
    shutil.rmtree(named / "additional_chat_templates", ignore_errors=True)
    (named / "chat_template.jinja").unlink(missing_ok=True)
    edit(
        named / "tokenizer_config.json",
        chat_template=[{"name": "tool_use", "template": TOOLS}, {"name": "rag", "template": TOOLS}],
    )
    with pytest.raises(
        ValueError, match="has the chat templates rag, tool_use, and none is called default"
    ):
        export_gguf(named, tmp_path / "m.gguf", "F16")
