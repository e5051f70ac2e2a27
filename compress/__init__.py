"""compress: a teacher language model in, a mini or nano student that fits a budget out. Start
reading in `pipeline.py`.
"""

__version__ = "0.1.0"
