"""Matrix products that torch gives to cuBLAS and CUTLASS, for many tokens; Triton's for few."""
