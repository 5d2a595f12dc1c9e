"""What ends a bench."""


class BenchError(Exception):
    """A measurement could not be made; a goal that is missed is not an error."""
