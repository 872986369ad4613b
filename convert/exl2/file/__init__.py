"""EXL2 bit for bit: layout, packing, reading, writing, verification."""
