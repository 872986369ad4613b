"""What mlx-lm makes of a model before it is quantized: its modules, their names and layouts."""
