"""The dry run: predict the memory, time and load balance of a launch, and find its errors, from shapes alone and without a GPU."""
