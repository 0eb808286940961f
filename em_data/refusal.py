"""The error that refuses one image by its reason."""


class Refusal(ValueError):
    """A file, or an image of it, that is not used: the reason and a remedy, without its name."""
