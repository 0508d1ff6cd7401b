"""What a launch says and is told: its journal, and the orders that come back."""
