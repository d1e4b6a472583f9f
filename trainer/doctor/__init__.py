"""`llava-llama31 doctor`: what is missing for training on this machine or cluster, and how to fix it."""
