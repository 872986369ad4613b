"""Statistics of the inputs and outputs of linears."""
