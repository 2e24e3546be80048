"""`python -m tardis_llm` is `tardis`."""

from .cli.main import main

if __name__ == "__main__":
    main()
