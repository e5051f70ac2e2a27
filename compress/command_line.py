"""Options of a verb."""

import argparse
from typing import NoReturn

from compress.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Whose refusals are sentences of ours."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line. ConfigError."""
        raise ConfigError(f"{self.prog}: {message}; `compress --help` shows every verb")
