"""How long a step takes on how many machines: mathematics alone, from measured inputs."""
