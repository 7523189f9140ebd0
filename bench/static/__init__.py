"""What is counted, not timed: machine code, traffic and saved bytes."""
