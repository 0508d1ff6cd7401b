"""The collector: takes in what agents report, says who was first, remembers and shows it."""
