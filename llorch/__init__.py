"""llorch: one command that turns machines with GPUs into one place to send prompts to."""

__version__ = "0.1.0"
