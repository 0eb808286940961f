"""Publish a trained model on the Hugging Face Hub."""

from em_commands.publish import main

if __name__ == "__main__":
    main()
