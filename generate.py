"""Generate images from a trained model."""

from em_commands.generate import main

if __name__ == "__main__":
    main()
