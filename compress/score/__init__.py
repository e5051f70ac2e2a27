"""What a model is worth: tasks, closeness to the teacher, size, latency, memory, and paired
statistics.
"""
