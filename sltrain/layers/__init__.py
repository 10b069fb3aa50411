"""The paper's layers, and replacing the linears of any model with them."""
