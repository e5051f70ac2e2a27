"""Every runtime has what a runtime has, and says the same of the same weights."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
import torch

from compress.formats.gguf import export_gguf
from compress.formats.onnx import export_onnx
from compress.formats.runtimes import RUNTIMES, Runtime, runtime_of
from compress.models.checkpoint import runtime_at
from compress.score.talk import prompts_of

MEMBERS = [name for name in vars(Runtime) if not name.startswith("_")]


@pytest.fixture(scope="module")
def models(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    export_gguf(tiny_teacher, folder / "model.gguf", "F16")
    export_onnx(tiny_teacher, folder / "onnx")
    return {
        "torch": tiny_teacher,
        "llama.cpp": folder / "model.gguf",
        "onnxruntime": folder / "onnx",
    }


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_has_every_member_with_the_arguments_of_the_protocol(name):
    module = runtime_of(name)
    assert len(MEMBERS) == 6
    for member in MEMBERS:
        wanted = list(inspect.signature(vars(Runtime)[member]).parameters)[2:]
        assert list(inspect.signature(getattr(module, member)).parameters)[1:] == wanted, member


def test_runtimes_agree_on_a_model_that_each_of_them_knows(models):
    facts = {}
    for name, path in models.items():
        assert runtime_at(path) == name
        runtime = runtime_of(name)
        params, files = runtime.params_and_files(path)
        head = runtime.head(path).weight_VH
        facts[name] = params, runtime.has_template(path), runtime.context_tokens(path), head
        assert files and all(file.is_file() for file in files)
    torch_params, torch_template, torch_context, torch_head = facts["torch"]
    for params, template, context, head in facts.values():
        assert (params, template, context) == (torch_params, torch_template, torch_context)
        torch.testing.assert_close(head.float(), torch_head, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_answers_and_is_timed(models, name):
    runtime = runtime_of(name)
    speaker = runtime.speaker(models[name], 1, 128, 2, "cpu")
    try:
        questions = prompts_of(speaker, ["Hello?", "Why?"], runtime.has_template(models[name]))
        answers = speaker.answers(questions, 4)
    finally:
        speaker.close()
    assert len(answers) == 2 and all(len(answer.ids) <= 4 for answer in answers)
    generate, weight_bytes = runtime.timer(models[name], 1, "cpu")
    assert len(generate(8, 3, 1)) == 3 and weight_bytes > 0


def test_naming_one_runtime_imports_no_other():
    code = (
        "import json, sys; from compress.formats.runtimes import runtime_of;"
        " runtime_of('llama.cpp'); print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnxruntime", "transformers"} & set(json.loads(done.stdout))
