"""Generating from trained models: runs, repositories and folders to images, and the evaluation of runs."""
