"""bom.json: what a bundle is made of, as a CycloneDX 1.6 bill of materials for machine learning
(ML-BOM).

The student with its model card (task, family, training text, figures with their intervals), the
teacher it was made of, and every file of a model with its sha256. cyclonedx-python-lib writes it;
of a model card it knows nothing yet, so that is put into its JSON here, and the tests hold the
whole to the schema that comes with the library.
"""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress import __version__
from compress.store import sha256_json

BOM = "bom.json"
MODEL_FILES = (".gguf", ".safetensors", ".onnx", ".data")
# Figures that a reader of a bill of materials looks for.
FIGURES = ("kept", "open/kept", "open/right", "kl_to_teacher", "bits_per_byte", "acc", "size_bytes")


def bom_json(manifest: Mapping[str, Any], family: str, made: str | None) -> str:
    """The bill of materials of a bundle by its manifest. `family`: model_type of its config;
    `made`: when the run began, an ISO time. ModuleNotFoundError without cyclonedx-python-lib.
    """
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.output.json import JsonV1Dot6

    licence = manifest["licence"]
    student = Component(
        name=str(manifest["run"]),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="student",
        description=f"a student of {manifest['teacher']['source']}; budget {manifest['budget']}",
        licenses=[DisjunctiveLicense(name=licence["name"])],
    )
    teacher = Component(
        name=str(manifest["teacher"]["source"]),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="teacher",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=manifest["teacher"]["digest"])]
        if _is_sha256(manifest["teacher"]["digest"])
        else [],
        licenses=[DisjunctiveLicense(name=licence["name"])],
    )

    # What holds weights.
    bom = Bom(components=[teacher])
    for name, entry in sorted(manifest["files"].items()):
        if Path(name).suffix in MODEL_FILES:
            content = HashType(alg=HashAlgorithm.SHA_256, content=entry["sha256"])
            part = Component(name=name, type=ComponentType.FILE, hashes=[content], bom_ref=name)
            bom.components.add(part)
            bom.register_dependency(student, [part])
    bom.metadata.component = student
    bom.metadata.tools.components.add(
        Component(name="compress-lm", version=__version__, type=ComponentType.APPLICATION)
    )
    bom.register_dependency(student, [teacher])

    # The same bundle has the same bill: number and time are those of the run.
    bom.serial_number = uuid.UUID(sha256_json(manifest["files"])[:32])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    document["metadata"].pop("timestamp")
    if made:
        document["metadata"]["timestamp"] = made
    document["metadata"]["component"]["modelCard"] = _model_card(manifest, family)
    return json.dumps(document, indent=2) + "\n"


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _model_card(manifest: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Of the student, as CycloneDX has it."""
    data = manifest["config"].get("data", {})
    names = [*data.get("train", []), *data.get("chat", [])]
    card: dict[str, Any] = {
        "modelParameters": {
            "approach": {"type": "self-supervised"},
            "task": "text-generation",
            "architectureFamily": family,
            "datasets": [{"type": "dataset", "name": name} for name in names],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "considerations": {"technicalLimitations": [str(manifest["licence"]["sentence"])]},
    }

    # Figures, each with its interval where it has one.
    metrics = []
    for name in FIGURES:
        if name not in manifest["scores"]:
            continue
        metric: dict[str, Any] = {"type": name, "value": str(manifest["scores"][name])}
        if name in manifest["intervals"]:
            low, high = manifest["intervals"][name]
            metric["confidenceInterval"] = {"lowerBound": str(low), "upperBound": str(high)}
        metrics.append(metric)
    return card | {"quantitativeAnalysis": {"performanceMetrics": metrics}}
