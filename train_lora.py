"""Tune a pretrained text-to-image model on electron micrographs."""

from em_commands.train_lora import main

if __name__ == "__main__":
    main()
