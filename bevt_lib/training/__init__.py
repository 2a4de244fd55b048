"""The loop, one optimiser step, checkpoints and the run folder. Imports the rooms before it."""
