"""compress: a teacher language model in, a mini or nano student that fits a budget out. Start
reading in `pipeline.py`.
"""

from compress.telemetry import off

__version__ = "0.1.0"

off()  # before any package that would report is imported
