"""The probe: what runs inside the training process. torch and the standard library only."""
