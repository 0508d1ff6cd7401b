"""`gradwatch top`: a job as it goes, on a terminal."""
