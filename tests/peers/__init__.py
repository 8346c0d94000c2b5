"""This project's functions beside the code of other projects, on the same inputs.

Each file compares with one package, and is skipped where that package is not installed: `pip install -e '.[peers]'` installs all of them
in the versions that the comparisons were written for. Where two definitions differ, a table in the file names every case and the reason.
"""
