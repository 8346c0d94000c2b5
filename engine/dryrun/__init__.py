"""The dry run: every rank of a launch on shapes alone -> memory, time, balance and mistakes, before anything is paid for."""
