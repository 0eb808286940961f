"""A look at micrographs before training: `python -m em_data.look SOURCE`."""
