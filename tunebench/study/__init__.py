"""Study files, their resolution, the journal and what the journal says."""
