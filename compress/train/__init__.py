"""The one training loop, its data, its resumable state and its progress line."""
