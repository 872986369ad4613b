"""Time that runs take: counted from shapes, timed on the device, and what is left while they run."""
