"""Train a translation from one kind of electron micrographs to another."""

from em_commands.train_cyclegan import main

if __name__ == "__main__":
    main()
