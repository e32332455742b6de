"""Many processes and little memory: FSDP, low precision, estimates, hardware."""
