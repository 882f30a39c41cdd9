"""Plain types and errors that every other part may import; imports on any machine, without MLX."""
