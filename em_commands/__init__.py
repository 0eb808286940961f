"""The commands: `em-train-ldm`, `em-train-gan`, `em-generate`, `em-evaluate` and `em-publish`.

The scripts of the same names at the root of the repository call the same functions.
"""
