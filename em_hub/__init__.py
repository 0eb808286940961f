"""From a training run to images and to the Hub."""
