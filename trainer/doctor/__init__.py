"""`llava-llama31 doctor`: what this machine, or this cluster, lacks for training, and how to mend it."""
