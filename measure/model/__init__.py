"""Running a model block by block in little memory."""
