"""The token mixer: weights, formulas, operators, autograd, and the kernels of each backend."""
