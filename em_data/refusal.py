"""The error that refuses one image by its reason."""

STACK = "a stack of frames, where one image is needed. Save each frame to a file of its own."


class Refusal(ValueError):
    """A file, or an image of it, that is not used: the reason and a remedy, without its name."""
