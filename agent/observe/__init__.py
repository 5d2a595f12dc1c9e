"""What the agent says of itself: metrics, health, status, logs."""
