"""What is served: the judged file of a bundle, verified first; or a GGUF, or a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.errors import ConfigError, nearest
from compress.formats.onnx_folder import CONFIG
from compress.models.model import runtime_at
from compress.ship.manifest import MANIFEST
from compress.ship.sums import SUMS, verify_bundle


@dataclass(frozen=True)
class Target:
    """A model to serve: `name` as clients ask for it, `bundle` where it came in one."""

    path: Path
    name: str
    runtime: str
    bundle: Path | None = None


def target_of(path: Path, file: str | None = None) -> Target:
    """What `path` names; of a bundle its judged file, or `file`.

    ValueError: there is nothing, or the bundle is not what its sums and manifest say. ConfigError:
    it has no such file.
    """
    if (path / SUMS).is_file() or (path / MANIFEST).is_file():
        return _of_bundle(path, file)
    if file is not None:
        raise ConfigError(f"--file {file}: {path} is no bundle, which alone has several; leave it")
    if not path.is_file() and not path.is_dir():
        raise ValueError(
            f"{path} does not exist; give a bundle, a GGUF file, an ONNX directory or a checkpoint"
            " directory"
        )
    return Target(path.absolute(), path.absolute().name, runtime_at(path))


def _of_bundle(bundle: Path, file: str | None) -> Target:
    manifest = verify_bundle(bundle)
    choices = sorted(_models(bundle, manifest["files"]))
    name = manifest["judged"] if file is None else file.rstrip("/")
    if name not in choices:
        raise ConfigError(f"--file {name!r} is no model of {bundle}; {nearest(name, choices)}")

    recipe = manifest["run"].partition("/")[0]
    path = bundle.absolute() / name
    return Target(path, f"{recipe}/{name}", runtime_at(path), bundle.absolute())


def _models(bundle: Path, files: dict[str, object]) -> set[str]:
    """Files and folders at the top of a bundle that a runtime opens."""
    tops = {name.partition("/")[0] for name in files}
    return {
        name
        for name in tops
        if name.endswith(".gguf")
        or (bundle / name / CONFIG).is_file()
        or (bundle / name / "config.json").is_file()
    }
