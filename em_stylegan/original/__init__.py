"""Read the network pickles of stylegan2-ada-pytorch and stylegan3."""
