"""The one training loop, its resumable state and its progress line."""
