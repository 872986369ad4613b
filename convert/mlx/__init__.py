"""MLX: a directory that mlx-lm loads on Apple's machines; affine groups with widths of their own for every module."""
