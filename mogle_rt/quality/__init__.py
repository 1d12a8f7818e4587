"""How good images are, and what an approximation costs: measures, the models that judge, and a report of a data set."""

from mogle_rt.errors import InputError


class UnmeasurableError(InputError):
    """A metric lacks what it needs: masks, prompts, real images, several images, or a package."""
