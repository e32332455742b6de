"""The run itself: batches, steps, schedules, interrupts."""
