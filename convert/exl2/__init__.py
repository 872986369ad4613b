"""The EXL2 format: layout, bit packing, reading, writing, verifying."""
