"""What a step of training costs, in time and in memory."""
