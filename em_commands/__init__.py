"""The commands: one module each, such as `em-train-ldm`.

The scripts of the same names at the root of the repository call the same functions.
"""
