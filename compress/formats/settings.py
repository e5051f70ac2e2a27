"""Which files ship."""

from dataclasses import dataclass, field

from compress import formats
from compress.errors import ConfigError


@dataclass
class Export:
    """Which files ship besides the Hugging Face directory, as `formats/__init__.py` names them; the
    first one is what the budget judges.
    """

    files: list[str] = field(default_factory=list)
    # A private key in PEM that signs the bundle, as `compress sign --key` does.
    sign_key: str | None = None

    def __post_init__(self) -> None:
        for name in self.files:
            formats.parse(name)
        if len(set(self.files)) < len(self.files):
            raise ConfigError(f"export.files={self.files} names a file twice; name each once")
