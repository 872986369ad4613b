"""What we decide and do: bit allocation, the rounding pass, the pipeline that joins the stages."""
