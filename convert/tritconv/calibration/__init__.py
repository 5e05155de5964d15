"""What the calibrated methods know of a model: text through it, a layer at a time, and statistics of the inputs."""
