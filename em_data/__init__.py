"""Micrographs -> tiles -> batches; knows no model."""
