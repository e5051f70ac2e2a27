"""Which text trains, calibrates and judges."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from compress.bounds import check_source, check_values
from compress.errors import ConfigError

# What a token of training text sees: its row, or its own document.
Packing = StrEnum("Packing", ["stream", "documents"])
# Which tokens of a chat in data.train are learned.
ChatLabels = StrEnum("ChatLabels", ["all", "answers"])
# What happens where a stage wants more text than there is.
Reread = StrEnum("Reread", ["tell", "refuse"])


@dataclass
class Data:
    """Which text trains, calibrates and judges; sources as in `compress/text/sources.py`."""

    train: list[str] = field(default_factory=list)
    chat: list[str] = field(default_factory=list)
    # Never trained on: closeness to the teacher is measured on each, by name.
    heldout: list[str] = field(default_factory=list)
    seq_len: int = 512
    # Each train source's share of the tokens; empty: all documents alike.
    weights: list[float] = field(default_factory=list)
    packing: Packing = Packing.stream
    # Of data.train; data.chat, which nobody but the text teaches, always learns the answers.
    chat_labels: ChatLabels = ChatLabels.all
    # Of a stage whose tokens are more than its text has: read it more often and say so, or end
    # before work starts.
    reread: Reread = Reread.tell
    # Beside data.train: text whose tokens a smaller vocabulary keeps too. Nothing learns from it.
    vocabulary: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.seq_len < 8:
            raise ConfigError(f"data.seq_len={self.seq_len} is too short; at least 8 tokens")
        if not self.train or not self.heldout:
            raise ConfigError("data.train and data.heldout must each name at least one source")

        # Sources that there are, in the right number, each in one place.
        for key in ("train", "chat", "heldout", "vocabulary"):
            for source in getattr(self, key):
                check_source(f"data.{key}", source)
        if self.weights and (len(self.weights) != len(self.train) or not min(self.weights) > 0):
            raise ConfigError(
                f"data.weights={self.weights} must be one number above 0 for each of the"
                f" {len(self.train)} sources in data.train"
            )
        both = set(self.train + self.chat + self.vocabulary) & set(self.heldout)
        if both:
            raise ConfigError(
                f"data.heldout shares {sorted(both)} with the training data; held-out text must"
                " never be trained on, nor decide which tokens stay"
            )
        check_values("data", self)

    def heldout_names(self) -> dict[str, str]:
        """What the figures of a held-out text are called -> its source: a file's stem, the last
        part of a hub dataset's name, `topics` of embedded:topics; numbered from the second on
        where two agree.
        """
        source_by_name: dict[str, str] = {}
        for source in self.heldout:
            kind, _, rest = source.partition(":")
            names = {
                "embedded": rest.removesuffix("_heldout"),
                "hub": re.split("[:@]", rest)[0].rpartition("/")[2],
                "generated": kind,
            }
            name = base = names.get(kind) or re.split(r"[/\\]", source)[-1].partition(".")[0]

            number = 2
            while name in source_by_name:
                name = f"{base}_{number}"
                number += 1
            source_by_name[name] = source
        return source_by_name
