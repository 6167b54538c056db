"""What every stage stands on: the launch, its processes, signals, checkpoints, and the run itself."""
