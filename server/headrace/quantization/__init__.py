"""How a linear layer stores and multiplies its weights, one file per scheme."""
