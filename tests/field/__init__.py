"""Small programs after public reports of trainings that went bad, and what a right verdict says of each."""
