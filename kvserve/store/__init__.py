"""Conversations on disk: snapshot files, their index, and what guards both. Free of MLX."""
