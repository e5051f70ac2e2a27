"""Distillation: losses on the head, the teacher's cached signal, and what they feed to the
training loop.
"""
