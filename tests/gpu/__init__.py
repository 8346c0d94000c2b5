"""What only a GPU can show of the kernels: real sizes, real products, real memory. `make gpu` runs these and tests/kernels/interpreted."""
