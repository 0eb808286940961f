"""Compare trained models with held-out micrographs and with each other."""

from em_commands.evaluate import main

if __name__ == "__main__":
    main()
